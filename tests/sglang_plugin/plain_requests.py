"""Twenty prompts for any engine: each cold, each behind its own warm prefix, and in batches."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

SHORT = ["The capital of France is", "Hello", "def fib(n):", "1 2 3 4 5", "Once upon a time"]
# Stock attention pays for the square of a length at every token: one prompt is long.
CHARACTERS = (50, 77, 133, 200, 260, 333, 400, 500, 640, 770, 900, 1200, 1500, 2500, 5200)
SAMPLING = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
ASKED = {"return_logprob": True, "top_logprobs_num": 2}


def prompts() -> list[str]:
    """Real text, from one word to about 1,500 tokens."""
    topics = sorted(pydoc_data.topics.topics)[3:18]
    long = [
        pydoc_data.topics.topics[name][:size] for name, size in zip(topics, CHARACTERS, strict=True)
    ]
    return SHORT + long


def answers(engine: Any) -> dict[str, list[dict[str, Any]]]:
    """Greedy tokens, their log-probabilities, the best two at each place, and how far they are apart."""

    def facts(output: dict[str, Any]) -> dict[str, Any]:
        meta = output["meta_info"]
        return {
            "ids": list(output["output_ids"]),
            "logprobs": [entry[0] for entry in meta["output_token_logprobs"]],
            "best_two": [[one[1] for one in best] for best in meta["output_top_logprobs"]],
            "margins": [best[0][0] - best[1][0] for best in meta["output_top_logprobs"]],
            "cached": meta["cached_tokens"],
        }

    def empty_cache() -> None:
        # flush_cache says by its value alone that it did nothing.
        assert engine.flush_cache().success

    result: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": [], "batch": []}
    for prompt in prompts():
        empty_cache()
        result["cold"].append(facts(engine.generate(prompt, SAMPLING, **ASKED)))
        again = prompt + " And so the next question is: what"
        result["warm"].append(facts(engine.generate(again, SAMPLING, **ASKED)))
    empty_cache()
    for start in range(0, 20, 8):
        outputs = engine.generate(prompts()[start : start + 8], SAMPLING, **ASKED)
        result["batch"].extend(facts(output) for output in outputs)
    empty_cache()
    return result

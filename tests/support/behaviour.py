"""What the system answers to forty prompts, to the bit: recorded before a rebuilding and compared after it.

    python tests/support/behaviour.py record OUT.json
    python tests/support/behaviour.py compare BEFORE.json AFTER.json

All policies, one at a time and in mixed batches, both backends, HTTP, LangChain, conversations, two ranks. Requests
are written as they go over the wire, and objects come from the public packages, so that the same files run in both
checkouts. Floats depend on the machine: record both on one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from behaviour_server import served_part

MODEL = "smollm2-135m"
POLICIES: tuple[dict[str, Any], ...] = (
    {"mode": "off"},
    {"policy": "full"},
    {"policy": "reuse"},
    {"policy": "reuse", "passage": False},
    {"policy": "cacheblend:0.15"},
    {"policy": "cacheblend:0.3", "passage": False},
    {"policy": "epic:0.1"},
    {"policy": "query:0.15"},
    {"policy": "query:0.05"},
    {"policy": "query", "options": {"mean_shift": 0.0}},
    {"policy": "query:0.3", "options": {"draft_share": 0.0}},
    {"policy": "adaptive"},
)
QUESTIONS = ("What is it for?", "How is an exception handled?", "Which clause comes last?")
TOPICS = ("with", "lambda", "while", "import", "for", "try", "assert", "del")
_CHUNK_TOKENS, _SEED = 96, 1


class Prompts:
    """Chunks of CPython's reference behind one system part, in ever new orders."""

    def __init__(self, tokenizer: Any) -> None:
        import pydoc_data.topics

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids

        self.prefix = encode(
            "You answer questions about the Python language from the texts below.\n"
        )
        texts = pydoc_data.topics.topics
        self.chunks = [encode(texts[name])[:_CHUNK_TOKENS] for name in TOPICS]
        self._tails = [encode(f"\nQuestion: {question}\nAnswer:") for question in QUESTIONS]

    def make(self, number: int) -> tuple[list[int], list[list[int]]]:
        """Token ids and spans of one prompt; three to five chunks."""
        count = 3 + number % 3
        order = [
            (number * 3 + step * (1 + 2 * (number % 3))) % len(self.chunks) for step in range(count)
        ]
        ids, spans = list(self.prefix), []
        for index in dict.fromkeys(order):
            spans.append([len(ids), len(ids) + len(self.chunks[index])])
            ids += self.chunks[index]
        return [*ids, *self._tails[number % len(self._tails)]], spans


def hints(fields: dict[str, Any], spans: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
    """The envelope of ``/generate`` as it is documented for clients."""
    payload = {"mode": "fuse", **fields}
    if spans and payload["mode"] != "off":
        payload |= {"spans": [list(span) for span in spans], "prefix_len": spans[0][0]}
    action = {
        "action_id": "a",
        "action_type": "rag.fusion",
        "action_version": "1",
        "payload": payload,
    }
    return {"protocol_version": "1", "message_id": "m", "actions": [action]}


def facts(answer: dict[str, Any]) -> dict[str, Any]:
    """What must stay the same of an answer of ``/generate``."""
    meta = answer["meta_info"]
    return {
        "text": answer.get("text"),
        "ids": list(answer.get("output_ids") or []),
        "logprobs": [row[0] for row in meta.get("output_token_logprobs") or []],
        "top": [[entry[:2] for entry in row] for row in meta.get("output_top_logprobs") or []],
        "cached": meta["cached_tokens"],
        "report": meta.get("rag_fusion"),
    }


def builds(prompts: Prompts) -> list[dict[str, Any]]:
    """Requests that compute every chunk in both variants, so that nothing is missing later."""
    start = len(prompts.prefix)
    return [
        {
            "input_ids": [*prompts.prefix, *chunk],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "kv_hints": hints({"mode": "build", "passage": passage}, [[start, start + len(chunk)]]),
        }
        for chunk in prompts.chunks
        for passage in (None, True)
    ]


def request(ids: list[int], envelope: dict[str, Any], tokens: int = 6) -> dict[str, Any]:
    """Fields of a greedy request with log-probabilities."""
    return {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 3,
        "kv_hints": envelope,
    }


def engine_part(folder: Path) -> dict[str, Any]:
    """In-process engine: 24 prompts through 12 policies, 2 conversations of 2 turns, a mixed batch of 8."""
    from transformers import AutoTokenizer

    from rag_pipeline.sglang_plugin import create_engine

    prompts = Prompts(AutoTokenizer.from_pretrained(str(folder)))
    engine = create_engine(
        str(folder),
        random_seed=_SEED,
        log_level="error",
        max_total_tokens=16384,
        max_running_requests=8,
    )
    found: dict[str, Any] = {"policies": [], "turns": [], "batch": []}
    try:
        for one in builds(prompts):
            engine.generate(**one)

        def alone(ids: list[int], envelope: dict[str, Any]) -> dict[str, Any]:
            assert engine.flush_cache().success
            return facts(engine.generate(**request(ids, envelope)))

        for number in range(24):
            ids, spans = prompts.make(number)
            found["policies"].append(alone(ids, hints(POLICIES[number % len(POLICIES)], spans)))
        for number in (24, 25):
            ids, spans = prompts.make(number)
            talk = {"policy": "query:0.15", "conversation": f"talk-{number}"}
            first = alone(ids, hints(talk, spans))
            second = alone([*ids, *first["ids"], *ids[-12:]], hints(talk, spans))
            found["turns"] += [first, second]
        assert engine.flush_cache().success
        many = [prompts.make(number) for number in range(26, 34)]
        fields = request([], {})
        fields["input_ids"] = [ids for ids, _ in many]
        fields["kv_hints"] = [
            hints(POLICIES[number % len(POLICIES)], spans) for number, (_, spans) in enumerate(many)
        ]
        found["batch"] = [facts(answer) for answer in engine.generate(**fields)]
    finally:
        engine.shutdown()
    return found


def ranks_part(scratch: Path) -> Any:
    """Two tensor-parallel ranks of a tiny random model, by the script of their test."""
    import torch
    from rank_programs import run_ranks
    from transformers import AutoModelForCausalLM, LlamaConfig
    from warm import WarmStart

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = scratch / "tiny"
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    draw = torch.Generator().manual_seed(3)
    prefix, *chunks, question = [
        torch.randint(2, 256, (count,), generator=draw).tolist() for count in (20, 40, 40, 40, 9)
    ]
    ids, spans = list(prefix), []
    for chunk in chunks[::-1]:
        spans += [len(ids), len(ids) + len(chunk)]
        ids += chunk
    ids += question
    names = ("reuse", "full", "epic:0.3", "query:0.6", "cacheblend:0.9")
    policies = [{"mode": "off"}, *({"spans": spans, "policy": name} for name in names)]
    case = {"model": str(folder), "prefix": prefix, "chunks": chunks, "ids": ids}
    case |= {"policies": policies, "store_dir": str(scratch / "kv")}
    warm_start = WarmStart()
    try:
        return [seen["runs"] for seen in run_ranks("two_ranks.py", case, scratch, warm_start)]
    finally:
        warm_start.close()


def record(out: Path) -> None:
    """Write everything; takes some minutes."""
    from rag_pipeline.models import resolve_llm

    model = resolve_llm(MODEL).path
    with tempfile.TemporaryDirectory(prefix="behaviour-") as name:
        scratch = Path(name)
        found = {
            "engine": engine_part(model),
            "served": served_part(model, scratch),
            "ranks": ranks_part(scratch),
        }
    out.write_text(json.dumps(found, indent=1, sort_keys=True))


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Paths at which two recordings differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = sorted(before.keys() | after.keys())
        return [
            line
            for name in names
            for line in differences(before.get(name), after.get(name), f"{where}/{name}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for at, (a, b) in pairs for line in differences(a, b, f"{where}/{at}")]
    return [] if before == after else [f"{where}: {before!r:.80} -> {after!r:.80}"]


def main() -> int:
    """Run the command."""
    match sys.argv[1:]:
        case ["record", out]:
            record(Path(out))
            return 0
        case ["compare", before, after]:
            found = differences(
                json.loads(Path(before).read_text()), json.loads(Path(after).read_text())
            )
            print("\n".join(found[:40]) or "no difference")
            return 1 if found else 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main())

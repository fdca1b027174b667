"""Passkey recall with static patterns, and with dense layers beside them, by a model that was not trained with them.

``python -m rag_eval.benchmarks.power_passkey --json``

A prompt is filler with one sentence that names a passkey, and a question for it at the end. The depth of the sentence
goes through the prompt evenly. A prompt counts as right where every token of the passkey is the likeliest one behind
those before it, which is what a greedy answer needs; ``key_nll`` is the mean loss of these tokens. The model is run as
in :mod:`rag_eval.benchmarks.masked_model`. The paper's models for long prompts have 2 dense layers in every 7; its other
layers were trained with the pattern, which here they were not.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.benchmarks.masked_model import MaskedModel, reads_of, with_dense
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_pipeline.models import resolve_llm
from rag_pipeline.prompts import ModelTokenizer

_HEAD = "There is a pass key hidden in a long text. Find it and remember it.\n"
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_KEY = "The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "\nWhat is the pass key? The pass key is "
_DIGITS = 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PowerPasskeyConfig:
    """Sizes of a run; by default prompts of 64 blocks, of which the last row reads 9 in sparse layers."""

    model: str = "smollm2-135m"
    """Model; a name, or a folder of weights that transformers reads."""
    methods: str = (
        "power:block=16,power:block=16+dense_layers=2,power:block=16+dense_layers=2+dense_offset=3,"
        "streaming:block=16+window=8,streaming:block=16+window=8+dense_layers=2"
    )
    """Static attention methods that are compared with dense attention."""
    tokens: int = 1024
    """Most tokens of a prompt and its answer."""
    prompts: int = 8
    """Prompts, each of another depth and another passkey."""
    seed: int = 0
    """Of the passkeys."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "prompts")
        require_at_least(self, 0, "seed")
        with_dense(self.names)

    @property
    def names(self) -> list[str]:
        """:attr:`methods` one by one."""
        return self.methods.split(",")


def make_prompts(config: PowerPasskeyConfig, tokenizer: ModelTokenizer) -> list[tuple[Tensor, int]]:
    """Token ids of each prompt with its passkey at the end, and the number of the passkey's tokens."""
    source = random.Random(config.seed)
    made = []
    for index in range(config.prompts):
        key = "".join(source.choices("123456789", k=_DIGITS))
        fixed = len(tokenizer.encode(_HEAD + _KEY.format(key=key) + _QUESTION + key))
        sentences = (config.tokens - fixed) // len(tokenizer.encode(_FILLER)) - 1
        if sentences < 1:
            raise EvalError(f"tokens is {config.tokens}; a prompt needs at least {fixed + 60}")
        before = round((index + 0.5) / config.prompts * sentences)
        text = _FILLER * before + _KEY.format(key=key) + _FILLER * (sentences - before)
        answer = tokenizer.encode(key)
        ids = tokenizer.encode(_HEAD + text + _QUESTION) + answer
        made.append((torch.tensor(ids), len(answer)))
    return made


def run(config: PowerPasskeyConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Ask every prompt with every method.

    Returns
    -------
    dict
        ``methods{NAME}``, ``dense`` among them, with ``right`` (share of prompts), ``each`` (by depth, the first of
        the prompt first), ``key_nll`` and ``n``; ``density`` (keys read of those before, in sparse layers) and
        ``blocks_last_row`` of the others; ``tokens``, ``config``, ``versions``.
    """
    folder = resolve_llm(config.model).path
    prompts = make_prompts(config, ModelTokenizer.load(folder))
    masked = MaskedModel(str(folder))
    methods = with_dense(config.names)
    right: dict[str, list[bool]] = {name: [] for name in methods}
    losses: dict[str, list[float]] = {name: [] for name in methods}
    with keep_measured(lambda: all(losses.values())) as end:
        for number, (ids, count) in enumerate(prompts, 1):
            for name, method in methods.items():
                progress(f"prompt {number} of {len(prompts)}, {name}")
                logits, key = masked.logits(ids, method, count + 1)[:-1], ids[-count:]
                right[name].append(bool((logits.argmax(-1) == key).all()))
                losses[name].append(float(cross_entropy(logits, key)))
    whole = min(map(len, losses.values()))  # prompts that every method was asked
    tokens = max(len(ids) for ids, _ in prompts)
    found: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        found[name] = {
            "right": round(statistics.mean(right[name][:whole]), 4),
            "each": right[name][:whole],
            "key_nll": round(statistics.mean(losses[name][:whole]), 4),
            "key_nll_range": [round(pick(losses[name][:whole]), 4) for pick in (min, max)],
            "n": whole,
        }
        found[name] |= reads_of(method, tokens)
    return {
        "benchmark": "power_passkey",
        "methods": found,
        "tokens": tokens,
        "config": dataclasses.asdict(config),
        "versions": versions_of("python", "torch", "transformers"),
    } | end.report()


def table(report: dict[str, Any]) -> str:
    """The report as text: a line per method."""
    lines = [f"{'method':<48}{'density':>9}{'right':>7}{'loss of the passkey':>21}  by depth"]
    for name, one in report["methods"].items():
        depths = "".join("x" if is_right else "." for is_right in one["each"])
        lines.append(
            f"{name:<48}{one.get('density', 1.0):>9.3f}{one['right']:>7.2f}{one['key_nll']:>21.3f}  {depths}"
        )
    config = report["config"]
    lines.append(f"{config['model']}, {config['prompts']} prompts of {report['tokens']} tokens")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; returns the exit code."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.power_passkey", __doc__)
    return run_benchmark(parser, PowerPasskeyConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())

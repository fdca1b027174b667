"""What static patterns cost a model that was not trained with them: next-token loss at equal blocks.

``python -m rag_eval.benchmarks.power_nll --json``

The model is run by ``transformers`` with the pattern's mask written out, in fp32: no engine and no kernel of this project
takes part. The texts are topics of Python's language reference, which every Python brings. The loss is that of the
second half of each text, where the patterns leave out most; ``delta`` is its difference to dense attention. Patterns
read about as many blocks, the hybrid's dense layers apart. The paper trains the model with the mask; here nothing is trained, so the
numbers say what a user gets who turns a pattern on, not what the paper claims.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.benchmarks.masked_model import MaskedModel, reads_of, with_dense
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_pipeline.models import resolve_llm
from rag_pipeline.prompts import ModelTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PowerNllConfig:
    """Sizes of a run; by default texts of 64 blocks, of which the last row reads 9, with LongNet 12."""

    model: str = "smollm2-135m"
    """Model; a name, or a folder of weights that transformers reads."""
    methods: str = (
        "power:block=32,power:block=32+dense_layers=2,streaming:block=32+window=8,"
        "strided:block=32+window=5+stride=16,dilated:block=32+window=18,longnet:block=32+segment=4"
    )
    """Static attention methods that are compared with dense attention."""
    tokens: int = 2048
    """Tokens of a text."""
    texts: int = 4
    """Texts."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "texts")
        require_at_least(self, 4, "tokens")
        with_dense(self.names)

    @property
    def names(self) -> list[str]:
        """:attr:`methods` one by one."""
        return self.methods.split(",")


def run(config: PowerNllConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure every method on every text.

    Returns
    -------
    dict
        ``methods{NAME}`` with ``loss`` and ``delta`` (``median`` and ``values`` by text, ``n``), ``blocks_last_row`` and
        ``density`` (keys read of those before, in sparse layers), ``dense`` alike, ``config``, ``versions``.
    """
    folder = resolve_llm(config.model).path
    texts = _texts(ModelTokenizer.load(folder), config)
    masked = MaskedModel(str(folder))
    methods = with_dense(config.names)
    losses: dict[str, list[float]] = {name: [] for name in methods}
    with keep_measured(lambda: all(losses.values())) as end:
        for number, ids in enumerate(texts, 1):
            for name, method in methods.items():
                progress(f"text {number} of {len(texts)}, {name}")
                losses[name].append(masked.loss(ids, method))
    whole = min(map(len, losses.values()))  # texts that every method has gone through
    losses = {name: values[:whole] for name, values in losses.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        deltas = [a - b for a, b in zip(losses[name], losses["dense"], strict=True)]
        found[name] = {"loss": _spread(losses[name]), "delta": _spread(deltas)}
        found[name] |= reads_of(method, config.tokens)
    return {
        "benchmark": "power_nll",
        "dense": found.pop("dense"),
        "methods": found,
        "config": dataclasses.asdict(config),
        "versions": versions_of("python", "torch", "transformers"),
    } | end.report()


def _texts(tokenizer: ModelTokenizer, config: PowerNllConfig) -> list[Tensor]:
    """Topics one behind the other in the order of their names, the longest first, cut into texts of one length."""
    words = sorted(topics.values(), key=lambda text: (-len(text), text))
    ids: list[int] = []
    for text in words:
        ids += tokenizer.encode(text)
        if len(ids) >= config.texts * config.tokens:
            break
    else:
        raise EvalError(
            f"texts x tokens is {config.texts * config.tokens}; there are {len(ids)} tokens of text"
        )
    return list(torch.tensor(ids[: config.texts * config.tokens]).split(config.tokens))


def _spread(values: list[float]) -> dict[str, Any]:
    median = float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
    return {
        "median": round(median, 4),
        "values": [round(value, 4) for value in values],
        "n": len(values),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text: a line per method."""
    lines = [f"{'method':<44}{'blocks':>7}{'density':>9}{'loss':>8}{'delta':>8}"]
    lines.append(f"{'dense':<60}{report['dense']['loss']['median']:>8.3f}")
    for name, one in report["methods"].items():
        lines.append(
            f"{name:<44}{one['blocks_last_row']:>7}{one['density']:>9.3f}"
            f"{one['loss']['median']:>8.3f}{one['delta']['median']:>+8.3f}"
        )
    config = report["config"]
    lines.append(
        f"{config['model']}, second half of {config['texts']} texts of {config['tokens']} tokens; nats per token"
    )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; returns the exit code."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.power_nll", __doc__)
    return run_benchmark(parser, PowerNllConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())

"""Which tokens of a long conversation to keep: rules and variants of EpiCache at one budget, without an engine.

``python -m rag_eval.benchmarks.retention --dataset locomo10.json --json``

The model is run by ``transformers``; memories are built block by block as the engine builds them
(:mod:`rag_eval.retention`). Per question: the share of its tokens' attention to the history (of the model with the
full history) that falls on what a variant kept, the share of evidence tokens kept, and the loss of the accepted
answer. Differences are paired with ``epicache``, intervals by bootstrap over questions. ``other_episodes`` are
EpiCache's memories of the episodes that the question does not match.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_eval.metrics import paired_bootstrap

if TYPE_CHECKING:
    from torch import Tensor

    from rag_eval.retention.model import LayerCache, ShownModel
    from rag_eval.retention.talk import Talk
    from rag_pipeline.memory.rendering import Renderer

BASE = "epicache"
OTHERS = "other_episodes"
FULL = "full"
MEASURES = ("recall", "evidence", "nll")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RetentionConfig:
    """Sizes of a run; by default 4x compression of 4k tokens."""

    dataset: str = ""
    """Conversations: a LoCoMo file, or another that evaluation reads."""
    model: str = "smollm2-135m"
    """Model; a name, or a folder of weights that transformers reads."""
    embedder: str = "all-minilm-l6-v2"
    """Model of sentence vectors."""
    variants: str = ""
    """Names, separated by commas; all by default."""
    conversations: int = 3
    """Conversations, the first of the file."""
    questions: int = 40
    """Most questions per conversation, spread evenly."""
    tokens: int = 4096
    """Tokens of the history, whole utterances."""
    budget: int = 1024
    """Tokens kept per layer and KV head."""
    block: int = 512
    """Tokens of a block."""
    episodes: int = 4
    """Episodes of a conversation."""
    sensitivity: str = ""
    """File of `rag-pipeline memory calibrate`; measured on the last conversation where none is given."""
    dtype: str = "bfloat16"
    """Of the model: bfloat16 or float32; scores are fp32."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "conversations", "questions", "budget", "block", "episodes")
        require_at_least(self, 2 * self.block, "tokens")
        if self.dtype not in ("bfloat16", "float32"):
            raise EvalError(f"dtype is {self.dtype!r}; give bfloat16 or float32")
        _ = self.names

    @property
    def names(self) -> list[str]:
        """Names of the variants, the base first."""
        from rag_eval.retention.variants import VARIANTS, variant_named

        names = self.variants.split(",") if self.variants else list(VARIANTS)
        for name in names:
            variant_named(name)
        return [BASE, *(name for name in names if name != BASE)]


Rows = dict[str, dict[str, dict[str, float]]]
"""Measures by variant, question and name."""


def run(config: RetentionConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure every variant on every question.

    Returns
    -------
    dict
        ``variants{NAME}`` with the mean of each measure, its paired difference to ``epicache`` (``mean``, ``low``,
        ``high``, ``n``) and ``peak_tokens``; ``sensitivity``, ``budgets`` by variant, ``config``, ``versions``.
    """
    from rag_eval.datasets import read_conversations
    from rag_eval.retention.model import ShownModel
    from rag_eval.retention.sensitivity import key_sensitivity
    from rag_eval.retention.sensitivity_file import read_sensitivity
    from rag_eval.retention.talk import lay_out
    from rag_eval.retention.variants import budgets_of, variant_named
    from rag_pipeline.memory.rendering import Renderer
    from rag_pipeline.models import fingerprint_checkpoint, resolve_embedder, resolve_llm
    from rag_pipeline.prompts.tokenizer import ModelTokenizer
    from retrievers import Embedder

    if not config.dataset:
        raise EvalError("no data set is given; write --dataset FILE")
    folder = resolve_llm(config.model).path
    renderer = Renderer(ModelTokenizer.load(folder))
    embedder = Embedder(resolve_embedder(config.embedder).path, name=config.embedder)
    found = read_conversations(Path(config.dataset))
    # Layers are measured on a conversation that is not asked about, where there is one.
    asked, sample = found[: config.conversations], found[-1]
    talks = [
        lay_out(
            one, renderer, embedder, tokens=config.tokens, block_tokens=config.block,
            episodes=config.episodes, most_questions=config.questions,
        )
        for one in asked
    ]  # fmt: skip
    model = ShownModel.load(folder, config.dtype)
    if config.sensitivity:
        fingerprint = fingerprint_checkpoint(folder)
        sensitivity = list(read_sensitivity(Path(config.sensitivity), fingerprint).cosines)
    else:
        progress("sensitivity of layers")
        text = "\n".join(one.text for one in sample.remarks)
        ids = renderer.tokenizer.encode(text)[: config.tokens]
        sensitivity = key_sensitivity(model, ids)
    budgets = {
        name: budgets_of(variant_named(name), sensitivity, config.budget) for name in config.names
    }
    rows: Rows = {}
    peaks: dict[str, int] = {}
    with keep_measured(lambda: len(rows) > 1) as end:
        for number, talk in enumerate(talks, 1):
            _measure_talk(
                config, model, renderer, talk, budgets, rows, peaks,
                partial(_say, progress, f"conversation {number} of {len(talks)}"),
            )  # fmt: skip
    return {
        "benchmark": "retention",
        "variants": {name: _summary(name, rows, peaks) for name in rows},
        "questions": [len(talk.questions) for talk in talks],
        "sensitivity": [round(one, 5) for one in sensitivity],
        "budgets": {name: list(one) for name, one in budgets.items() if len(set(one)) > 1},
        "config": dataclasses.asdict(config),
        "versions": versions_of("python", "torch", "transformers"),
    } | end.report()


def _say(progress: Progress, place: str, what: str) -> None:
    progress(f"{place}: {what}")


def _measure_talk(
    config: RetentionConfig,
    model: ShownModel,
    renderer: Renderer,
    talk: Talk,
    budgets: dict[str, tuple[int, ...]],
    rows: Rows,
    peaks: dict[str, int],
    progress: Progress,
) -> None:
    from rag_eval.retention.measures import (
        answer_loss,
        full_caches,
        kept_mask,
        question_mass,
        with_tail,
    )
    from rag_eval.retention.variants import build, variant_named

    progress("full history")
    full = full_caches(model, talk, config.block)
    masses: dict[str, Tensor] = {}
    for question in talk.questions:
        masses[question.id] = question_mass(model, talk, question, full)
        loss = answer_loss(model, talk, question, full)
        rows.setdefault(FULL, {})[question.id] = {"recall": 1.0, "evidence": 1.0, "nll": loss}
    for name in config.names:
        progress(name)
        memories = build(
            variant_named(name), model, talk, renderer, full, budgets[name],
            block_tokens=config.block,
        )  # fmt: skip
        peaks[name] = max(peaks.get(name, 0), *(max(one.peak) for one in memories))
        masks = [kept_mask(one.kept, talk) for one in memories]
        caches = [with_tail(model, talk, one.caches) for one in memories]
        for question in talk.questions:
            measured = [
                _measure(model, talk, question, masses[question.id], mask, cache)
                for index, (mask, cache) in enumerate(zip(masks, caches, strict=True))
                if name == BASE or len(memories) == 1 or index == question.episode
            ]
            match = question.episode if len(measured) > 1 else 0
            rows.setdefault(name, {})[question.id] = measured[match]
            others = [one for index, one in enumerate(measured) if index != match]
            if others:
                rows.setdefault(OTHERS, {})[question.id] = {
                    measure: fmean(one[measure] for one in others) for measure in MEASURES
                }


def _measure(
    model: ShownModel,
    talk: Talk,
    question: Any,
    mass: Tensor,
    mask: Tensor,
    caches: Sequence[LayerCache],
) -> dict[str, float]:
    from rag_eval.retention.measures import answer_loss, evidence_share, mass_recall

    return {
        "recall": mass_recall(mass, mask),
        "evidence": evidence_share(question, mask),
        "nll": answer_loss(model, talk, question, caches),
    }


def _summary(name: str, rows: Rows, peaks: dict[str, int]) -> dict[str, Any]:
    base, own = rows.get(BASE, {}), rows[name]
    found: dict[str, Any] = {"n": len(own)}
    if name in peaks:
        found["peak_tokens"] = peaks[name]
    for measure in MEASURES:
        found[measure] = round(fmean(one[measure] for one in own.values()), 5)
        shared = [one for one in own if one in base]
        if name != BASE and shared:
            apart = paired_bootstrap(
                [own[one][measure] for one in shared], [base[one][measure] for one in shared]
            )
            found[f"{measure}_difference"] = {
                key: round(value, 5) for key, value in dataclasses.asdict(apart).items()
            }
    return found


def table(report: dict[str, Any]) -> str:
    """The report as text: a line per variant, differences to ``epicache`` with their intervals."""
    lines = [f"{'variant':<26}{'n':>4}" + "".join(f"{one:>9}{'':>27}" for one in MEASURES)]
    for name, one in report["variants"].items():
        line = f"{name:<26}{one['n']:>4}"
        for measure in MEASURES:
            line += f"{one[measure]:>9.4f}"
            apart = one.get(f"{measure}_difference")
            text = (
                f"{apart['mean']:+.4f} [{apart['low']:+.4f},{apart['high']:+.4f}]" if apart else ""
            )
            line += f"{text:>27}"
        lines.append(line)
    config = report["config"]
    lines.append(
        f"{config['model']}, {config['tokens']} tokens, budget {config['budget']}, blocks of {config['block']}, "
        f"{config['episodes']} episodes; differences to {BASE}, 95% intervals"
    )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; returns the exit code."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.retention", __doc__)
    return run_benchmark(parser, RetentionConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())

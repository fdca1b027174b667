"""What attention methods lose at equal density: ``python -m rag_eval.benchmarks.attention_quality --density 0.3 --json``.

A model runs in torch, its attention computed by this project's kernels with each method's own masks: no engine takes
part. First the methods are brought to one density on the model's real attention over one document of each kind
(:mod:`rag_eval.benchmarks.attention_density`). ``recall`` is the share of dense attention's softmax mass that lies on the keys
they keep there, all layers and heads, ``recall_worst`` that of the worst head. Then every document is prefilled by every
method. ``nll_delta`` is the loss of the prose behind the first 1,024 tokens, relative to dense. Questions are prefilled by
the method, too, each as a piece behind its document; what follows reads every key. An answer is right where greedy
decoding says it in full; chance is 0. All methods see the same documents, and intervals are those of pairs with
dense (bootstrap, 95%). ``prefill_cpu_vs_dense`` and ``attention_cpu_vs_dense`` compare the CPU time of all prefills with that of
dense, in this process; an engine's is told by ``rag-pipeline bench attention``. ``vertical_slash`` chooses for a document by the last rows of the document.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.attention_density import SHORTEST, density_by_length, length_words
from rag_eval.benchmarks.attention_model import MethodModel, Spent
from rag_eval.benchmarks.attention_prompts import KINDS, Document, make_document
from rag_eval.benchmarks.attention_seen import SeenAttention
from rag_eval.benchmarks.frame import (
    Report,
    benchmark_parser,
    keep_measured,
    run_benchmark,
    versions_of,
)
from rag_eval.benchmarks.named_methods import named_method
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_eval.metrics import interval
from rag_eval.runner.prompts import PromptMaker
from rag_kernels import AttentionMethod
from rag_pipeline.models import fingerprint_checkpoint, resolve_llm

DENSE = "dense"
METHODS = (
    "sale,power:block=64,streaming:block=64,strided:block=64+stride=16,dilated:block=64+sink=1,"
    "longnet:block=64,vertical_slash,block_topk,xattention"
)
"""Blocks of the static patterns are those of the others: with the paper's 256, a prompt of 4K has 16."""
FIRST_ROW = 1024
"""Rows in front of it read everything with SALE; the loss is that of the rows behind."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionQualityConfig:
    """What is compared."""

    model: str = "smollm2-135m"
    """Hub id, folder, GGUF file or packaged name."""
    methods: str = METHODS
    """Attention methods, comma between; one that names the option of its density is left as it is."""
    lengths: str = "4096"
    """Tokens of the prompts, comma between."""
    density: str = "0.3"
    """Share of the keys that all read: one for all lengths, or one per length, comma between; as they are if empty."""
    kinds: str = ",".join(KINDS)
    """Kinds of documents, comma between; only the prose of ``passkey`` has a loss."""
    documents: int = 2
    """Documents of each kind, per length."""
    questions: int = 12
    """Questions about each document."""
    nll_every: int = 4
    """One row in so many is scored."""
    seed: int = 0
    """Chooses texts and answers."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "documents", "questions", "nll_every")
        for name in self.method_names:
            named_method(name)
        _ = self.densities
        if not self.kind_list or set(self.kind_list) - set(KINDS):
            raise EvalError(f"kinds is {self.kinds!r}; give some of {','.join(KINDS)}")

    @property
    def kind_list(self) -> list[str]:
        """Kinds as given."""
        return list(dict.fromkeys(word.strip() for word in self.kinds.split(",") if word.strip()))

    @property
    def method_names(self) -> list[str]:
        """Methods as given, without dense."""
        named = [word.strip() for word in self.methods.split(",") if word.strip()]
        return [name for name in dict.fromkeys(named) if name != DENSE]

    @property
    def densities(self) -> dict[int, float]:
        """Density by length; 0 where none was asked for."""
        if not self.density:
            return dict.fromkeys(
                sorted(map(int, length_words(self.lengths, shortest=SHORTEST))), 0.0
            )
        return density_by_length(self.lengths, self.density)


@dataclasses.dataclass(slots=True)
class _Scores:
    """What one method scored, pair by pair with the others."""

    losses: list[float] = dataclasses.field(default_factory=list)
    right: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {kind: [] for kind in KINDS}
    )
    answer_loss: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: {kind: [] for kind in KINDS}
    )
    spent: Spent = dataclasses.field(default_factory=Spent)


def run(config: AttentionQualityConfig, progress: Progress = no_progress) -> Report:
    """Compare, and return the report.

    Returns
    -------
    dict
        ``lengths{N{METHOD{options, density, recall, recall_worst, nll_delta, key_value, passkey, retrieval, ...}}}`` beside
        ``config`` and ``versions``.
    """
    folder = resolve_llm(config.model).path
    maker = PromptMaker(folder, gold_tokens=16)
    fingerprint = fingerprint_checkpoint(folder)
    model = MethodModel(folder)
    lengths: dict[str, Any] = {}
    with keep_measured(lambda: any(lengths.values())) as end:
        for tokens, density in config.densities.items():
            rows = lengths[str(tokens)] = {}
            for name, row in _compare(config, model, fingerprint, maker, tokens, density, progress):
                rows[name] = row
    return {
        "config": dataclasses.asdict(config),
        "lengths": lengths,
        "versions": versions_of("python", "torch", "transformers"),
    } | end.report()


def _compare(
    config: AttentionQualityConfig,
    model: MethodModel,
    fingerprint: str,
    maker: PromptMaker,
    tokens: int,
    density: float,
    progress: Progress,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one length, dense first."""
    documents = [
        make_document(kind, tokens, config.questions, maker.encode, f"{config.seed}/{number}")
        for number in range(config.documents)
        for kind in config.kind_list
    ]
    told: dict[str, dict[str, Any]] = {
        name: {"options": name} for name in (DENSE, *config.method_names)
    }
    if density:
        first = {one.kind: one.ids for one in documents[: len(config.kind_list)]}
        seen = SeenAttention(model, fingerprint, first, progress)
        told |= seen.brought_to(density, config.method_names, tokens, progress)
        del seen
    dense: _Scores | None = None
    for name, facts in told.items():
        method = None if name == DENSE else named_method(facts["options"]).for_model(fingerprint)
        scores = _Scores()
        model.take_spent()
        for number, document in enumerate(documents, 1):
            _score(model, method, document, config, scores)
            progress(f"{tokens} tokens, {facts['options']}, document {number} of {len(documents)}")
        scores.spent = model.take_spent()
        dense = dense or scores
        row = facts | _compared(scores, dense)
        progress(f"{tokens} tokens, {row}")
        yield name, row


def _score(
    model: MethodModel,
    method: AttentionMethod | None,
    document: Document,
    config: AttentionQualityConfig,
    scores: _Scores,
) -> None:
    """Prefill a document by a method, and ask everything."""
    hidden, cache = model.prefill(document.ids, method)
    if document.kind == "passkey":
        rows = slice(FIRST_ROW, len(document.ids) - 1, config.nll_every)
        following = document.ids[FIRST_ROW + 1 :: config.nll_every]
        scores.losses += model.losses(hidden[rows], following).tolist()
    for question in document.questions:
        is_right, loss = model.ask(question.ids, question.answer, cache, method)
        scores.right[document.kind].append(float(is_right))
        scores.answer_loss[document.kind].append(loss)


def _compared(scores: _Scores, dense: _Scores) -> dict[str, Any]:
    """Means, and differences to dense with their intervals."""
    made: dict[str, Any] = {"density": round(scores.spent.density, 4)} | _cost(
        scores.spent, dense.spent
    )
    if dense.losses:
        base = statistics.mean(dense.losses)
        made |= {
            "nll": round(statistics.mean(scores.losses), 4),
            "nll_delta": round(statistics.mean(scores.losses) / base - 1, 5),
            "nll_delta_interval": interval(scores.losses, dense.losses, base),
            "nll_n": len(scores.losses),
        }
    kinds = [kind for kind in KINDS if dense.right[kind]]
    for kind in kinds:
        right = scores.right[kind]
        made |= {
            kind: round(statistics.mean(right), 4),
            f"{kind}_delta_interval": interval(right, dense.right[kind]),
            f"{kind}_answer_nll": round(statistics.mean(scores.answer_loss[kind]), 4),
            f"{kind}_n": len(right),
        }
    whole, whole_dense = (
        [value for kind in kinds for value in one.right[kind]] for one in (scores, dense)
    )
    return made | {
        "retrieval": round(statistics.mean(whole), 4),
        "retrieval_delta_interval": interval(whole, whole_dense),
        "retrieval_n": len(whole),
    }


def _cost(own: Spent, dense: Spent) -> dict[str, Any]:
    """CPU time of the prefills, and its ratio to dense attention in the same run."""
    return {
        "prefill_cpu_s": round(own.prefill_s, 2),
        "attention_cpu_s": round(own.attention_s, 2),
        "prefill_cpu_vs_dense": round(own.prefill_s / dense.prefill_s, 4),
        "attention_cpu_vs_dense": round(own.attention_s / dense.attention_s, 4),
        "estimation_cpu_vs_dense": round(own.mask_s / dense.attention_s, 4),
    }


def table(report: Report) -> str:
    """One line per length and method."""
    lines = [
        f"{'tokens':>6} {'method':<44} {'density':>7} {'recall':>7} {'worst':>6} {'attention':>9} {'prefill':>8} {'NLL':>8} "
        f"{'95%':>17} {'key-value':>9} {'passkey':>8} {'difference, 95%':>17}"
    ]
    for length, methods in report["lengths"].items():
        for row in methods.values():
            less, more = row["retrieval_delta_interval"]
            key_value, passkey = (f"{row[kind]:.0%}" if kind in row else "-" for kind in KINDS)
            nll = span = "-"
            if "nll_delta" in row:
                low, high = row["nll_delta_interval"]
                nll, span = f"{row['nll_delta']:+.2%}", f"{low:+.2%} {high:+.2%}"
            lines.append(
                f"{length:>6} {row['options']:<44} {row['density']:>7.3f} {row.get('recall', 1.0):>7.3f} "
                f"{row.get('recall_worst', 1.0):>6.2f} {row['attention_cpu_vs_dense']:>9.3f} "
                f"{row['prefill_cpu_vs_dense']:>8.3f} {nll:>8} {span:>17} {key_value:>9} {passkey:>8} "
                f"{less:>+8.0%} {more:>+8.0%}"
            )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.attention_quality", __doc__)
    return run_benchmark(parser, AttentionQualityConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())

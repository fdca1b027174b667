"""Where a question finds its evidence: in the episode it is matched with, and in the messages that are retrieved for it.

``python -m rag_eval.benchmarks.conversation_matching --dataset locomo10.json --json``

No language model runs: its tokenizer measures lengths, the sentence model and BM25 match. Of each question's evidence in front
of the tail: the share in the matched episode, in the best two, and in the messages that are repeated word for word where they
have a share of the budget (1 is the method ``retrieval``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, run_benchmark, versions_of
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError

SHARES = (0.125, 0.25, 0.5)
"""Of the budget, for messages beside a record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchingConfig:
    """Sizes of a run."""

    dataset: str = ""
    """Conversations: a LoCoMo file, or another that evaluation reads."""
    model: str = "smollm2-135m"
    """Model whose tokenizer measures lengths."""
    embedder: str = "all-minilm-l6-v2"
    """Sentence model."""
    conversations: int = 5
    """Conversations, the first of the file."""
    tokens: int = 4096
    """Tokens of the history, the first of each conversation."""
    compression: int = 4
    """How many times as long as the budget the history is."""
    episodes: int = 4
    """Topics of a conversation."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "conversations", "compression", "episodes")
        require_at_least(self, 256, "tokens")
        if not self.dataset:
            raise EvalError("dataset is empty; give a file of conversations, such as locomo10.json")


def run(config: MatchingConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Match every question.

    Returns
    -------
    dict
        ``n`` questions and per name the mean share of evidence: ``matched``, ``best_two``, ``repeated_0.125`` ...,
        ``retrieval``; the ``config`` and ``versions``.

    Raises
    ------
    EvalError
        A bad data set, or no question whose evidence lies in front of the tail.
    """
    from rag_eval.conversation.config import ConversationConfig
    from rag_eval.conversation.run import sentence_encoder
    from rag_eval.conversation.talk import place
    from rag_eval.datasets import read_conversations
    from rag_eval.runner.run import model_folder
    from rag_pipeline import ModelTokenizer

    conversations = read_conversations(config.dataset)[: config.conversations]
    tokenizer = ModelTokenizer.load(model_folder(config.model, progress)[0])
    encode = sentence_encoder(config.embedder, progress)
    sizes = ConversationConfig(
        dataset=config.dataset,
        model=config.model,
        out=Path(),  # nothing is written
        methods="epicache",
        budget=f"{config.compression}x",
        max_tokens=config.tokens,
    )
    rows: list[dict[str, float]] = []
    for conversation in conversations:
        talk = place(sizes, conversation, tokenizer, encode, 1 << 30)
        rows += _measured(config, talk, tokenizer, encode)
        progress(f"{talk.conversation.id}: {len(rows)} questions so far")
    if not rows:
        raise EvalError("no question has its evidence in front of the tail; give more tokens")
    means = {name: round(fmean(row[name] for row in rows), 4) for name in rows[0]}
    return {
        "n": len(rows),
        **means,
        "config": asdict(config),
        "versions": versions_of("sentence-transformers", "scikit-learn", "bm25s"),
    }


def _measured(
    config: MatchingConfig, talk: Any, tokenizer: Any, encode: Any
) -> list[dict[str, float]]:
    from rag_eval.conversation.methods import SYSTEM
    from rag_pipeline.memory import MemoryConfig, Planner

    def planner(method: str = "epicache", **fields: Any) -> Planner:
        made = MemoryConfig(
            method=method,
            budget_tokens=talk.budget,
            episodes=config.episodes,
            verbatim_tokens=0,
            **fields,
        )
        return Planner(made, tokenizer, encode, context_length=1 << 30)

    one, two = (planner(merge_margin=margin, retrieved_share=0) for margin in (0.0, 2.0))
    beside = {share: planner(retrieved_share=share) for share in SHARES}
    retrieval = planner("retrieval")
    labels = one.episodes(SYSTEM, talk.history)
    per_segment = one.config.segment_utterances
    found = []
    for question in talk.conversation.questions:
        first = one.plan(SYSTEM, talk.history, question.text).candidates[0]
        tail = first.verbatim[-1][0] if first.verbatim else 1 << 30
        places = [at for at in talk.places(question) if _end(talk, at) <= tail]
        segments = [at // per_segment for at in places]
        if not places or segments[-1] >= len(labels):
            continue
        both = two.plan(SYSTEM, talk.history, question.text).candidates[0].episodes
        row = {
            "matched": fmean(labels[segment] in first.episodes for segment in segments),
            "best_two": fmean(labels[segment] in both for segment in segments),
        }
        for name, by in [
            *((f"repeated_{s}", p) for s, p in beside.items()),
            ("retrieval", retrieval),
        ]:
            shown = by.plan(SYSTEM, talk.history, question.text).candidates[0].verbatim
            row[name] = fmean(_is_shown(talk, at, shown) for at in places)
        found.append(row)
    return found


def _range(talk: Any, at: int) -> tuple[int, int]:
    where: tuple[int, int] = talk.ranges[talk.conversation.remarks[at].id]
    return where


def _end(talk: Any, at: int) -> int:
    return _range(talk, at)[1]


def _is_shown(talk: Any, at: int, shown: Sequence[tuple[int, int]]) -> bool:
    start, end = _range(talk, at)
    return any(first <= start and end <= last for first, last in shown)


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    names = [name for name in report if name not in ("n", "config", "versions")]
    lines = [f"{name:<16}{report[name]:>8.3f}" for name in names]
    config = report["config"]
    lines.append(
        f"share of evidence, {report['n']} questions, {config['conversations']} conversations of {config['tokens']} tokens, "
        f"{config['episodes']} episodes, budget 1/{config['compression']}"
    )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; returns the exit code."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.conversation_matching", __doc__)
    return run_benchmark(parser, MatchingConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())

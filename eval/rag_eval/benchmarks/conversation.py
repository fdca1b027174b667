"""What it saves to keep a long chat's KV, and what it costs in fidelity to go on with it past the window.

``python -m rag_eval.benchmarks.conversation --chats FILE --json`` (a LoCoMo file; text is made up without one)

Each chat fills a window in ``turns`` requests of one conversation, with the memory ``cached_attention``. Then

* *after eviction*: the radix tree is emptied before the last turn, whose time to first token with the stored turns
  stands against its full prefill (``turn_vs_full``; the median over chats is ``turn8_vs_full`` with eight turns);
* *past the window*: the older half is cut and the next question asked. The turns that stay are loaded at their new
  place (``moved``), or everything is prefilled (``recomputed``). Both follow the real answer: KL(recomputed || moved)
  in nats, and the answer's negative log-likelihood per token each way, and without any history.

A chat is one sample.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.conversation_chats import (
    LongChat,
    lay_out,
    make_talks,
    read_locomo,
    windows_of,
)
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_eval.metrics import answer_nll, kl_divergence, log_softmax
from rag_eval.runner.engine import start_session
from rag_eval.runner.passage import fusion_settings
from rag_eval.runner.prompts import PromptMaker
from rag_eval.runner.run import model_folder
from rag_eval.runner.session import EngineSession
from rag_pipeline import ModelTokenizer
from rag_pipeline.prompts.segments import SegmentEncoder
from rag_pipeline.protocol import LEFT_ALONE, FusionRequest, fusion_report

MEMORY = "cached_attention"
"""Conversation memory that the engine must be started with (:func:`~rag_eval.runner.passage.fusion_settings`)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConversationConfig:
    """Sizes of a run."""

    model: str = "smollm2-135m"
    """Hub id, folder, GGUF file or packaged name."""
    chats: str = ""
    """LoCoMo file; chats are made of other real text when empty."""
    limit: int = 8
    """Chats."""
    window: int = 1600
    """Tokens of a chat before it is cut."""
    turns: int = 8
    """Requests that fill it."""
    answer_tokens: int = 24
    """Teacher-forced tokens of the answer at most."""
    seed: int = 0
    """Chooses the text that is made up."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "limit", "answer_tokens")
        require_at_least(self, 2, "turns")
        require_at_least(self, 200, "window")


def turn_after_eviction(
    session: EngineSession, encoder: SegmentEncoder, chat: LongChat, *, turns: int = 8
) -> dict[str, float]:
    """Time the last of so many turns after the radix tree was emptied, with stored turns and by full prefill.

    Parameters
    ----------
    session : EngineSession
        An engine with the conversation memory :data:`MEMORY`.
    encoder : SegmentEncoder
        Of its model.
    chat : LongChat
        Its id names the conversation.
    turns : int
        Requests that the chat is said in.

    Returns
    -------
    dict
        ``loaded_s``, ``full_s``, ``ratio``, and ``loaded_tokens`` and ``prompt_tokens`` of the turn.

    Raises
    ------
    EvalError
        Nothing was loaded.
    """
    marks = [round(at * len(chat.exchanges) / turns) for at in range(1, turns + 1)]
    asked = [mark - 1 for mark in dict.fromkeys(marks) if mark]
    prompts = [lay_out(encoder, chat.exchanges[:at], chat.exchanges[at][0]) for at in asked]
    for ids, prefix_len in prompts[:-1]:
        session.prefill(ids, _fusion(chat, prefix_len))
    ids, prefix_len = prompts[-1]
    times = {}
    for name, fusion in (("full", LEFT_ALONE), ("loaded", _fusion(chat, prefix_len))):
        session.flush()
        times[name], meta = _timed(session, ids, fusion)
    report = _loaded(meta, chat)
    return {
        "loaded_s": times["loaded"],
        "full_s": times["full"],
        "ratio": times["loaded"] / times["full"],
        "loaded_tokens": report["conversation_tokens"],
        "prompt_tokens": report["prompt_tokens"],
    }


def past_the_window(
    session: EngineSession, encoder: SegmentEncoder, chat: LongChat, *, answer_tokens: int
) -> dict[str, float]:
    """Cut the older half of a chat that was just said, and follow the real answer to the next question.

    Parameters
    ----------
    session : EngineSession
        As for :func:`turn_after_eviction`.
    encoder : SegmentEncoder
        Of its model.
    chat : LongChat
        As :func:`turn_after_eviction` was given it.
    answer_tokens : int
        Tokens of the answer at most.

    Returns
    -------
    dict
        ``kl``, ``nll_moved``, ``nll_recomputed``, ``nll_without_history`` (nats per token), ``nll_ratio``,
        ``same_top`` (share of tokens), ``moved_tokens``, ``moved_s``, ``recomputed_s``, ``time_ratio``.

    Raises
    ------
    EvalError
        No turn was loaded at another place.
    """
    question, answer = chat.following
    gold = encoder.tokenizer.encode(answer)[:answer_tokens]
    left = chat.exchanges[len(chat.exchanges) // 2 :]
    ids, prefix_len = lay_out(encoder, left, question)
    alone, _ = lay_out(encoder, (), question)
    fusion = _fusion(chat, prefix_len)
    session.flush()
    recomputed_s, _ = _timed(session, ids, LEFT_ALONE)
    session.flush()
    moved_s, meta = _timed(session, ids, fusion)
    report = _loaded(meta, chat)
    if not report.get("moved_tokens"):
        raise EvalError(f"chat {chat.id}: no turn was loaded at another place")
    rows = {}
    for name, prompt, asked in (
        ("recomputed", ids, LEFT_ALONE),
        # What was moved is stored where it stands now: the same KV, bit for bit.
        ("moved", ids, fusion),
        ("without_history", alone, LEFT_ALONE),
    ):
        session.flush()
        logits, meta = session.force(prompt, gold, asked)
        rows[name] = log_softmax(logits)
        if asked is fusion:
            _loaded(meta, chat)
    nll = {name: answer_nll(log_probs, gold) for name, log_probs in rows.items()}
    one, two = rows["recomputed"], rows["moved"]
    return {
        "kl": float(kl_divergence(one, two).mean()),
        "nll_moved": nll["moved"],
        "nll_recomputed": nll["recomputed"],
        "nll_without_history": nll["without_history"],
        "nll_ratio": nll["moved"] / nll["recomputed"],
        "same_top": float((one.argmax(-1) == two.argmax(-1)).mean()),
        "moved_tokens": report["moved_tokens"],
        "moved_s": moved_s,
        "recomputed_s": recomputed_s,
        "time_ratio": moved_s / recomputed_s,
    }


def run(config: ConversationConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Run the benchmark in one engine.

    Returns
    -------
    dict
        ``turn_vs_full`` and ``past_the_window``, each with every figure's ``n``, ``mean``, ``sem``, ``median``,
        ``min`` and ``max`` over chats; ``turn_name``, ``config``, ``versions``.
    """
    model, vocabulary = model_folder(config.model, progress)
    maker = PromptMaker(model, gold_tokens=1)
    encoder = SegmentEncoder(ModelTokenizer.load(model))
    talks = (
        read_locomo(Path(config.chats))
        if config.chats
        else make_talks(config.limit, config.window // 20, config.seed)
    )
    chats = windows_of(
        talks, maker.encode, tokens=config.window, least=config.turns, limit=config.limit
    )
    kept: list[dict[str, float]] = []
    cut: list[dict[str, float]] = []
    with fusion_settings(conversation_memory=MEMORY, background=False):
        session = start_session(maker, vocabulary, {})
    try:
        with keep_measured(lambda: cut) as end:
            for number, chat in enumerate([chats[0], *chats]):
                name = dataclasses.replace(chat, id=f"{chat.id}-{number}")
                one = turn_after_eviction(session, encoder, name, turns=config.turns)
                two = past_the_window(session, encoder, name, answer_tokens=config.answer_tokens)
                progress(f"chat {chat.id}: {one['ratio']:.2f} of full prefill, KL {two['kl']:.4f}")
                if number:  # the first one warms up
                    kept.append(one)
                    cut.append(two)
    finally:
        session.close()
    return {
        f"turn{config.turns}_vs_full": _spread(kept)["ratio"],
        "after_eviction": _spread(kept),
        "past_the_window": _spread(cut),
        "config": dataclasses.asdict(config),
        "versions": versions_of("python", "sglang", "torch", "rag-pipeline"),
    } | end.report()


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = []
    for part in ("after_eviction", "past_the_window"):
        lines.append(part.replace("_", " "))
        lines += [
            f"  {name:20} mean {row['mean']:10.4f} +- {row['sem']:.4f}   median {row['median']:10.4f}"
            f"   {row['min']:.4f} to {row['max']:.4f}   n={row['n']}"
            for name, row in report[part].items()
        ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m rag_eval.benchmarks.conversation``."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.conversation", __doc__)
    return run_benchmark(parser, ConversationConfig, run, table, words)


def _fusion(chat: LongChat, prefix_len: int) -> FusionRequest:
    return FusionRequest(policy="reuse", conversation=f"bench-{chat.id}", prefix_len=prefix_len)


def _timed(
    session: EngineSession, ids: Sequence[int], fusion: FusionRequest
) -> tuple[float, dict[str, Any]]:
    began = time.perf_counter()
    answer = session.prefill(ids, fusion)
    return time.perf_counter() - began, answer["meta_info"]


def _loaded(meta: dict[str, Any], chat: LongChat) -> dict[str, Any]:
    report = fusion_report(meta) or {}
    if not report.get("conversation_tokens"):
        raise EvalError(
            f"chat {chat.id}: no turn was loaded (fallback {report.get('fallback')!r}); start the engine with "
            f"the conversation memory {MEMORY}"
        )
    return dict(report)


def _spread(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        found[name] = {
            "n": len(values),
            "mean": statistics.fmean(values),
            "sem": float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0,
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
    return found


if __name__ == "__main__":
    sys.exit(main())

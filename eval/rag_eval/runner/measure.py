"""One example through every mode, in one engine, with one reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rag_eval.metrics import (
    answer_nll,
    exact_match,
    first_line,
    kl_divergence,
    log_softmax,
    parts_found,
    rouge_l,
    token_f1,
)
from rag_eval.metrics.distributions import Float64
from rag_eval.runner.modes import FULL, PREFIX, Mode
from rag_eval.runner.prompts import EvalPrompt, titles_of
from rag_eval.runner.session import EngineSession, Served

SeenBefore = Literal["alone", "permuted"]
SEEN_BEFORE: tuple[SeenBefore, ...] = ("alone", "permuted")

AGREE_TOKENS = 8
"""Greedy answers count as the same when so many first tokens are equal: later on a single early
tie makes any two runs differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    served: Served
    forced: Float64
    forced_usage: dict[str, Any]


def measure_example(
    session: EngineSession,
    prompt: EvalPrompt,
    modes: Sequence[Mode],
    *,
    max_new_tokens: int,
    turn: int,
    with_noise_floor: bool,
    seen_before: SeenBefore = "alone",
) -> dict[str, Any]:
    """Measure one example.

    Chunk KV is built once and the full-prefill reference is computed once. Order: chunks are
    built behind the shared prefix (so the radix tree holds prefix and first chunk, as after any
    earlier prompt), then the fused modes (they publish nothing exact beyond that), then
    ``prefix``, and after a flush ``full``.

    Parameters
    ----------
    session : EngineSession
        Engine under test.
    prompt : EvalPrompt
        Prompt and gold answer.
    modes : sequence of Mode
        Modes asked for, ``full`` among them.
    max_new_tokens : int
        Length of the greedy answer.
    turn : int
        Number of the example; fused modes take turns at going first.
    with_noise_floor : bool
        Whether to compute the full prefill a second time in another batching.
    seen_before : SeenBefore
        What the radix tree holds when a mode's turn comes. ``alone``: every chunk behind the
        shared prefix, so whichever comes first is an exact prefix hit (the kindest case for
        ``prefix``). ``permuted``: one earlier prompt with the chunks in another order.

    Returns
    -------
    dict
        JSON-ready record.
    """
    fused = [mode for mode in modes if mode.fused]
    shift = turn % len(fused) if fused else 0
    names = {mode.name for mode in modes}
    outcomes: dict[str, _Outcome] = {}

    session.flush()
    if fused or PREFIX in names:
        session.build_chunks(prompt, store=bool(fused))
        if seen_before == "permuted":
            session.flush()
            session.prefill(prompt.rotated().input_ids)
    for mode in fused[shift:] + fused[:shift]:
        outcomes[mode.name] = _serve(session, prompt, mode, max_new_tokens)
    if PREFIX in names:
        outcomes[PREFIX] = _serve(session, prompt, Mode(name=PREFIX), max_new_tokens)
    session.flush()
    outcomes[FULL] = _serve(session, prompt, Mode(name=FULL), max_new_tokens)

    reference = outcomes[FULL]
    record: dict[str, Any] = {
        "id": prompt.example.id,
        "question": prompt.example.question,
        "answers": list(prompt.example.answers),
        "prompt_tokens": len(prompt.input_ids),
        "chunk_tokens": [len(chunk.ids) for chunk in prompt.chunks],
        "titles": titles_of(prompt.chunks),
        "gold_tokens": len(prompt.gold_ids),
        "modes": {
            mode.name: _row(session, prompt, outcomes[mode.name], reference) for mode in modes
        },
    }
    if with_noise_floor:
        record["noise_floor"] = _noise_floor(session, prompt, reference)
    return record


def _serve(session: EngineSession, prompt: EvalPrompt, mode: Mode, max_new_tokens: int) -> _Outcome:
    served = session.serve(prompt, mode, max_new_tokens=max_new_tokens)
    logits, usage = session.follow_gold(prompt, mode)
    return _Outcome(served=served, forced=log_softmax(logits), forced_usage=usage)


def _noise_floor(
    session: EngineSession, prompt: EvalPrompt, reference: _Outcome
) -> dict[str, float]:
    """Prefill the first half alone, then the rest behind it: the same sums in other shapes."""
    session.flush()
    session.prefill(prompt.input_ids[: len(prompt.input_ids) // 2])
    logits, _ = session.follow_gold(prompt, Mode(name=PREFIX))
    again = log_softmax(logits)
    divergence = kl_divergence(reference.forced, again)
    gold = prompt.gold_ids
    return {
        "kl_first": float(divergence[0]),
        "kl_answer": float(divergence.mean()),
        "answer_nll_abs": abs(answer_nll(again, gold) - answer_nll(reference.forced, gold)),
        "agree_full": float(np.array_equal(again.argmax(-1), reference.forced.argmax(-1))),
    }


def _row(
    session: EngineSession, prompt: EvalPrompt, outcome: _Outcome, reference: _Outcome
) -> dict[str, Any]:
    example, served = prompt.example, outcome.served
    answer = first_line(session.decode(served.output_ids))
    divergence = kl_divergence(reference.forced, outcome.forced)
    if not math.isfinite(float(divergence.mean())):
        raise RuntimeError(f"KL of {example.id} is not finite; the engine's logits hold nan or inf")
    if example.answer_parts:
        f1 = parts_found(session.decode(served.output_ids), example.answer_parts)
        em = float(f1 == 1.0)
    else:
        f1 = token_f1(answer, example.answers)
        em = exact_match(answer, example.answers)
    same = served.output_ids[:AGREE_TOKENS] == reference.served.output_ids[:AGREE_TOKENS]
    return {
        "answer": answer,
        "f1": f1,
        "em": em,
        "rouge_l": rouge_l(answer, example.answers),
        "answer_nll": answer_nll(outcome.forced, prompt.gold_ids),
        "kl_first": float(divergence[0]),
        "kl_answer": float(divergence.mean()),
        "agree_full": float(same),
        "gold_agree": float(np.array_equal(outcome.forced.argmax(-1), reference.forced.argmax(-1))),
        "ttft_s": served.ttft_s,
        "ttft_cpu_s": served.ttft_cpu_s,
        **(served.usage or outcome.forced_usage),
        "forced_usage": outcome.forced_usage,
    }

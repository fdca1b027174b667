"""One question under one method: what its cache holds of the evidence, the gold answer's likelihood, the answer, time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rag_eval.conversation.methods import Laid
from rag_eval.conversation.recall import Range, evidence_recall, outside
from rag_eval.datasets import Question
from rag_eval.errors import ModeUnavailableError
from rag_eval.metrics import answer_nll, first_line, locomo_f1, log_softmax
from rag_eval.runner.session import EngineSession
from rag_pipeline.protocol import fusion_report, memory_report


def measure_question(
    session: EngineSession,
    laid: Laid,
    question: Question,
    evidence: Sequence[Range],
    gold_ids: Sequence[int],
    *,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Answer once greedily, timed, and once along the gold answer.

    Parameters
    ----------
    session : EngineSession
        The engine, with the method's records.
    laid : Laid
        The question's prompt.
    question : Question
        The question.
    evidence : sequence of Range
        True positions of its evidence.
    gold_ids : sequence of int
        Tokens of the gold answer.
    max_new_tokens : int
        Length of the greedy answer.

    Returns
    -------
    dict
        Of the question: ``evidence_recall``, ``nll``, ``f1``, ``answer``, ``turn_s``, ``turn_cpu_s``, ``plan_s``,
        ``plan_cpu_s``, ``prompt_tokens``, ``peak_tokens``, ``slots``, ``tail_tokens``, ``missed``, ``episodes``.

    Raises
    ------
    ModeUnavailableError
        The engine says nothing of the record that the prompt asks for.
    """
    candidate = laid.candidate
    plain = candidate.request()
    served = session.answer(plain.input_ids, plain.fusion, max_new_tokens=max_new_tokens)
    parts = outside(evidence, candidate.verbatim)
    asked = candidate.request(spans=parts if candidate.slots else ())
    logits, meta = session.force(asked.input_ids, gold_ids, asked.fusion)
    told = memory_report(fusion_report(meta))
    if candidate.slots and not told:
        raise ModeUnavailableError(
            "the engine does not report a memory record; start it with the plugin and fusion on"
        )
    missed = bool(told.get("missed"))
    shares = [] if missed or not candidate.slots else list(told.get("kept_share") or [])
    if candidate.slots and not missed and len(shares) != len(parts):
        raise RuntimeError(
            f"the engine told {len(shares)} kept shares of {len(parts)} spans: {told}"
        )
    answer = first_line(session.decode(served.output_ids))
    nll = answer_nll(log_softmax(logits), gold_ids)
    if not math.isfinite(nll):
        raise RuntimeError(f"the likelihood of {question.id} is not finite")
    return {
        "category": question.category,
        "evidence_recall": evidence_recall(evidence, parts, shares),
        "evidence_tokens": sum(end - start for start, end in evidence),
        "nll": nll,
        "gold_tokens": len(gold_ids),
        "f1": locomo_f1(answer, question.answer, question.category),
        "answer": answer,
        "turn_s": served.ttft_s,
        "turn_cpu_s": served.ttft_cpu_s,
        "plan_s": laid.plan_s,
        "plan_cpu_s": laid.plan_cpu_s,
        "prompt_tokens": len(candidate.input_ids),
        "peak_tokens": len(candidate.input_ids) + len(served.output_ids),
        "slots": candidate.slots,
        "tail_tokens": candidate.tail_len,
        "missed": int(missed),
        "episodes": list(candidate.episodes),
    }

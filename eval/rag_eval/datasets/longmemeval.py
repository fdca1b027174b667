"""LongMemEval (Wu et al. 2025, arXiv 2410.10813): a question and the sessions with an assistant that lie before it.

Each record is a conversation of its own with one question. Evidence are the turns marked ``has_answer``; where none is
marked, all turns of ``answer_session_ids``. Questions to abstain from (``..._abs``) have no place of an answer and are
left out, as in the published retrieval scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rag_eval.datasets.talks import ADVERSARIAL, Conversation, Question, Remark, make_conversation


def parse_longmemeval(record: Mapping[str, Any], fallback_id: str) -> Conversation:
    """Read one record.

    Raises
    ------
    KeyError, TypeError, ValueError
        Another format.
    """
    name = str(record.get("question_id", fallback_id))
    sessions = list(
        zip(
            record["haystack_dates"],
            record["haystack_session_ids"],
            record["haystack_sessions"],
            strict=True,
        )
    )
    # The file with the evidence sessions alone is not in order; dates are written year first.
    sessions.sort(key=lambda session: str(session[0]))
    wanted = set(map(str, record["answer_session_ids"]))
    remarks: list[Remark] = []
    marked: list[str] = []
    of_sessions: list[str] = []
    for place, (date, session, turns) in enumerate(sessions):
        for number, turn in enumerate(turns):
            opening = f"({date})\n" if number == 0 else ""
            # One session may stand in a history twice.
            name_of = f"{place}:{session}:{number}"
            role = turn["role"]
            if role not in ("user", "assistant"):
                raise ValueError(f"role {role!r}")
            remarks.append(
                Remark(id=name_of, role=role, text=f"{opening}{str(turn['content']).strip()}")
            )
            if turn.get("has_answer"):
                marked.append(name_of)
            if str(session) in wanted:
                of_sessions.append(name_of)
    if name.endswith("_abs"):
        return make_conversation(name, remarks, [], {ADVERSARIAL: 1})
    date = record.get("question_date")
    question = Question(
        id=name,
        text=f"({date}) {record['question']}" if date else str(record["question"]),
        answer=str(record["answer"]).strip(),
        category=str(record["question_type"]),
        evidence=tuple(marked or of_sessions),
    )
    return make_conversation(name, remarks, [question])

"""LoCoMo (Maharana et al. 2024, arXiv 2402.17753): two friends, dated sessions, questions with evidence.

Adversarial questions (category 5) ask for what was never said. The published score of those is whether the model
chooses "not mentioned" of two options, which measures neither memory nor the likelihood of an answer; they are left
out here and counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rag_eval.datasets.talks import (
    ADVERSARIAL,
    Conversation,
    Question,
    Remark,
    Role,
    make_conversation,
)

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}

_SESSION = re.compile(r"session_(\d+)")
_EVIDENCE = re.compile(r"D:?(\d+):(\d+)")


def parse_locomo(sample: Mapping[str, Any], fallback_id: str) -> Conversation:
    """Read one sample of a LoCoMo file.

    Raises
    ------
    KeyError, TypeError, ValueError
        Another format.
    """
    name = str(sample.get("sample_id", fallback_id))
    talk = sample["conversation"]
    questions, left_out = read_questions(name, sample["qa"])
    remarks = read_sessions(talk, first=str(talk["speaker_a"]), text_field="text")
    return make_conversation(name, remarks, questions, left_out)


def read_sessions(talk: Mapping[str, Any], *, first: str, text_field: str) -> list[Remark]:
    """Utterances of all sessions ``session_N``, ordered by N; the date of a session opens its first one.

    Parameters
    ----------
    talk : mapping
        Sessions and their dates ``session_N_date_time``.
    first : str
        Speaker on the user's side; the other one is on the assistant's.
    text_field : str
        Field of an utterance's text.
    """
    remarks: list[Remark] = []
    for date, lines in ordered_sessions(talk):
        opening = f"({date})\n" if date else ""
        for said in lines:
            speaker, text = str(said["speaker"]), str(said[text_field] or "").strip()
            caption = said.get("blip_caption")
            if caption:
                text = f"{text} [shares a picture: {caption}]".strip()
            role: Role = "user" if speaker == first else "assistant"
            remark = Remark(
                id=evidence_ids([said["dia_id"]])[0], role=role, text=f"{opening}{speaker}: {text}"
            )
            remarks.append(remark)
            opening = ""
    return remarks


def ordered_sessions(talk: Mapping[str, Any]) -> list[tuple[object, Sequence[Mapping[str, Any]]]]:
    """Date and utterances of each session, by its number; a date without a session is passed over."""
    numbers = sorted(int(found[1]) for key in talk if (found := _SESSION.fullmatch(key)))
    return [(talk.get(f"session_{n}_date_time"), talk[f"session_{n}"]) for n in numbers]


def read_questions(
    name: str, entries: Sequence[Mapping[str, Any]]
) -> tuple[list[Question], dict[str, int]]:
    """Questions of a sample, and numbers of those that are left out by reason."""
    questions: list[Question] = []
    adversarial = 0
    for number, entry in enumerate(entries):
        category = int(entry["category"])
        answer = entry.get("answer")
        if category == 5 or answer is None or not str(answer).strip():
            adversarial += 1
            continue
        questions.append(
            Question(
                id=f"{name}/{number}",
                text=str(entry["question"]).strip(),
                answer=str(answer).strip(),
                category=CATEGORIES.get(category, str(category)),
                evidence=tuple(dict.fromkeys(evidence_ids(entry.get("evidence") or []))),
            )
        )
    return questions, {ADVERSARIAL: adversarial} if adversarial else {}


def evidence_ids(given: Sequence[object]) -> list[str]:
    """Ids ``D<session>:<utterance>`` in one spelling; the files also have ``D:11:26`` and two ids in one text.

    Anything else stays as it is, so that no utterance is found for it.
    """
    found: list[str] = []
    for text in map(str, given):
        pairs = _EVIDENCE.findall(text)
        found += [f"D{int(session)}:{int(turn)}" for session, turn in pairs] or [text]
    return found

"""Files of long conversations: three published formats, what is left out of them, and the cut to a length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rag_eval.datasets import Conversation, read_conversations
from rag_eval.datasets.filler import paragraphs, sentences
from rag_eval.datasets.talks import ADVERSARIAL, CUT_OFF, NO_EVIDENCE
from rag_eval.errors import EvalError

TEXTS = [line for text in paragraphs()[:6] for line in sentences(text)[:2]]
"""Neutral lines of the generator, as what the speakers say."""


def said(session: int, turns: int, field: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "speaker": ("Ann", "Ben")[turn % 2],
            "dia_id": f"D{session}:{turn + 1}",
            field: TEXTS[(session * 3 + turn) % len(TEXTS)],
            **more,
        }
        for turn in range(turns)
    ]


def asked(category: int, evidence: list[str], **answer: Any) -> dict[str, Any]:
    return {"question": "Which one?", "category": category, "evidence": evidence, **answer}


def locomo() -> list[dict[str, Any]]:
    talk = {
        "speaker_a": "Ann",
        "speaker_b": "Ben",
        "session_10_date_time": "noon on 2 May",
        "session_10": said(10, 2, "text"),
        "session_2_date_time": "noon on 1 May",
        "session_2": said(2, 3, "text", blip_caption="a lake"),
        # The files have dates of sessions that never took place.
        "session_11_date_time": "noon on 3 May",
    }
    questions = [
        asked(1, ["D2:1; D10:2"], answer="north, south"),
        asked(2, ["D:2:02"], answer=2022),
        asked(5, ["D2:1"], adversarial_answer="never said"),
        asked(3, ["D"], answer="yes; surely"),
        asked(4, [], answer="one"),
        asked(4, ["D10:9"], answer="one"),
    ]
    return [{"sample_id": "talk-1", "conversation": talk, "qa": questions}]


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def only(found: list[Conversation]) -> Conversation:
    (one,) = found
    return one


def test_locomo_is_read_in_the_order_of_its_sessions(tmp_path: Path) -> None:
    talk = only(read_conversations(written(tmp_path / "locomo.json", locomo())))
    assert talk.id == "talk-1"
    assert [remark.id for remark in talk.remarks] == ["D2:1", "D2:2", "D2:3", "D10:1", "D10:2"]
    assert [remark.role for remark in talk.remarks] == [
        "user",
        "assistant",
        "user",
        "user",
        "assistant",
    ]
    first, second, *_, later, _ = talk.remarks
    assert first.text == f"(noon on 1 May)\nAnn: {TEXTS[6]} [shares a picture: a lake]"
    assert second.text.startswith("Ben: ")
    assert later.text.startswith("(noon on 2 May)\nAnn: ")


def test_questions_of_locomo_without_answer_or_evidence_are_counted_and_left_out(
    tmp_path: Path,
) -> None:
    talk = only(read_conversations(written(tmp_path / "locomo.json", locomo())))
    assert [(q.category, q.answer, q.evidence) for q in talk.questions] == [
        ("multi-hop", "north, south", ("D2:1", "D10:2")),
        ("temporal", "2022", ("D2:2",)),
    ]
    assert [q.id for q in talk.questions] == ["talk-1/0", "talk-1/1"]
    assert talk.left_out == {ADVERSARIAL: 1, NO_EVIDENCE: 3}


def test_a_folder_of_realtalk_files_is_one_data_set(tmp_path: Path) -> None:
    for number in (2, 1):
        talk = {
            "name": {"speaker_1": "Ben", "speaker_2": "Ann"},
            "session_1": said(1, 3, "clean_text", date_time="29.12.2023, 14:05:00"),
            "session_1_date_time": "29.12.2023, 14:05:00",
            "events_session_1": {"agent_a": []},
            "qa": [asked(1, ["D1:3"], answer="one")],
        }
        written(tmp_path / f"Chat_{number}.json", talk)
    first, second = read_conversations(tmp_path)
    assert (first.id, second.id) == ("Chat_1", "Chat_2")
    assert [remark.role for remark in first.remarks] == ["assistant", "user", "assistant"]
    assert first.remarks[0].text == f"(29.12.2023, 14:05:00)\nAnn: {TEXTS[3]}"
    assert first.questions[0].evidence == ("D1:3",)


def longmemeval(name: str, *, marked: bool = True) -> dict[str, Any]:
    def session(number: int, mark: bool) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = [
            {"role": ("user", "assistant")[turn % 2], "content": TEXTS[number + turn]}
            for turn in range(2)
        ]
        if mark:
            turns[0]["has_answer"] = True
        return turns

    return {
        "question_id": name,
        "question_type": "multi-session",
        "question": "Which one?",
        "answer": 4,
        "question_date": "2023/06/01 (Thu) 09:00",
        "haystack_session_ids": ["late", "early"],
        "haystack_dates": ["2023/05/30 (Tue) 10:00", "2023/05/02 (Tue) 23:15"],
        "haystack_sessions": [session(1, marked), session(0, False)],
        "answer_session_ids": ["late"],
    }


def test_longmemeval_is_sorted_by_date_and_its_marked_turns_are_evidence(tmp_path: Path) -> None:
    talk = only(read_conversations(written(tmp_path / "oracle.json", [longmemeval("q1")])))
    assert talk.remarks[0].text == f"(2023/05/02 (Tue) 23:15)\n{TEXTS[0]}"
    (question,) = talk.questions
    assert question.text == "(2023/06/01 (Thu) 09:00) Which one?"
    assert question.answer == "4"
    places = {remark.id: index for index, remark in enumerate(talk.remarks)}
    assert [places[one] for one in question.evidence] == [2]


def test_longmemeval_without_marks_takes_the_whole_session(tmp_path: Path) -> None:
    file = written(tmp_path / "m.json", [longmemeval("q1", marked=False)])
    talk = only(read_conversations(file))
    places = {remark.id: index for index, remark in enumerate(talk.remarks)}
    assert [places[one] for one in talk.questions[0].evidence] == [2, 3]


def test_a_question_to_abstain_from_is_left_out(tmp_path: Path) -> None:
    talk = only(read_conversations(written(tmp_path / "m.json", [longmemeval("q1_abs")])))
    assert talk.questions == ()
    assert talk.left_out == {ADVERSARIAL: 1}


def test_a_cut_keeps_whole_utterances_of_one_end_and_their_questions(tmp_path: Path) -> None:
    talk = only(read_conversations(written(tmp_path / "locomo.json", locomo())))
    lengths = [10, 20, 30, 40, 50]
    first = talk.cut(lengths, 99, "first")
    assert [remark.id for remark in first.remarks] == ["D2:1", "D2:2", "D2:3"]
    assert [q.id for q in first.questions] == ["talk-1/1"]
    assert first.left_out[CUT_OFF] == 1
    newest = talk.cut(lengths, 120, "newest")
    assert [remark.id for remark in newest.remarks] == ["D2:3", "D10:1", "D10:2"]
    assert newest.questions == ()
    assert talk.cut(lengths, 150, "newest") == talk
    with pytest.raises(EvalError, match=r"talk-1 fits into 9 tokens; give a larger --max-tokens"):
        talk.cut(lengths, 9, "first")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"a": 1, "b": 2}], "record 1 is in no known format (its fields: a, b); known: LoCoMo"),
        ([3], "record 1 is int, expected an object"),
        ([*locomo(), {**locomo()[0], "conversation": {}}], "record 2 (LoCoMo) lacks the field 'sp"),
        ([*locomo(), *locomo()], "holds 2 conversations 'talk-1'"),
        ([{**longmemeval("q"), "haystack_dates": []}], "record 1 (LongMemEval) is not well formed"),
    ],
)
def test_a_file_of_another_format_is_refused_in_one_line(
    tmp_path: Path, content: object, told: str
) -> None:
    with pytest.raises(EvalError) as refused:
        read_conversations(written(tmp_path / "talks.json", content))
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"holds no \.json file"):
        read_conversations(tmp_path)

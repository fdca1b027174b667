"""Matching of questions to episodes and messages, measured without a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rag_eval import EvalError
from rag_eval.benchmarks import conversation_matching
from rag_eval.benchmarks.conversation_matching import MatchingConfig, run

TOPICS = {
    "garden": "We planted {n} roses and tomatoes in the raised bed of the garden behind the house.",
    "music": "The choir sang {n} songs by Bach, and the violin was out of tune for most of them.",
    "travel": "The night train to Lisbon left from platform {n} and the hotel was by the harbour.",
    "cooking": "I baked {n} loaves of sourdough bread and cooked a lentil soup with lemon.",
}


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """One LoCoMo conversation about four topics, with a question about each remark of some."""
    session, asked = [], []
    for topic, text in TOPICS.items():
        for n in range(16):
            place = f"D1:{len(session) + 1}"
            session.append(
                {"speaker": ("Ann", "Ben")[n % 2], "dia_id": place, "text": text.format(n=n + 40)}
            )
            if n == 3:
                asked.append(
                    {"question": f"What was said of the {topic}: {text.format(n=n + 40)[:40]}?", "answer": str(n + 40),
                     "evidence": [place], "category": 4}
                )  # fmt: skip
    talk = {"speaker_a": "Ann", "speaker_b": "Ben", "session_1": session}
    talk["session_1_date_time"] = "1:00 pm on 8 May, 2023"
    file = tmp_path / "talks.json"
    file.write_text(json.dumps([{"sample_id": "c", "conversation": talk, "qa": asked}]))
    return file


def test_evidence_is_found_in_its_episode_and_more_of_it_with_more_room(
    talks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", str(talks), "--tokens", "2048", "--json"]
    assert conversation_matching.main(words) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["n"] >= 2
    assert report["matched"] == report["best_two"] == 1
    shares = [report[name] for name in ("repeated_0.125", "repeated_0.25", "repeated_0.5")]
    assert shares == sorted(shares)
    assert report["retrieval"] == 1
    assert "share of evidence" in conversation_matching.table(report)


def test_without_a_question_or_a_file_it_says_so_in_one_line(talks: Path) -> None:
    with pytest.raises(EvalError, match="dataset is empty"):
        MatchingConfig()
    with pytest.raises(EvalError, match="give more tokens"):
        run(MatchingConfig(dataset=str(talks), tokens=256))

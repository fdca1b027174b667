"""Evaluation of memories in a real engine: what each method keeps, and the whole history as the measure of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_eval.command import no_progress
from rag_eval.conversation.config import ConversationConfig
from rag_eval.conversation.run import Measuring
from rag_eval.conversation.talk import Talk, place
from rag_eval.datasets.filler import paragraphs
from rag_eval.datasets.talks import Conversation, Question, Remark
from rag_eval.runner.predictions import RunFolder
from rag_eval.runner.prompts import PromptMaker
from rag_pipeline import ModelTokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

REMARKS = 24


def conversation() -> Conversation:
    """Neutral paragraphs said in turns; one is asked for at the beginning, in the middle, and at the end."""
    remarks = tuple(
        Remark(id=f"D1:{turn}", role=("user", "assistant")[turn % 2], text=text[:120])
        for turn, text in enumerate(paragraphs()[:REMARKS])
    )
    questions = tuple(
        Question(
            id=f"q{turn}",
            text=f"What came after {remarks[turn].text[:40]}?",
            answer=remarks[turn].text[40:80],
            category="single-hop",
            evidence=(remarks[turn].id,),
        )
        for turn in (2, REMARKS // 2, REMARKS - 1)
    )
    return Conversation(id="talk", remarks=remarks, questions=questions)


def vectors(texts: list[str]) -> Any:
    """Unit vectors that depend on the letters of a text alone."""
    counts = np.array([[text.count(letter) for letter in "abcdefghijklmnop"] for text in texts])
    found = counts.astype(np.float32) + 1
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def measured(
    tiny_session: Any, tiny_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, dict[str, Any]]]:
    """Records by method at budget, and question; with a budget above the history under ``whole``."""
    tokenizer = ModelTokenizer.load(tiny_path)
    maker = PromptMaker(tiny_path, gold_tokens=6)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for budget, methods in (("128", "full,streaming,epicache,retrieval"), ("8000", "epicache")):
        folder = tmp_path_factory.mktemp("run")
        config = ConversationConfig(
            dataset="",
            model=str(tiny_path),
            out=folder,
            methods=methods,
            budget=budget,
            max_new_tokens=4,
            gold_tokens=6,
            memory={"block_tokens": 64, "probe_tokens": 64, "verbatim_tokens": 0, "episodes": 2},
        )
        talk: Talk = place(config, conversation(), tokenizer, vectors, 8192)
        run = RunFolder(folder, config.identity(), {})
        measuring = Measuring(config, tiny_session, maker, vectors, run, no_progress)
        for name in config.method_names:
            measuring.measure(talk, name, talk.conversation.questions)
            rows = {q.id: run.records[f"{q.id}|{name}"] for q in talk.conversation.questions}
            built = run.records[f"talk|{name}|build"]
            found[name if budget == "128" else "whole"] = rows | {"build": built}
    return found


def test_the_whole_history_holds_all_evidence(measured: Any) -> None:
    assert all(measured["full"][one]["evidence_recall"] == 1.0 for one in ("q2", "q12", "q23"))
    built = measured["full"]["build"]
    assert built["build_tokens"] >= built["history_tokens"]


def test_a_record_with_room_for_everything_answers_as_the_whole_history(measured: Any) -> None:
    for one in ("q2", "q12", "q23"):
        whole, full = measured["whole"][one], measured["full"][one]
        assert whole["slots"] > 0
        assert not whole["missed"]
        assert whole["evidence_recall"] == 1.0
        assert whole["nll"] == pytest.approx(full["nll"], abs=1e-3)
        assert whole["answer"] == full["answer"]


def test_a_window_keeps_what_was_said_last(measured: Any) -> None:
    rows = measured["streaming"]
    assert not any(rows[one]["missed"] for one in ("q2", "q12", "q23"))
    assert rows["q23"]["evidence_recall"] == 1.0
    assert rows["q2"]["evidence_recall"] < 0.5
    assert rows["build"]["failed"] == 0
    assert rows["build"]["peak_tokens"] < measured["full"]["q2"]["peak_tokens"]


def test_episodes_keep_a_share_and_charge_for_their_probes(measured: Any) -> None:
    rows = measured["epicache"]
    assert rows["build"]["records"] >= 1
    assert rows["build"]["probe_tokens"] > 0
    assert rows["build"]["build_tokens"] > measured["streaming"]["build"]["build_tokens"]
    assert all(0 <= rows[one]["evidence_recall"] <= 1 for one in ("q2", "q12", "q23"))
    assert rows["q2"]["in_episode"] in (0.0, 1.0)


def test_retrieval_stays_within_its_budget(measured: Any) -> None:
    row = measured["retrieval"]["q2"]
    assert row["slots"] == 0
    assert row["tail_tokens"] <= 128 + 2 * 64

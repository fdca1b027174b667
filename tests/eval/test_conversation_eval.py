"""Evaluation of memories without an engine: settings, recall, the numbers of a run, its table, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag_eval.conversation.command import default_folder, main
from rag_eval.conversation.config import ConversationConfig
from rag_eval.conversation.recall import evidence_recall, outside
from rag_eval.conversation.summary import summarise
from rag_eval.conversation.table import table
from rag_eval.errors import EvalError


def config(**changes: Any) -> ConversationConfig:
    return ConversationConfig(**({"dataset": "d", "model": "m", "out": Path("o")} | changes))


@pytest.mark.parametrize(("given", "budget"), [("2048", 2048), ("4x", 1000), ("2.5x", 1600)])
def test_a_budget_is_tokens_or_a_share_of_the_history(given: str, budget: int) -> None:
    assert config(budget=given).budget_for(4000) == budget


@pytest.mark.parametrize("given", ["", "x", "0x", "0.5x", "15", "-3", "4 x", "nanx"])
def test_another_budget_is_refused(given: str) -> None:
    with pytest.raises(EvalError, match="give tokens, 16 or more, or 4x"):
        config(budget=given)


def test_a_method_keeps_the_options_of_its_rule() -> None:
    names = config(methods="full, snapkv:window=64,kernel=7,epicache").method_names
    assert names == ["full", "snapkv:window=64,kernel=7", "epicache"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": "full,full"}, "name each method once"),
        ({"methods": " , "}, "name each method once"),
        ({"cut": "middle"}, "allowed: first, newest"),
        ({"limit_questions": 0}, "limit_questions is 0"),
        ({"max_tokens": 8}, "max_tokens is 8"),
        ({"memory": {"budget_tokens": 5}}, "budget_tokens is given by its own option"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(EvalError, match=told):
        config(**changes)


def test_more_questions_and_methods_go_on_in_the_same_folder() -> None:
    first = config(methods="full", limit_questions=2)
    assert default_folder(first) == default_folder(config(methods="full,epicache"))
    assert default_folder(first) != default_folder(config(budget="4x"))
    assert default_folder(first) != default_folder(config(memory={"episodes": 2}))


def test_evidence_in_the_prompt_counts_in_full_and_the_rest_by_its_share() -> None:
    wanted = [(10, 20), (40, 50)]
    verbatim = [(0, 12), (18, 45)]
    parts = outside(wanted, verbatim)
    assert parts == [(12, 18), (45, 50)]
    # 4 + 5 tokens stand there, half of six and a fifth of five are kept.
    assert evidence_recall(wanted, parts, [0.5, 0.2]) == pytest.approx((9 + 3 + 1) / 20)
    assert evidence_recall(wanted, parts, []) == pytest.approx(9 / 20)
    assert evidence_recall(wanted, outside(wanted, [(0, 60)]), []) == 1.0
    assert outside(wanted, []) == wanted
    assert outside([(0, 10)], [(3, 5), (4, 7)]) == [(0, 3), (7, 10)]
    with pytest.raises(ValueError, match="1 kept shares for 2 spans"):
        evidence_recall(wanted, parts, [0.5])


def row(number: int, **scores: Any) -> dict[str, Any]:
    return {
        "category": ("temporal", "single-hop")[number % 2],
        "evidence_recall": 0.5,
        "nll": 2.0,
        "f1": 0.1,
        "turn_s": 0.2,
        "turn_cpu_s": 0.2,
        "plan_s": 0.01,
        "plan_cpu_s": 0.01,
        "prompt_tokens": 100,
        "peak_tokens": 110,
        "tail_tokens": 5,
        "missed": 0,
    } | scores


def built(**changes: Any) -> dict[str, Any]:
    return {
        "peak_tokens": 400,
        "build_tokens": 1000,
        "build_s": 1.0,
        "build_cpu_s": 1.0,
        "probe_tokens": 10,
        "record_tokens": 256,
        "failed": 0,
    } | changes


def rows(**scores: float) -> dict[str, dict[str, Any]]:
    return {f"q{number}": row(number, **scores) for number in range(4)}


def report() -> dict[str, Any]:
    measured = {
        "full": rows(evidence_recall=1.0, nll=2.0),
        "epicache": rows(evidence_recall=0.6, nll=2.02),
        "streaming": rows(evidence_recall=0.3, nll=2.4),
        "retrieval": rows(evidence_recall=0.4, nll=2.5),
        "keydiff": {},
    }
    measured["full"]["more"] = row(0, nll=9.0)
    builds = {name: [built()] for name in measured} | {"epicache": [built(), built(build_tokens=7)]}
    facts = {
        "dataset": "locomo",
        "model": "m",
        "budget": "4x",
        "conversations": 2,
        "history_tokens": [4000, 4100],
        "budget_tokens": [1000, 1025],
        "left_out": {"adversarial": 3},
    }
    return facts | summarise(measured, builds)


def test_methods_are_compared_over_the_questions_that_all_of_them_have() -> None:
    found = report()
    assert found["n"] == 4
    assert list(found["methods"]) == ["full", "epicache", "streaming", "retrieval"]
    epicache = found["methods"]["epicache"]
    assert found["methods"]["full"]["nll"] == 2.0
    assert (epicache["peak_tokens"], epicache["build_tokens"]) == (400, 1007)
    assert epicache["categories"]["temporal"] == {
        "n": 2,
        "evidence_recall": 0.6,
        "nll": 2.02,
        "f1": 0.1,
    }
    compared = epicache["compared"]
    assert compared["full"]["nll"]["relative"] == pytest.approx(0.01)
    assert compared["full"]["nll"]["ci95"] == pytest.approx([0.02, 0.02])
    best = compared["best_baseline"]
    assert (best["evidence_recall"]["method"], best["nll"]["method"]) == ("retrieval", "streaming")
    assert best["evidence_recall"]["ratio"] == pytest.approx(1.5)
    assert compared["best_cache"]["evidence_recall"]["method"] == "streaming"
    assert compared["best_cache"]["evidence_recall"]["ratio"] == pytest.approx(2.0)
    assert "best_baseline" not in found["methods"]["streaming"]["compared"]


def test_the_report_is_json_and_a_table() -> None:
    found = report()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = table(found)
    assert "2 conversations of 4,000 to 4,100 tokens · budget 4x (1,000 to 1,025) · n = 4" in text
    assert "left out: 3 (adversarial)" in text
    assert "epicache - full: NLL +0.0200 [+0.0200, +0.0200] (+1.0%)" in text
    assert "epicache - best baseline in evidence_recall (retrieval)" in text
    assert "0.60 / 2.02 / 0.10" in text


def test_a_run_that_measured_nothing_in_common_says_so() -> None:
    nothing = summarise(
        {"full": rows(), "epicache": {"other": row(0)}}, {"full": [], "epicache": []}
    )
    assert nothing["n"] == 0
    assert "no question was measured" in table(report() | nothing)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--budget", "2048"], "--dataset"),
        (["--dataset", "d", "--budget", "many"], "budget is 'many'; give tokens"),
        (["--dataset", "d", "--memory-arg", "episodes"], "is not NAME=JSON; write episodes=4"),
        (["--dataset", "d", "--cut", "end"], "allowed: first, newest"),
        (["--dataset", "d", "--limit-conversations", "0"], "limit_conversations is 0"),
    ],
)
def test_bad_options_end_the_command_in_one_line(
    refusal: Callable[..., str], words: list[str], told: str
) -> None:
    assert told in refusal(main, words)


def test_a_missing_file_ends_the_command_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--dataset", str(tmp_path / "no.json"), "--out", str(tmp_path / "run")]
    assert main(words) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: data set ")
    assert not (tmp_path / "run").exists()

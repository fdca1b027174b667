"""The benchmark of growing conversations without its engine: targets, text, plot, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rag_eval.benchmarks.conversation_growth import history_of, table, targets
from rag_eval.benchmarks.conversation_growth_config import GrowthConfig
from rag_eval.benchmarks.conversation_growth_plot import plot_growth
from rag_eval.errors import EvalError


def point(method: str, length: int, peak: int, turn_s: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "length": length,
        "history_tokens": length - 3,
        "peak_tokens": peak,
        "turn_s": turn_s,
        "turn_cpu_s": turn_s,
        "tail_tokens": 40.0,
        "build_tokens": length,
        "build_s": 2.0,
    } | more


POINTS = [
    point("full", 1000, 1060, 0.2, cold_turn_s=2.2),
    point("full", 2000, 2060, 0.4, cold_turn_s=4.4),
    point("full", 3800, 3860, 0.8, cold_turn_s=9.0),
    point("epicache", 1000, 1060, 0.2),
    point("epicache", 2000, 1072, 0.25),
    point("epicache", 3800, 1072, 0.25),
]


def test_targets_are_ratios_of_the_curves() -> None:
    found = targets(POINTS)
    assert found["full"] == {"memory_2n": pytest.approx(2060 / 1060, abs=1e-4)}
    assert found["epicache"] == {
        "memory_2n": pytest.approx(1072 / 1060, abs=1e-4),
        "length": 3800,
        "memory": pytest.approx(3860 / 1072, abs=1e-4),
        "turn": 3.2,
        "turn_cpu": 3.2,
        "cold_turn": 36.0,
    }
    assert targets(POINTS[3:4]) == {"epicache": {}}


def test_the_report_is_text_and_a_plot(tmp_path: Path) -> None:
    text = table({"points": POINTS, "targets": targets(POINTS)})
    assert "full            3,797         3,860    0.800    0.80     9.00" in text
    longest = [line for line in text.splitlines() if line.endswith("# 3,860")]
    assert longest[0].count("#") == 56
    assert "epicache: memory_2n 1.0113, length 3800, memory 3.6007" in text
    plot_growth(POINTS, tmp_path / "plots" / "growth.png", "tiny")
    assert (tmp_path / "plots" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["growth.png"]


def test_the_conversation_is_a_data_set_or_made_up(tmp_path: Path) -> None:
    made = history_of(GrowthConfig())
    assert [said.role for said in made[:3]] == ["user", "assistant", "user"]
    said = {"speaker": "Ann", "dia_id": "D1:1", "text": "Rain."}
    talk = {"conversation": {"speaker_a": "Ann", "session_1": [said]}, "qa": []}
    file = tmp_path / "locomo.json"
    file.write_text(json.dumps([talk]))
    (one,) = history_of(GrowthConfig(dataset=str(file)))
    assert (one.role, one.text) == ("user", "Ann: Rain.")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"lengths": "1000,x"}, "numbers of tokens, 64 or more"),
        ({"lengths": "10"}, "numbers of tokens, 64 or more"),
        ({"methods": ""}, "methods is empty"),
        ({"turns": 0}, "turns is 0"),
        ({"budget": 8}, "budget is 8"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], line: str) -> None:
    with pytest.raises(EvalError, match=line):
        GrowthConfig(**given)

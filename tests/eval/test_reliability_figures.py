"""Every reliability figure can be run, counts what it tried, and the command says no in one line."""

from __future__ import annotations

import errno
import json
from importlib import import_module
from pathlib import Path

import pytest

from chunk_cache import StoreFolder
from rag_eval.reliability import FIGURES, Outcome, Plan, io_faults, kills, small_state
from rag_eval.reliability import command as reliability


def plan(folder: Path) -> Plan:
    return Plan(quick=False, model="smollm2-135m", seed=1, scale=0.006, folder=folder)


def test_every_name_has_a_module_that_runs() -> None:
    for name in FIGURES:
        assert callable(import_module(f"rag_eval.reliability.{name}").run), name


def test_failing_disks_are_tried_and_an_error_that_is_swallowed_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good").mkdir()
    outcome = io_faults.run(plan(tmp_path / "good"))
    assert outcome.tried >= 28
    assert outcome.faults == []
    assert "every 167th call" in outcome.note
    monkeypatch.setattr(io_faults, "CODES", (errno.EIO,))
    monkeypatch.setattr(io_faults, "lines", lambda state: small_state.lines(state + 2))
    (tmp_path / "bad").mkdir()
    assert io_faults.run(plan(tmp_path / "bad")).failed


def test_what_a_killed_writer_may_not_leave_is_seen(tmp_path: Path) -> None:
    index = tmp_path / "index"
    small_state.advance(index, 0)
    store = StoreFolder(tmp_path / "store", create=True)
    for number in range(3):
        store.put(small_state.record(number), context=small_state.CONTEXT)
    outcome = Outcome()
    assert kills.look(tmp_path, 0, 3, outcome, "whole") == (0, 3)
    assert outcome.faults == []
    kills.look(tmp_path, 0, 4, outcome, "lost")
    (store.path / "left.tmp").write_bytes(b"")
    kills.look(tmp_path, 0, 3, outcome, "left")
    (path,) = store.path.rglob(f"{small_state.record(1).key.digest}*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    kills.look(tmp_path, 0, 1, outcome, "damaged")
    assert [fault.split(":")[0] for fault in outcome.faults] == [
        "lost",
        "left",
        "damaged",
        "damaged",
    ]
    with pytest.raises(ValueError, match="not known"):
        kills.look(tmp_path, 3, 1, outcome, "other state")


@pytest.mark.parametrize(
    "words", [["--only", "luck"], ["--scale", "2"], ["--scale", "nan"], ["--seed", "x"]]
)
def test_a_mistake_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        reliability.main(words)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")


def test_the_report_has_a_key_per_figure_and_a_failure_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = Outcome(tried=3)
    monkeypatch.setattr(reliability, "figure", lambda name: lambda given: outcome)
    assert reliability.main(["--only", "kills", "--only", "jobs", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["kills", "jobs"]
    assert report["jobs"]["passed"] is True
    assert report["jobs"]["command"].endswith("--only kills --only jobs --quick --json")
    outcome.measure("lost", 1, 0)
    assert reliability.main(["--only", "kills", "--quick"]) == 1
    assert "lost 1.0 (promised: at most 0)" in capsys.readouterr().out

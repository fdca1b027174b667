"""The program for a GPU machine, dry-run at toy sizes: every section runs, and a wrong number is told."""

from __future__ import annotations

import json

import pytest
import torch

from rag_eval.gpu_check import main
from rag_eval.gpu_check.command import wrong
from rag_kernels.attention.cpu import CpuKernel


def test_every_section_runs_and_agrees(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--device", "cpu", "--small", "--repeats", "1"]) == 0
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [len(part["entries"]) > 3 for part in report["sections"].values()] == [True] * 4
    assert not any(key in str(report) for key in ("failed", "stopped", "skipped"))
    assert "all agree" in capsys.readouterr().out
    assert report["machine"]["torch"] == torch.__version__


def test_a_wrong_kernel_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    attend = CpuKernel.attend
    monkeypatch.setattr(CpuKernel, "attend", lambda self, call: attend(self, call) + 1)
    words = ["--out", str(tmp_path), "--device", "cpu", "--small", "--repeats", "1"]
    assert main(words) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {entry["what"] for entry in wrong(report)} == {"attention cpu"}
    assert "entries" in report["sections"]["prefill of a random Llama-8B"]


def test_a_kernel_that_breaks_off_is_told_and_the_other_checks_go_on(tmp_path, monkeypatch):
    def refuse(self, call):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(CpuKernel, "attend", refuse)
    words = ["--out", str(tmp_path), "--device", "cpu", "--small", "--repeats", "1"]
    assert main(words) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    cases = report["sections"]["attention against fp32"]["entries"]
    broken = [case for case in cases if case["what"] == "attention cpu"]
    assert len(broken) > 3
    assert all("no compiler" in case["failed"] for case in broken)
    assert all(case["ok"] for case in cases if case not in broken)


def test_no_time_left_starts_nothing(tmp_path):
    words = ["--out", str(tmp_path), "--device", "cpu", "--small", "--budget-s", "-1"]
    assert main(words) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_dry_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "--device cpu --small" in capsys.readouterr().err

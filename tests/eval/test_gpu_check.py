"""The program for a GPU machine, dry-run at toy sizes: every section runs, and a wrong number is told."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile

import pytest
import torch

from rag_eval.gpu_check import carry, engine, main, prefill
from rag_eval.gpu_check.command import wrong
from rag_eval.gpu_check.engine import try_engine
from rag_kernels.attention.cpu import CpuKernel

ABSENT = "sglang sgl_kernel flashinfer tvm_ffi pydantic fastapi zmq faiss platformdirs orjson msgspec psutil safetensors"


def test_every_section_runs_and_agrees_with_nothing_but_torch(tmp_path):
    """A GPU machine without a registry: no SGLang, no FlashInfer, the project by its path alone."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT.split()!r}))\n"
        "from rag_eval.gpu_check import main; sys.exit(main())"
    )
    words = ["--out", str(tmp_path), "--device", "cpu", "--small", "--repeats", "1"]
    call = [sys.executable, "-c", script, *words, "--engine-s", "0"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [len(part["entries"]) > 3 for part in report["sections"].values()] == [True] * 4
    assert not any(key in str(report) for key in ("failed", "stopped", "skipped"))
    assert "all agree" in done.stdout
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["flashinfer"].startswith("not there")


def test_an_engine_that_cannot_start_is_told_with_what_it_said(monkeypatch):
    told = list(try_engine("no-such-device", 0.01))
    assert told[-1]["stopped"] == "after 0 s"
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (last,) = try_engine("cuda", 30.0)
    assert last["stopped"] == "exit status 1"


def test_steps_that_come_through_are_told_up_to_the_one_that_does_not(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    assert engine.main("cuda") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["stopped"] == "not there"


def test_the_stand_in_computes_what_a_llama_needs(monkeypatch):
    for name in [one for one in sys.modules if one.partition(".")[0] == "sgl_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(engine._STAND_IN)
    stand_in = importlib.import_module("sgl_kernel")
    below = importlib.import_module("sgl_kernel.kvcacheio")
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8)
    want = torch.nn.functional.rms_norm(x + residual, (8,), weight, 1e-6)
    stand_in.fused_add_rmsnorm(x, residual, weight)
    torch.testing.assert_close(x, want)
    gate, up = want.chunk(2, dim=-1)
    torch.testing.assert_close(stand_in.silu_and_mul(x), torch.nn.functional.silu(gate) * up)
    assert stand_in.scalar_types.uint4b8 is not None
    with pytest.raises(NotImplementedError, match=r"kvcacheio\.transfer_kv"):
        below.transfer_kv(1)
    for name in [one for one in sys.modules if one.partition(".")[0] == "sgl_kernel"]:
        del sys.modules[name]


def test_files_to_carry_hold_the_project_and_leave_out_what_a_llama_needs_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(carry, "_OTHERS", {})
    sizes = carry.pack(tmp_path / "carry.zip")
    assert set(sizes) == {"rag_kernels", "rag_eval", "rag_pipeline", "chunk_cache", "retrievers"}
    names = zipfile.ZipFile(tmp_path / "carry.zip").namelist()
    assert "rag_kernels/native/attention.cpp" in names
    assert "rag_eval/gpu_check/stand_in/sgl_kernel/__init__.py" in names
    assert any(name.endswith("dist-info/entry_points.txt") for name in names)
    assert not any("__pycache__" in name for name in names)
    assert (tmp_path / "carry.zip").stat().st_size < carry.MOST_BYTES


def test_a_wrong_kernel_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    attend = CpuKernel.attend
    monkeypatch.setattr(CpuKernel, "attend", lambda self, call: attend(self, call) + 1)
    words = ["--out", str(tmp_path), "--device", "cpu", "--small", "--repeats", "1"]
    words += ["--engine-s", "0"]
    assert main(words) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {entry["what"] for entry in wrong(report)} == {"attention cpu"}
    assert "entries" in report["sections"]["prefill of a random Llama-8B"]


def test_a_kernel_that_breaks_off_is_told_and_the_other_checks_go_on(tmp_path, monkeypatch):
    def refuse(self, call):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(CpuKernel, "attend", refuse)
    words = ["--out", str(tmp_path), "--device", "cpu", "--small", "--repeats", "1"]
    words += ["--engine-s", "0"]
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


def test_a_scored_prefill_pays_for_every_layer_once_and_for_the_shift(monkeypatch):
    """What the scoring pass did not reach is loaded by the final one; the rows that stay are shifted, as in an engine."""
    llama = prefill.RandomLlama(prefill.TINY, 2 * 128, torch.device("cpu"))
    ways = prefill._Prompts(llama, 128, 2).ways()
    loaded, shifted = [], []
    load, shift = prefill.Load.layer, prefill.mean_shift_inplace

    def note_load(self, index, *pools):
        loaded.append(index)
        load(self, index, *pools)

    def note_shift(*call):
        shifted.append(call[-1].num_shifted)
        shift(*call)

    monkeypatch.setattr(prefill.Load, "layer", note_load)
    monkeypatch.setattr(prefill, "mean_shift_inplace", note_shift)
    ways["query 15%, scoring included"]()
    assert sorted(loaded) == list(range(prefill.TINY.layers))
    assert len(shifted) == prefill.TINY.layers - 1
    assert min(shifted) > 0

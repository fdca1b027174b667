"""A conversion that is killed goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_pipeline.conversion.work import work_path

ROOT = Path(__file__).resolve().parents[2]


def command(model: Path, out: Path, text: Path, latent: int = 32) -> list[str]:
    words = (
        f"convert mla --model {model} --rope 16 --latent {latent} --out {out} --calibration {text}"
    )
    more = "--calibration-tokens 2048 --held-out-tokens 512 --json"
    start = "import sys; from rag_pipeline.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", start, *words.split(), *more.split()]


def run(words: list[str]) -> tuple[str, str]:
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout, done.stderr


def run_until(words: list[str], mark: str) -> None:
    """Kill a run, without a chance to tidy up, when it says so."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(mark):
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_conversion_goes_on(
    llama: Callable[..., Path], tmp_path: Path, text: Path
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    run_until(command(llama(), out, text), "layer 2 of 3")
    assert not out.exists()
    printed, said = run(command(llama(), out, text))
    assert "going on" in said
    assert "layer 3 of 3" in said
    assert "layer 2 of 3" not in said
    assert "original, " not in said  # its perplexity is a stage, too
    assert not work_path(out).exists()

    wanted, _ = run(command(llama(), whole, text))
    assert printed.replace(str(out), "") == wanted.replace(str(whole), "")
    for file in whole.iterdir():
        if file.suffix == ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_other_sizes_begin_anew(llama: Callable[..., Path], tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    run_until(command(llama(), out, text), "layer 2 of 3")
    _, said = run(command(llama(), out, text, latent=16))
    assert "going on" not in said
    assert "layer 1 of 3" in said

"""A run that is told to end: it ends, with its engine, and what was measured is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROGRAM = "import sys; from rag_pipeline.cli import main; sys.exit(main())"


def test_sigterm_ends_a_run_and_its_engine(tiny_path: Path, tmp_path: Path) -> None:
    words = ["eval", "--dataset", "planted-1hop", "--model", str(tiny_path), "--limit", "500"]
    words += ["--modes", "full,reuse", "--chunks", "2", "--chunk-tokens", "64"]
    words += ["--out", str(tmp_path / "run"), "--max-new-tokens", "2", "--gold-tokens", "2"]
    log = tmp_path / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            stdout=out,
            stderr=out,
            env={**os.environ, "RAG_PIPELINE_HOME": str(tmp_path / "home")},
            start_new_session=True,
        )
    kept = tmp_path / "run" / "predictions.jsonl"
    try:
        wait_until(lambda: kept.exists() and kept.stat().st_size > 0, process, log)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = log.read_text(errors="replace")
    assert code == 130, said[-2000:]
    assert said.splitlines()[-1] == "error: interrupted; nothing that was finished is lost"
    assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while group_lives(process.pid):
        assert time.monotonic() < deadline, "processes of the engine live on"
        time.sleep(0.2)


def wait_until(done, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.2)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True

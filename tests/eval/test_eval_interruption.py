"""A run that is told to end: it ends, with its engine, and what was measured is kept."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from warm import WarmStart

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROGRAM = "import sys; from rag_pipeline.cli import main; sys.exit(main())"
WORDS = "eval --dataset planted-1hop --model smollm2-135m --limit 500 --modes full,reuse"
WORDS += " --chunks 2 --chunk-tokens 64 --max-new-tokens 2 --gold-tokens 2 --out run"


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    measured: int
    all_gone: bool


def interrupted_run(warm_start: WarmStart) -> Ended:
    """A run that gets SIGTERM after its first example."""
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log.txt"
        words = [sys.executable, "-c", PROGRAM, *WORDS.split()]
        process = warm_start.popen(words, environment=os.environ, stdout=log, cwd=folder)
        kept = folder / "run" / "predictions.jsonl"
        try:
            begun = until(lambda: process.poll() is not None or has_text(kept), seconds=400)
            assert begun, log.read_text(errors="replace")[-3000:]
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=100)
            gone = until(lambda: not group_lives(process.pid), seconds=30)
        finally:
            process.kill_group()
            process.wait()
        measured = len(kept.read_text("utf-8").splitlines()) if kept.exists() else 0
        return Ended(code, log.read_text(errors="replace"), measured, gone)


def until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def has_text(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_sigterm_ends_a_run_and_its_engine(warm_start: WarmStart) -> None:
    ended = interrupted_run(warm_start)
    assert ended.code == 130, ended.said[-2000:]
    last = ended.said.splitlines()[-1]
    assert last == "error: interrupted; what was already written is kept"
    assert "Traceback" not in ended.said
    assert ended.measured > 0
    assert ended.all_gone, "processes of the engine live on"

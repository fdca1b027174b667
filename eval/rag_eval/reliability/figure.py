"""What a figure is told and what it reports; the table of all figures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

MAX_FAULTS = 20

FIGURES = {
    "routes": "every route x key x origin and host: nothing is answered that no list names",
    "kills": "SIGKILL at random points of ingest, delete and store: all readable, nothing left over",
    "io_faults": "the Nth write, fsync or rename fails: old or new state, the right status",
    "jobs": "SIGKILL after 202: every upload finishes or reports `failed`",
    "hostile": "bombs and pathological texts: the HTTP process stays small, neighbours are served",
    "overload": "ten times capacity: the excess is refused at once, health and the admitted stay quick",
    "malformed": "random requests and raw sockets: no 5xx, the event loop never stalls",
    "isolation": "cross-tenant probes: no foreign token, no timing that tells",
    "erasure": "after DELETE nothing is left in index, store and staging; the store keeps its budget",
    "soak": "hours of load: memory and descriptors stay; stops and kills leave nothing behind",
}
"""Name of each figure, also of its module here, and what it tries."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is tried.

    Attributes
    ----------
    quick : bool
        A small run that a test can wait for.
    model : str
        Model of the servers: a name or a folder; a small one will do.
    seed : int
        Of everything that is drawn.
    scale : float
        Share of the full size that is tried; at most 1. Quick runs ignore it.
    folder : Path
        For indexes, stores and logs; empty.
    """

    quick: bool
    model: str
    seed: int
    scale: float
    folder: Path

    def size(self, full: int, quick: int) -> int:
        """How many of something: the full number, its share, or the quick one."""
        return quick if self.quick else max(1, round(full * self.scale))


@dataclasses.dataclass(kw_only=True, slots=True)
class Outcome:
    """What happened.

    Attributes
    ----------
    tried : int
        Attempts.
    failed : int
        Attempts after which something was not as promised.
    faults : list of str
        The first 20 of them, each in one line.
    worst : dict
        The worst value of each quantity that was measured; the unit stands in its name.
    limits : dict
        What is promised of the same quantities.
    note : str
        What was smaller or shorter than the full figure.
    seconds : float
        Wall time.
    """

    tried: int = 0
    failed: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)
    worst: dict[str, Any] = dataclasses.field(default_factory=dict)
    limits: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0

    def fault(self, text: str) -> None:
        """Count one failure and keep its line while there is room."""
        self.failed += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(" ".join(text.split())[:400])

    def measure(self, name: str, value: float, limit: float | None = None) -> None:
        """Keep a quantity's largest value; above its limit it is a failure."""
        value = round(float(value), 4)
        self.worst[name] = max(value, self.worst.get(name, value))
        if limit is not None:
            self.limits[name] = limit
            if value > limit:
                self.fault(f"{name} is {value}; promised is at most {limit}")

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with ``passed`` first."""
        return {"passed": not self.failed} | dataclasses.asdict(self)


Figure = Callable[[Plan], Outcome]


def figure(name: str) -> Figure:
    """Import a figure; its time is taken."""
    run = import_module(f"rag_eval.reliability.{name}").run

    def timed(plan: Plan) -> Outcome:
        began = time.monotonic()
        outcome: Outcome = run(plan)
        outcome.seconds = round(time.monotonic() - began, 1)
        return outcome

    return timed

"""The waiting queue by the keys of what its jobs will read."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from chunk_cache.eviction.base import WaitingJob

_SHORT = 32


class QueueChange(NamedTuple):
    """What an update changed."""

    arrived: list[WaitingJob]
    """Jobs that were not in the queue before."""
    keys: set[Hashable]
    """Keys whose ticket may have changed."""


class WaitingQueue:
    """Jobs in queue order, and for each key the first job that waits for it.

    Each job has a ticket. Tickets ascend along the queue and stay while the order stays, so that a queue whose head
    leaves and whose tail grows costs only what came and went. A job that was overtaken gets a new ticket, and so do
    those behind it.
    """

    def __init__(self) -> None:
        self._jobs: dict[Hashable, tuple[int, Sequence[Hashable]]] = {}
        # Tickets of the jobs that reference a key, ascending; those of jobs that left are dropped when they are met.
        self._tickets: dict[Hashable, deque[int]] = {}
        self._alive: set[int] = set()
        self._last = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def ticket(self, key: Hashable) -> int | None:
        """The smallest ticket of the jobs that reference a key; ``None`` if nobody waits for it."""
        tickets = self._tickets.get(key)
        return tickets[0] if tickets else None

    def jobs(self) -> Iterable[Sequence[Hashable]]:
        """The keys of each job, the next first."""
        return (keys for _, keys in self._jobs.values())

    def update(self, jobs: Iterable[WaitingJob]) -> QueueChange:
        """Take the queue as it is now. Of jobs of one name only the first counts.

        Parameters
        ----------
        jobs : iterable of WaitingJob
            All of it, the next first.
        """
        wanted: dict[Hashable, WaitingJob] = {}
        for job in jobs:
            wanted.setdefault(job.name, job)
        changed: set[Hashable] = set()
        for name in [name for name in self._jobs if name not in wanted]:
            self._remove(name, changed)
        arrived = []
        front = 0
        for name, job in wanted.items():
            known = self._jobs.get(name)
            if known is not None and known[0] > front:
                front = known[0]
                continue
            if known is None:
                arrived.append(job)
                keys = tuple(dict.fromkeys(job.keys))
            else:
                keys = tuple(known[1])
                self._remove(name, changed)
            front = self._append(name, keys, changed)
        return QueueChange(arrived, changed)

    def _append(self, name: Hashable, keys: Sequence[Hashable], changed: set[Hashable]) -> int:
        self._last += 1
        self._alive.add(self._last)
        self._jobs[name] = (self._last, keys)
        for key in keys:
            tickets = self._tickets.get(key)
            if tickets is None:
                tickets = self._tickets[key] = deque()
            if len(tickets) > _SHORT + 2 * len(self._jobs):  # mostly of jobs that were overtaken
                tickets = self._tickets[key] = deque(t for t in tickets if t in self._alive)
            tickets.append(self._last)
            if len(tickets) == 1:
                changed.add(key)
        return self._last

    def _remove(self, name: Hashable, changed: set[Hashable]) -> None:
        ticket, keys = self._jobs.pop(name)
        self._alive.remove(ticket)
        for key in keys:
            tickets = self._tickets[key]
            if tickets[0] != ticket:
                continue
            while tickets and tickets[0] not in self._alive:
                tickets.popleft()
            if not tickets:
                del self._tickets[key]
            changed.add(key)

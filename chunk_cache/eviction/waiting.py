"""The waiting queue by the keys of what its jobs will read."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
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
        self._jobs: dict[Hashable, WaitingJob] = {}
        self._ticket_of: dict[Hashable, int] = {}
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

    def jobs(self) -> Iterable[WaitingJob]:
        """The jobs, the next first; each lists a key once."""
        return self._jobs.values()

    def update(self, jobs: Iterable[WaitingJob]) -> QueueChange:
        """Take the queue as it is now. Of jobs of one name only the first counts.

        Parameters
        ----------
        jobs : iterable of WaitingJob
            All of it, the next first.
        """
        given = list(jobs)
        names = [job.name for job in given]
        known = list(self._jobs)
        changed: set[Hashable] = set()
        arrived: list[WaitingJob] = []
        # Mostly the head has left and the tail has grown: what is between is compared, not looked at.
        left = known.index(names[0]) if names and names[0] in self._jobs else len(known)
        stayed = len(known) - left
        if names[:stayed] != known[left:]:
            left, stayed = len(known), 0
        wanted = set(names[stayed:])
        for name in known[:left]:
            if name not in wanted:
                self._remove(name, changed)
        front = self._ticket_of[names[stayed - 1]] if stayed else 0
        seen = set(names[:stayed])
        for job in given[stayed:]:
            if job.name in seen:
                continue
            seen.add(job.name)
            ticket = self._ticket_of.get(job.name)
            if ticket is not None and ticket > front:
                front = ticket
            elif ticket is not None:
                front = self._append(self._remove(job.name, changed), changed)
            else:
                arrived.append(job)
                once = job._replace(keys=tuple(dict.fromkeys(job.keys)))
                front = self._append(once, changed)
        return QueueChange(arrived, changed)

    def _append(self, job: WaitingJob, changed: set[Hashable]) -> int:
        self._last += 1
        self._alive.add(self._last)
        self._jobs[job.name] = job
        self._ticket_of[job.name] = self._last
        for key in job.keys:
            tickets = self._tickets.get(key)
            if tickets is None:
                tickets = self._tickets[key] = deque()
            elif len(tickets) > _SHORT + 2 * len(self._jobs):  # mostly of jobs that were overtaken
                tickets = self._tickets[key] = deque(t for t in tickets if t in self._alive)
            tickets.append(self._last)
            if len(tickets) == 1:
                changed.add(key)
        return self._last

    def _remove(self, name: Hashable, changed: set[Hashable]) -> WaitingJob:
        job = self._jobs.pop(name)
        ticket = self._ticket_of.pop(name)
        self._alive.remove(ticket)
        for key in job.keys:
            tickets = self._tickets[key]
            if tickets[0] != ticket:
                continue
            while tickets and tickets[0] not in self._alive:
                tickets.popleft()
            if not tickets:
                del self._tickets[key]
            changed.add(key)
        return job

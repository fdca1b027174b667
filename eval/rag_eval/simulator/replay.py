"""One server, one queue: a trace played through two tiers."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Hashable

from chunk_cache.eviction import BeladyPolicy, LookAheadPolicy, WaitingJob
from rag_eval.simulator.traces import Trace
from rag_eval.simulator.two_tiers import DISK, MEMORY, TwoTiers

PARTS = 5
"""Hits are also counted for each fifth of the requests, which shows how even a result is."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Hits:
    """Tokens that the jobs of a replay asked for, by where they were when the job was admitted."""

    asked: int = 0
    memory: int = 0
    disk: int = 0
    memory_by_part: list[int] = dataclasses.field(default_factory=lambda: [0] * PARTS)
    waiting: int = 0
    """Sum over the jobs of how many waited behind them at admission."""


class Replay:
    """First come, first served, one job at a time.

    The server works on a job for as long as its prompt holds tokens, stored or not. So all policies see the same queue.
    Its rate is the trace's work over the trace's duration, divided by the load: at a load of 1 it keeps up on average.
    A job's pieces are looked up when it is admitted. What is on disk is read then; what is nowhere is computed and stored.

    Between two events (an arrival, an admission) pieces are fetched ahead, as much as the disk reads in that time.

    Parameters
    ----------
    trace : Trace
        What to play.
    tiers : TwoTiers
        Empty.
    load : float
        Offered work over the server's rate; positive.
    prefetcher : LookAheadPolicy or None
        Takes the queue and says what to fetch: the tiers' own policy, or one without items; ``None`` for no fetching.
    disk_speed : float
        Rate of reading from disk over the server's rate; positive.
    """

    def __init__(
        self,
        trace: Trace,
        tiers: TwoTiers,
        *,
        load: float,
        prefetcher: LookAheadPolicy | None,
        disk_speed: float,
    ) -> None:
        self._trace = trace
        self._tiers = tiers
        self._prefetcher = prefetcher
        self._rate = sum(job.tokens for job in trace.jobs) / trace.duration_s / load
        self._disk_rate = self._rate * disk_speed
        self._queue: deque[WaitingJob] = deque()
        self._in_place: set[Hashable] = set()
        self._readable = 0.0
        self._time = trace.jobs[0].arrival_s
        self.hits = Hits()

    def run(self) -> Hits:
        """Play the whole trace."""
        jobs = self._trace.jobs
        waiting = [WaitingJob(n, job.keys, sum(job.weights)) for n, job in enumerate(jobs)]
        come = 0
        idle_from = self._time
        while come < len(jobs) or self._queue:
            admission = max(idle_from, self._time) if self._queue else math.inf
            arrival = jobs[come].arrival_s if come < len(jobs) else math.inf
            self._pass_time(min(admission, arrival))
            if arrival <= admission:
                while come < len(jobs) and jobs[come].arrival_s == arrival:
                    self._queue.append(waiting[come])
                    come += 1
                self._note_queue()
            else:
                number = self._queue.popleft().name
                assert isinstance(number, int)
                self._note_queue()
                self._admit(number)
                idle_from = self._time + jobs[number].tokens / self._rate
        return self.hits

    def _note_queue(self) -> None:
        for policy in {self._tiers.policy, self._prefetcher}:
            if policy is not None and policy.uses_queue:
                policy.note_queue(self._queue)

    def _admit(self, number: int) -> None:
        job, tiers = self._trace.jobs[number], self._tiers
        tiers.expire(self._time)
        if isinstance(tiers.policy, BeladyPolicy):
            tiers.policy.job = number
        self.hits.waiting += len(self._queue)
        part = number * PARTS // len(self._trace.jobs)
        is_behind_miss = False
        for key, tokens in zip(job.keys, job.weights, strict=True):
            place = tiers.place(key)
            is_behind_miss = is_behind_miss or (self._trace.is_prefix and place is None)
            self.hits.asked += tokens
            if place == MEMORY and not is_behind_miss:
                self.hits.memory += tokens
                self.hits.memory_by_part[part] += tokens
            elif place == DISK and not is_behind_miss:
                self.hits.disk += tokens
        # The end of a prompt first: among pieces that rank alike it is the first to leave, and what stands before it
        # stays usable.
        for key, tokens in zip(reversed(job.keys), reversed(job.weights), strict=True):
            tiers.use(key, tokens, job.session, self._time)

    def _pass_time(self, until: float) -> None:
        """Fetch what the disk reads meanwhile; time in which there is nothing to read is not saved up."""
        self._readable += (until - self._time) * self._disk_rate
        self._time = until
        if self._prefetcher is None or self._fetch():
            self._readable = 0.0

    def _fetch(self) -> bool:
        """Whether all that should be in memory is there."""
        assert self._prefetcher is not None
        tiers = self._tiers
        if any(map(self._prefetcher.is_awaited, tiers.just_demoted)):
            self._in_place.clear()
        tiers.just_demoted.clear()
        for job in self._prefetcher.jobs_to_prefetch():
            if job.name in self._in_place:
                continue
            for key in job.keys:
                place = tiers.place(key)
                if place is None and self._trace.is_prefix:
                    break  # nothing behind it can be used
                if place != DISK:
                    continue
                tokens = tiers.policy.items[key].num_bytes
                if tokens > self._readable:
                    return False
                self._readable -= tokens
                if not tiers.fetch(key, self._time):
                    return True  # memory is full of what is needed sooner
            self._in_place.add(job.name)
        return True

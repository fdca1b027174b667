"""Memory above disk: where each piece is, and what a policy makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from chunk_cache.eviction import EvictionPolicy, LookAheadPolicy
from rag_eval.simulator.traces import Trace

MEMORY, DISK = "memory", "disk"


@dataclasses.dataclass(kw_only=True, slots=True)
class Moves:
    """Tokens that were moved."""

    fetched: int = 0
    """Into memory ahead of a job."""
    demoted: int = 0
    """From memory to disk."""
    dropped: int = 0
    """Out of the store."""
    expired: int = 0
    """Of these, because of their TTL."""


class TwoTiers:
    """A piece is in memory, on disk or gone; never in two places.

    Whatever is read or computed comes to memory. Memory beyond its budget (and the policy's reserve) is demoted to disk,
    and disk beyond its budget is dropped; the policy says what, with one group per tier. What was just stored is a
    candidate too. So a piece that is first among the victims leaves at once.

    Parameters
    ----------
    memory_tokens, disk_tokens : int
        Budgets; a token weighs 1.
    policy : EvictionPolicy
        With nothing stored.
    drops_expired : bool
        Drop what has outlived the TTL of a look-ahead policy.
    """

    def __init__(
        self,
        memory_tokens: int,
        disk_tokens: int,
        policy: EvictionPolicy,
        *,
        drops_expired: bool = False,
    ) -> None:
        self.memory_tokens = memory_tokens
        self.disk_tokens = disk_tokens
        self.policy = policy
        self.tokens_in = {MEMORY: 0, DISK: 0}
        self.moves = Moves()
        self.just_demoted: list[Hashable] = []
        """For a reader that clears it."""
        self.drops_expired = drops_expired

    def place(self, key: Hashable) -> str | None:
        """:data:`MEMORY`, :data:`DISK`, or ``None``."""
        item = self.policy.items.get(key)
        return None if item is None else item.group

    def use(self, key: Hashable, tokens: int, session: Hashable, now: float) -> None:
        """Read a piece, or store it if it is not there; then both tiers are within their budgets."""
        item = self.policy.items.get(key)
        if item is None:
            self.policy.insert(key, tokens, now=now, group=MEMORY, session=session)
            self.tokens_in[MEMORY] += tokens
        else:
            if item.group == DISK:
                self._move(key, MEMORY)
            self.policy.use(key, now)
        self._fit(now)

    def fetch(self, key: Hashable, now: float) -> bool:
        """Bring a piece from disk to memory ahead of its job; ``False`` if it is first to leave again."""
        self.moves.fetched += self._move(key, MEMORY)
        self.policy.use(key, now)
        self._fit(now)
        return self.place(key) == MEMORY

    def expire(self, now: float) -> None:
        """Drop what has outlived its TTL, if this is wanted."""
        if self.drops_expired and isinstance(self.policy, LookAheadPolicy):
            for key in self.policy.expire(now):
                self.moves.expired += self._drop(key)

    def _fit(self, now: float) -> None:
        while self.tokens_in[MEMORY] > self.memory_tokens - self.policy.reserve_bytes:
            key = next(self.policy.victims(MEMORY, now))
            self.moves.demoted += self._move(key, DISK)
            self.just_demoted.append(key)
        while self.tokens_in[DISK] > self.disk_tokens:
            self._drop(next(self.policy.victims(DISK, now)))

    def _move(self, key: Hashable, group: str) -> int:
        item = self.policy.items[key]
        self.tokens_in[item.group] -= item.num_bytes
        self.tokens_in[group] += item.num_bytes
        self.policy.move(key, group)
        return item.num_bytes

    def _drop(self, key: Hashable) -> int:
        item = self.policy.items[key]
        self.tokens_in[item.group] -= item.num_bytes
        self.policy.remove(key)
        self.moves.dropped += item.num_bytes
        return item.num_bytes


def unbounded_hits(trace: Trace) -> float:
    """Share of the tokens asked for that a store without bounds would have: no policy has more hits."""
    seen: set[Hashable] = set()
    asked = found = 0
    for job in trace.jobs:
        is_behind_miss = False
        for key, tokens in zip(job.keys, job.weights, strict=True):
            asked += tokens
            is_behind_miss = is_behind_miss or (trace.is_prefix and key not in seen)
            found += tokens * (key in seen and not is_behind_miss)
        seen.update(job.keys)
    return found / asked

"""Scheduler-aware fetching and eviction: the waiting queue says what is needed next."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from chunk_cache.eviction.base import EvictionPolicy, StoredItem, WaitingJob
from chunk_cache.eviction.waiting import WaitingQueue
from chunk_cache.eviction.window import RunningMean, eviction_window, prefetch_window

DEFAULT_TTL_S = 3600.0
DEFAULT_WATERMARK = 0.02


class LookAheadPolicy(EvictionPolicy):
    """Items that nobody waits for go first, then the item whose job is nearest the tail of the window.

    The first ``W = (C_mem + C_disk) / S_kv`` jobs of the queue are the eviction window. An item that several of them
    reference stands at the first of its jobs. The first ``L_pw = C_mem / S_kv`` jobs are the prefetch window; what they
    read is worth fetching from below (:meth:`jobs_to_prefetch`). ``S_kv`` is a running average of the bytes that a job
    references; each job counts once, when it first shows in the queue.

    Among items that nobody waits for the variant decides:

    - ``lru``: the least recently used goes first.
    - ``fifo-birth``: an item of the oldest session goes first.
    - ``lfu``: the one with the fewest uses goes first, among equals the least recently used.
    - ``ttl``: what was not used for ``ttl_s`` goes first, the longest unused first of all; then as ``fifo-birth``.

    Parameters
    ----------
    memory_bytes, disk_bytes : int
        As of :class:`EvictionPolicy`.
    variant : str
        As of :class:`EvictionPolicy`; ``C_mem`` is ``memory_bytes`` without the reserve.
    ttl_s : float
        Life of an item that is not used, seconds. It is told by :meth:`expire`, and counts for the order in the variant
        ``ttl`` only.
    watermark : float
        Share of the memory that owners keep free, so that a fetched item finds room at once; at least 0, below 1.

    Notes
    -----
    Scheduler-aware fetching and eviction of CachedAttention (Gao et al., USENIX ATC 2024,
    https://arxiv.org/abs/2403.19708). Deviations: the unit is a chunk or block instead of a whole session, so a job
    references many items; the tie-break is a choice. The queue is true only as far as jobs are admitted in its order:
    run the scheduler with first come, first served.
    """

    name = "lookahead"
    variants = ("lru", "lfu", "fifo-birth", "ttl")
    uses_queue = True

    def __init__(
        self,
        *,
        memory_bytes: int,
        disk_bytes: int = 0,
        variant: str = "",
        ttl_s: float = DEFAULT_TTL_S,
        watermark: float = DEFAULT_WATERMARK,
    ) -> None:
        super().__init__(memory_bytes=memory_bytes, disk_bytes=disk_bytes, variant=variant)
        if not ttl_s > 0 or not 0 <= watermark < 1:
            raise ValueError(
                f"eviction policy 'lookahead': ttl_s={ttl_s}, watermark={watermark}; give more than 0 seconds, and "
                "a share from 0 to below 1."
            )
        self.ttl_s = ttl_s
        self._reserve = int(memory_bytes * watermark)
        self._queue = WaitingQueue()
        self._job_bytes = RunningMean()
        self._item_bytes = RunningMean()
        self._by_use: OrderedDict[Hashable, None] = OrderedDict()  # what has not expired
        self._expired: set[Hashable] = set()

    @property
    def reserve_bytes(self) -> int:
        """The watermark, in bytes."""
        return self._reserve

    @property
    def mean_job_bytes(self) -> float:
        """``S_kv``; 0 before the first job whose weight is known."""
        return self._job_bytes.value

    @property
    def prefetch_jobs(self) -> int:
        """``L_pw``; 0 while ``S_kv`` is not known."""
        size = self._job_bytes.value
        return prefetch_window(self.memory_bytes - self._reserve, size) if size else 0

    @property
    def window_jobs(self) -> int | None:
        """``W``; ``None``, for all jobs, while ``S_kv`` is not known."""
        size = self._job_bytes.value
        return eviction_window(self.memory_bytes, self.disk_bytes, size) if size else None

    def is_awaited(self, key: Hashable) -> bool:
        """Whether a job of the window references a key: an owner with a lower tier demotes it and never drops it."""
        return self._queue.ticket(key) is not None

    def rank(self, item: StoredItem) -> tuple[Any, ...]:
        """Rank items without a job by the variant; behind them those with one, the nearest to the tail first."""
        tie: tuple[int, ...] = (item.used,)
        if self.variant == "fifo-birth":
            tie = (item.born, item.used)
        elif self.variant == "lfu":
            tie = (item.uses, item.used)
        elif self.variant == "ttl":
            tie = (0, item.used) if item.key in self._expired else (1, item.born, item.used)
        ticket = self._queue.ticket(item.key)
        return (0, *tie) if ticket is None else (1, -ticket, *tie)

    # -- what the owner reports ---------------------------------------------------------------

    def insert(
        self,
        key: Hashable,
        num_bytes: int,
        *,
        now: float = 0.0,
        group: str = "",
        session: Hashable = None,
        is_held: bool = False,
    ) -> StoredItem:
        """As of :class:`EvictionPolicy`."""
        self._item_bytes.add(num_bytes)
        self._by_use[key] = None
        return super().insert(
            key, num_bytes, now=now, group=group, session=session, is_held=is_held
        )

    def _use(self, item: StoredItem, now: float) -> None:
        self._expired.discard(item.key)
        self._by_use[item.key] = None
        self._by_use.move_to_end(item.key)
        super()._use(item, now)

    def remove(self, key: Hashable) -> None:
        """As of :class:`EvictionPolicy`."""
        super().remove(key)
        self._by_use.pop(key, None)
        self._expired.discard(key)

    # -- time ---------------------------------------------------------------------------------

    def victims(self, group: str = "", now: float = 0.0) -> Iterator[Any]:
        """As of :class:`EvictionPolicy`; what has expired by ``now`` is noted first."""
        if self.variant == "ttl":
            self.expire(now)
        return super().victims(group, now)

    def expire(self, now: float) -> list[Any]:
        """Note which items have outlived their TTL.

        Returns
        -------
        list
            Keys that expired since the last call, that nobody holds and no job of the window references. An owner may
            drop them; one that does not finds them first among the victims of the variant ``ttl``.
        """
        gone = []
        while self._by_use:
            item = self.items[next(iter(self._by_use))]
            if now - item.used_at < self.ttl_s:
                break
            del self._by_use[item.key]
            self._expired.add(item.key)
            self.rerank(item)
            if not item.is_held and not self.is_awaited(item.key):
                gone.append(item.key)
        return gone

    # -- the waiting queue --------------------------------------------------------------------

    def note_queue(self, jobs: Iterable[WaitingJob]) -> None:
        """As of :class:`EvictionPolicy`; jobs behind the window are not looked at."""
        change = self._queue.update(itertools.islice(jobs, self.window_jobs))
        for job in change.arrived:
            num_bytes = float(job.num_bytes) or sum(map(self._weight, job.keys))
            if num_bytes:
                self._job_bytes.add(num_bytes)
        for key in change.keys:
            item = self.items.get(key)
            if item is not None:
                self.rerank(item)

    def _weight(self, key: Hashable) -> float:
        """Bytes of an item; of one that is not stored, the mean."""
        item = self.items.get(key)
        return self._item_bytes.value if item is None else item.num_bytes

    def awaited(self) -> Iterator[Any]:
        """Keys of the jobs of the window, the next first."""
        return (key for job in self._queue.jobs() for key in job.keys)

    def jobs_to_prefetch(self) -> Iterator[WaitingJob]:
        """The first ``L_pw`` jobs."""
        return itertools.islice(self._queue.jobs(), self.prefetch_jobs)

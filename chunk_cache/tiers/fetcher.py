"""Records from lower tiers into memory, in threads of their own: a request that comes begins it, a forward uses it.

A fetch reads a record's header, takes room in the memory store, and reads the layers in order; from the header on the
record is leased (:class:`~chunk_cache.LoadingChunk`). Records that a request asked for together are read a few layers at
a time across all of them, since a forward needs the same layer of each.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence

from chunk_cache.keys import ChunkKey
from chunk_cache.store.loading import Patience, RecordForm
from chunk_cache.store.memory import MemoryStore
from chunk_cache.tiers.fetch import Candidate, Fetch
from chunk_cache.tiers.fetch_steps import FetchSteps
from chunk_cache.tiers.tiered import TierChain
from chunk_cache.tiers.timeline import Timeline

PATIENCE_S = 2.0
"""Longest that forwards wait for the records of one request, all waits together, seconds."""


class Fetcher:
    """Threads that read records into a memory store.

    Whatever goes wrong in a tier is a miss, counted by ``count``: ``opened`` (its header was there), ``fetched``,
    ``damaged``, ``gone`` (somebody evicted or removed it meanwhile), ``fetch_failed``, ``no_memory``, ``superseded``
    (somebody computes it, or the store was reset), ``cancelled``, ``erased``, ``too_slow``; and ``fetch_dropped`` for
    what the queue had no room for.

    **Erasure.** A record is asked about before it can be leased and before it becomes READY; :meth:`erase` looks at
    those on their way. So what is erased does not come back from a fetch in flight.

    Parameters
    ----------
    chain : TierChain
        Where from; what was found in a lower tier is written to those above.
    store : MemoryStore
        Where to.
    form : RecordForm
        Of this engine's records; others are damage.
    count : callable
        Called with the name of a tier (empty where there is none) and an event, from any thread.
    took : callable
        Called with the name of a tier, bytes read into memory, and seconds, for every layer, or for a few that were read at once.
    is_worth : callable
        Called with the name of a tier, bytes in memory, tokens, and how many records are read at once; false to leave
        a record there: computing it is cheaper. Counted as ``too_slow``.
    is_erased : callable
        Whether a candidate (its ``key`` and ``token_ids``, as of a record) of a tenant must not be used.
    timeline : callable
        Where loads are recorded; None for nowhere. Asked each time.
    threads : int
        How many records are read at once.
    max_waiting : int
        Most chunks on their way.
    patience_s : float
        Longest that forwards wait for the records of one request, all waits together, seconds.
    """

    def __init__(
        self,
        chain: TierChain,
        store: MemoryStore,
        form: RecordForm,
        *,
        count: Callable[[str, str], None] = lambda tier, kind: None,
        took: Callable[[str, int, float], None] = lambda tier, num_bytes, seconds: None,
        is_worth: Callable[[str, int, int, int], bool] = lambda tier, size, tokens, parallel: True,
        is_erased: Callable[..., bool] = lambda record, tenant: False,
        timeline: Callable[[], Timeline | None] = lambda: None,
        threads: int = 2,
        max_waiting: int = 1024,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._store = store
        self._count = count
        self._is_erased = is_erased
        self.num_threads = threads
        """How many records are read at once."""
        self._max_waiting = max_waiting
        self._patience_s = patience_s
        # Headers first, so that a request knows soon what there is; then by request, layer and chunk.
        self._tasks: list[tuple[bool, int, int, int, Fetch]] = []
        self._numbers = itertools.count()
        self._fetches: dict[ChunkKey, Fetch] = {}
        self._stopping = False
        self._changed = threading.Condition()
        self._steps = FetchSteps(
            chain,
            store,
            form,
            count=count,
            took=took,
            is_worth=is_worth,
            is_erased=is_erased,
            timeline=timeline,
            threads=threads,
            pending=lambda: self.pending,
            ended=self._forget,
        )
        self._threads = [
            threading.Thread(target=self._run, name=f"chunk-kv-fetch-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    # -- for the scheduler --------------------------------------------------------------------

    def begin(self, wanted: Sequence[Sequence[Candidate]]) -> list[Fetch]:
        """Begin to fetch what is not in memory. Never waits.

        Parameters
        ----------
        wanted : sequence of sequences of Candidate
            Per chunk of a request what would serve it, the best first. What is behind the first READY one is left out.

        Returns
        -------
        list[Fetch]
            Those on their way, new and old; nothing for a chunk whose best record is READY.
        """
        missing: list[list[Candidate]] = []
        for candidates in wanted:
            row: list[Candidate] = []
            for candidate in candidates:
                if self._store.touch(candidate.key):
                    break
                row.append(candidate)
            if row:
                missing.append(row)
        patience, group = Patience(self._patience_s), next(self._numbers)
        with self._changed:
            found = [self._enqueue(row, patience, group) for row in missing]
            self._changed.notify_all()
        fetches = [fetch for fetch in found if fetch is not None]
        for _ in range(len(found) - len(fetches)):
            self._count("", "fetch_dropped")
        return fetches

    def _enqueue(self, row: list[Candidate], patience: Patience, group: int) -> Fetch | None:
        first = row[0].key
        fetch = self._fetches.get(first)
        if fetch is not None and not fetch.cancelled:
            return fetch
        if self._stopping or len(self._fetches) >= self._max_waiting:
            return None
        fetch = self._fetches[first] = Fetch(row, patience)
        number = next(self._numbers)
        heapq.heappush(self._tasks, (False, group, -1, number, fetch))
        return fetch

    def wait(self, is_met: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition on fetches is met, which is looked at whenever one goes on."""
        with self._changed:
            return self._changed.wait_for(is_met, timeout_s)

    def is_on_its_way(self, key: ChunkKey) -> bool:
        """Whether a fetch that was begun for a record has not ended."""
        with self._changed:
            return key in self._fetches

    @property
    def pending(self) -> int:
        """Chunks on their way."""
        with self._changed:
            return len(self._fetches)

    # -- letting go ---------------------------------------------------------------------------

    def clear(self) -> None:
        """Bring nothing into memory that is on its way."""
        with self._changed:
            for fetch in self._fetches.values():
                fetch.cancelled = fetch.cancelled or "cancelled"

    def erase(self) -> None:
        """Bring nothing into memory that is on its way and erased, however long the tier takes."""
        with self._changed:
            fetches = list(self._fetches.values())
        for fetch in fetches:
            loading = fetch.loading  # its header tells all that its KV has seen
            if any(
                self._is_erased(one if loading is None else loading.record, one.tenant)
                for one in fetch.candidates
            ):
                fetch.cancelled = "erased"

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is on its way, but no longer than `timeout_s`."""
        return self.wait(lambda: not self._fetches, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Read nothing more and end; ``False`` where a tier still holds a thread up after that time."""
        with self._changed:
            self._stopping = True
            for fetch in self._fetches.values():
                fetch.cancelled = fetch.cancelled or "cancelled"
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # -- the threads --------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._stopping)
                if not self._tasks:
                    return
                _, group, layer, number, fetch = heapq.heappop(self._tasks)
            following: int | None = None
            try:
                following = self._steps.step(fetch, layer)
            except Exception as error:  # a tier of another distribution may raise anything
                self._steps.fail(fetch, error)
            with self._changed:
                if following is not None:
                    heapq.heappush(self._tasks, (True, group, following, number, fetch))
                    self._changed.notify()
                self._changed.notify_all()

    def _forget(self, fetch: Fetch) -> None:
        with self._changed:
            first = fetch.candidates[0].key
            if self._fetches.get(first) is fetch:
                del self._fetches[first]

"""Records from lower tiers into memory, in threads of their own: a request that comes begins it, a forward uses it.

A fetch reads a record's header, takes room in the memory store, and reads the layers in order; from the header on the
record is leased (:class:`~chunk_cache.LoadingChunk`). Records that a request asked for together are read layer by layer
across all of them, since a forward needs the same layer of each.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from chunk_cache.errors import DamagedRecordError, GoneRecordError
from chunk_cache.keys import ChunkKey, KVContext, TokenIds
from chunk_cache.store.builds import Build, ChunkState
from chunk_cache.store.loading import LoadingChunk, Patience, RecordForm
from chunk_cache.store.memory import MemoryStore
from chunk_cache.tiers.base import LayerReader
from chunk_cache.tiers.tiered import TierChain
from chunk_cache.tiers.timeline import Timeline

PATIENCE_S = 2.0
"""Longest that forwards wait for the records of one request, all waits together, seconds."""
_LOAD_S = 120.0
"""A record that takes longer is given up, and its room is free again, seconds."""


class Candidate(NamedTuple):
    """A record that would serve a request."""

    key: ChunkKey
    token_ids: TokenIds
    context: KVContext
    """Of its namespace."""
    tenant: str
    """Whose share of memory it takes (:func:`~chunk_cache.tenant_mark`)."""


class Fetch:
    """One chunk on its way; shared by the requests that want it meanwhile."""

    __slots__ = (
        "build",
        "cancelled",
        "candidates",
        "chosen",
        "is_ended",
        "loading",
        "patience",
        "reader",
        "tier",
    )

    def __init__(self, candidates: Sequence[Candidate], patience: Patience) -> None:
        self.candidates = list(candidates)
        self.patience = patience
        self.chosen: Candidate | None = None
        self.tier = ""
        self.reader: LayerReader | None = None
        self.build: Build | None = None
        self.loading: LoadingChunk | None = None
        self.cancelled = ""
        """Why nothing of it may come into memory any more: ``cancelled`` or ``erased``; empty while it may."""
        self.is_ended = False

    @property
    def has_header(self) -> bool:
        """Whether waiting for the header is over: it is there, or will not come."""
        return self.is_ended or self.loading is not None

    def has_layers(self, number: int) -> bool:
        """Whether so many layers are there, or no more will come."""
        loading = self.loading
        if self.is_ended:
            return True
        return loading is not None and loading.num_filled >= min(number, loading.num_layers)


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
        Called with the name of a tier, bytes read into memory, and seconds, for every layer.
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
        self._chain = chain
        self._store = store
        self._form = form
        self._count = count
        self._took = took
        self._is_worth = is_worth
        self.num_threads = threads
        """How many records are read at once."""
        self._is_erased = is_erased
        self._timeline = timeline
        self._max_waiting = max_waiting
        self._patience_s = patience_s
        # Headers first, so that a request knows soon what there is; then by request, layer and chunk.
        self._tasks: list[tuple[bool, int, int, int, Fetch]] = []
        self._numbers = itertools.count()
        self._fetches: dict[ChunkKey, Fetch] = {}
        self._stopping = False
        self._changed = threading.Condition()
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
            if any(self._is_erased(one, one.tenant) for one in fetch.candidates):
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
                following = self._step(fetch, layer)
            except Exception as error:  # a tier of another distribution may raise anything
                self._fail(fetch, error)
            with self._changed:
                if following is not None:
                    heapq.heappush(self._tasks, (True, group, following, number, fetch))
                    self._changed.notify()
                self._changed.notify_all()

    def _step(self, fetch: Fetch, layer: int) -> int | None:
        """Read the header, or one layer; return the layer that is next, None at the end."""
        if fetch.cancelled:
            self._end(fetch, fetch.cancelled)
            return None
        if layer < 0:
            return 0 if self._open(fetch) else None
        assert fetch.loading is not None
        assert fetch.reader is not None
        began = time.perf_counter()
        loading, place = fetch.loading, fetch.loading.place(layer)
        into = getattr(fetch.reader, "layer_into", None)
        kv = None if into is not None and into(layer, place) else fetch.reader.layer(layer)
        num_bytes = sum(part.nbytes for part in kv or place)
        self._took(fetch.tier, num_bytes, time.perf_counter() - began)
        timeline = self._timeline()
        if timeline is not None:
            timeline.add("load", layer, began, loading.key.digest[:8])
        if kv is None:
            loading.filled(layer)
        else:
            loading.fill(layer, kv)
        if layer + 1 < fetch.loading.num_layers:
            return layer + 1
        self._finish(fetch)
        return None

    def _open(self, fetch: Fetch) -> bool:
        for candidate in fetch.candidates:
            found = self._chain.find(candidate.key, candidate.token_ids)
            if found is None:
                continue
            fetch.chosen, (fetch.tier, fetch.reader) = candidate, found
            return self._reserve(fetch, candidate, found.reader)
        self._end(fetch)
        return False

    def _reserve(self, fetch: Fetch, candidate: Candidate, reader: LayerReader) -> bool:
        """Take the right and the room; from then on it is leased."""
        form = self._form
        is_ours = (reader.layout, reader.num_layers) == (form.layout, form.num_layers)
        if not is_ours or not np.array_equal(reader.token_ids, candidate.token_ids):
            self._end(fetch, "damaged")
            return False
        record = form.empty(
            candidate.key,
            candidate.token_ids,
            reader.base_position,
            reader.codec,
        )
        if self._is_erased(candidate, candidate.tenant):
            self._end(fetch, "erased")
            return False
        parallel = min(self.num_threads, self.pending)
        if not self._is_worth(fetch.tier, record.num_bytes, record.num_tokens, parallel):
            self._end(fetch, "too_slow")
            return False
        build = self._store.begin_build(
            candidate.key,
            candidate.token_ids,
            owner=f"fetch from {fetch.tier}",
            tenant=candidate.tenant,
            timeout_s=_LOAD_S,
        )
        if not isinstance(build, Build):
            # Ready by now, computed by a request, or a build of it has just failed: all may use what there is.
            self._end(fetch, "" if build is ChunkState.READY else "superseded")
            return False
        fetch.build = build
        loading = LoadingChunk(record, fetch.patience, source=fetch.tier)
        if not self._store.begin_load(build, loading):
            self._end(fetch, "no_memory")
            return False
        fetch.loading = loading
        self._count(fetch.tier, "opened")
        return True

    def _finish(self, fetch: Fetch) -> None:
        chosen, build, loading = fetch.chosen, fetch.build, fetch.loading
        assert chosen is not None
        assert build is not None
        assert loading is not None
        record, tenant = loading.record, chosen.tenant
        if fetch.cancelled or self._is_erased(chosen, tenant):
            self._end(fetch, fetch.cancelled or "erased")
            return
        if not build.commit(record):
            self._end(fetch, "superseded")
            return
        # It may have been erased meanwhile, by somebody who did not see it in memory yet.
        if fetch.cancelled or self._is_erased(chosen, tenant):
            self._store.erase([record.key])
            self._end(fetch, fetch.cancelled or "erased")
            return
        self._chain.write_back(record, chosen.context, tenant, found_in=fetch.tier)
        self._end(fetch, "fetched")

    def _fail(self, fetch: Fetch, error: Exception) -> None:
        is_damage = isinstance(error, DamagedRecordError)
        if fetch.loading is not None:
            fetch.loading.fail(error)
        if is_damage and fetch.chosen is not None:
            # A file that cannot be used would be tried by every request, and keep the chunk from being written anew.
            try:
                self._chain.tiers[fetch.tier].remove(fetch.chosen.key)
            except Exception:
                self._count(fetch.tier, "remove_failed")
        is_gone = isinstance(error, GoneRecordError)
        self._end(fetch, "damaged" if is_damage else "gone" if is_gone else "fetch_failed")

    def _end(self, fetch: Fetch, kind: str = "") -> None:
        if fetch.loading is not None:
            fetch.loading.fail(RuntimeError(f"the fetch ended: {kind}"))
        if fetch.build is not None:
            # Without back-off: the chunk may be computed at once. Of no effect where it was committed.
            fetch.build.abort(kind, failed=False)
        close = getattr(fetch.reader, "close", None)
        if close is not None:
            # One that fetches ahead would go on to read what nobody wants.
            with contextlib.suppress(Exception):
                close()
        fetch.is_ended = True
        # Requests keep a fetch as long as they wait: it must hold no memory that nobody counts.
        fetch.reader = fetch.build = fetch.loading = None
        if kind:
            self._count(fetch.tier, kind)
        with self._changed:
            first = fetch.candidates[0].key
            if self._fetches.get(first) is fetch:
                del self._fetches[first]

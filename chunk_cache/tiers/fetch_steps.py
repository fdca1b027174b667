"""What is done for one fetch: header, room, layers, commit; and how it ends where one of these fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np

from chunk_cache.errors import DamagedRecordError, GoneRecordError
from chunk_cache.store.builds import Build, ChunkState
from chunk_cache.store.loading import LoadingChunk, RecordForm
from chunk_cache.store.memory import MemoryStore
from chunk_cache.tiers.base import LayerReader
from chunk_cache.tiers.fetch import Candidate, Fetch
from chunk_cache.tiers.tiered import TierChain
from chunk_cache.tiers.timeline import Timeline

_LOAD_S = 120.0
"""A record that takes longer is given up, and its room is free again, seconds."""
_RUN_S = 0.005
"""Layers that a fast tier reads in so long are read by one call, seconds: every call costs the interpreter, which a
forward needs, two turns. A layer waits no longer than that for those behind it."""
_MOST_LAYERS = 8
"""Of one call."""


class FetchSteps:
    """The steps of a fetch, from any thread, one at a time per fetch; the parameters are those of :class:`Fetcher`.

    Parameters
    ----------
    threads : int
        How many records are read at once.
    pending : callable
        How many chunks are on their way.
    ended : callable
        Told of each fetch when it has ended.
    """

    def __init__(
        self,
        chain: TierChain,
        store: MemoryStore,
        form: RecordForm,
        *,
        count: Callable[[str, str], None],
        took: Callable[[str, int, float], None],
        is_worth: Callable[[str, int, int, int], bool],
        is_erased: Callable[..., bool],
        timeline: Callable[[], Timeline | None],
        threads: int,
        pending: Callable[[], int],
        ended: Callable[[Fetch], None],
    ) -> None:
        self._chain = chain
        self._store = store
        self._form = form
        self._count = count
        self._took = took
        self._is_worth = is_worth
        self._is_erased = is_erased
        self._timeline = timeline
        self._threads = threads
        self._pending = pending
        self._ended = ended

    def step(self, fetch: Fetch, layer: int) -> int | None:
        """Read the header, or one layer; return the layer that is next, None at the end."""
        if fetch.cancelled:
            self._end(fetch, fetch.cancelled)
            return None
        if layer < 0:
            return 0 if self._open(fetch) else None
        done = self._read(fetch, layer)
        assert fetch.loading is not None
        if done < fetch.loading.num_layers:
            return done
        self._finish(fetch)
        return None

    def _read(self, fetch: Fetch, layer: int) -> int:
        """Read some layers from one on; return the next."""
        assert fetch.loading is not None
        assert fetch.reader is not None
        loading, began = fetch.loading, time.perf_counter()
        number = int(_RUN_S / fetch.layer_s) if fetch.layer_s else 1
        number = max(1, min(number, _MOST_LAYERS, loading.num_layers - layer))
        places = loading.places(layer, number)
        into = getattr(fetch.reader, "layers_into", None)
        is_there = into is not None and into(layer, places)
        read = places if is_there else [fetch.reader.layer(layer)]
        seconds = time.perf_counter() - began
        fetch.layer_s = seconds / len(read)
        self._took(fetch.tier, sum(part.nbytes for kv in read for part in kv), seconds)
        timeline = self._timeline()
        if timeline is not None:
            for index in range(layer, layer + len(read)):
                timeline.add("load", index, began, loading.key.digest[:8])
        if is_there:
            loading.filled(layer + len(read) - 1)
        else:
            loading.fill(layer, read[0])
        return layer + len(read)

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
            getattr(reader, "side", None),
        )
        if self._is_erased(record, candidate.tenant):
            self._end(fetch, "erased")
            return False
        parallel = min(self._threads, self._pending())
        # What a record with side tensors holds is no prompt's to compute: it is worth its time in any case.
        if not record.side and not self._is_worth(
            fetch.tier, record.num_bytes, record.num_tokens, parallel
        ):
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
        if fetch.cancelled or self._is_erased(record, tenant):
            self._end(fetch, fetch.cancelled or "erased")
            return
        if not build.commit(record):
            self._end(fetch, "superseded")
            return
        # It may have been erased meanwhile, by somebody who did not see it in memory yet.
        if fetch.cancelled or self._is_erased(record, tenant):
            self._store.erase([record.key])
            self._end(fetch, fetch.cancelled or "erased")
            return
        self._chain.write_back(record, chosen.context, tenant, found_in=fetch.tier)
        self._end(fetch, "fetched")

    def fail(self, fetch: Fetch, error: Exception) -> None:
        """End a fetch whose step raised; a damaged record goes from its tier."""
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
        self._ended(fetch)

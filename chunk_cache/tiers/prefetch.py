"""A record that a thread fetches layer by layer, ahead of whoever computes with it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from chunk_cache.errors import ChunkCacheError, GoneRecordError
from chunk_cache.layouts.base import LayerKV
from chunk_cache.records import ChunkKV
from chunk_cache.tiers.encoding import (
    Buffer,
    DamagedRecordError,
    RecordHeader,
    assemble_record,
    decode_layer,
)
from chunk_cache.tiers.header_reader import HeaderReader

_STEP_BYTES = 4 << 20
"""Bytes that one call fetches at most, unless one layer is longer."""

_UNREAD_S = 120.0
"""A record that nobody reads for so long is let go, seconds."""

FetchLayers = Callable[[int, int], Sequence[Buffer | None]]
"""Bytes of the layers ``[first, last)``; ``None`` for all where the record is gone. Raises :class:`OSError`."""


class FetchGate:
    """Lets a number of calls to one place run at once, and knows when the last one ended.

    Parameters
    ----------
    calls : int
        How many.
    """

    def __init__(self, calls: int) -> None:
        self._free = threading.Semaphore(calls)
        self.ended_at = time.monotonic()
        """When a call brought something last, :func:`time.monotonic`."""

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Wait for a turn, and have it."""
        with self._free:
            yield
            self.ended_at = time.monotonic()


class PrefetchedRecord(HeaderReader):
    """A :class:`~chunk_cache.LayerReader` of a record whose header is here and whose layers are on their way.

    A thread fetches, checks and decodes layers: the first one at once, the others when the first is asked for. So of
    many records that were opened and are not read yet, little lies in memory. A layer is let go when it is read.

    Parameters
    ----------
    header : RecordHeader
        Of the record.
    fetch : callable
        See :data:`FetchLayers`; called from the thread, for layers in order.
    wait_s : float
        Longest that all calls of :meth:`layer` together wait for `fetch`, seconds: a place that is slow without being
        dead costs a request no more than this either. What they wait behind other records does not count, unless
        nothing came for any record for so long: a place that is busy is not down.
    gate : FetchGate
        Taken for each call of `fetch`: so many run at once, whatever number of records is read.
    damaged : callable
        Called from the thread where a layer is not what was written, or one of several is missing.
    gone : callable
        Called from the thread where the record is not there any more.
    """

    def __init__(
        self,
        header: RecordHeader,
        fetch: FetchLayers,
        *,
        wait_s: float,
        gate: FetchGate,
        damaged: Callable[[], None] = lambda: None,
        gone: Callable[[], None] = lambda: None,
    ) -> None:
        self.header = header
        self._fetch = fetch
        self._wait_s = self._left_s = wait_s
        self._is_fetching = False
        self._gate = gate
        self._damaged = damaged
        self._gone = gone
        self._layers: dict[int, LayerKV] = {}
        """What is here and was not read yet."""
        self._num_fetched = 0
        self._is_asked = False
        self._error: Exception | None = None
        self._stopped = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="chunk-kv-prefetch", daemon=True).start()

    def layer(self, index: int, start: int = 0, end: int | None = None) -> LayerKV:
        """Tokens ``[start, end)`` of one layer, on the CPU.

        Raises
        ------
        TimeoutError
            The record's time is up.
        OSError
            The place failed.
        ChunkCacheError
            The layer is damaged (:class:`~chunk_cache.DamagedRecordError`), or the record is gone
            (:class:`~chunk_cache.GoneRecordError`).
        """
        if not 0 <= index < self.num_layers:
            raise ChunkCacheError(
                f"layer {index} of {self.num_layers}: allowed is 0 to {self.num_layers - 1}"
            )
        began = time.monotonic()
        with self._changed:
            self._is_asked = True
            self._changed.notify_all()
            while self._num_fetched <= index:
                if self._error is not None:
                    raise self._error
                now, counts = time.monotonic(), self._is_fetching
                left_s = self._wait_s - (now - max(began, self._gate.ended_at))
                left_s = self._left_s if counts else left_s
                if left_s <= 0:
                    self._stopped = True
                    raise TimeoutError(f"layer {index} of {self.num_layers} did not come in time")
                self._changed.wait(left_s)
                if counts:
                    self._left_s -= time.monotonic() - now
            if index not in self._layers:
                raise ChunkCacheError(f"layer {index} was read already, and is not kept")
            layer = self._layers.pop(index)
        return LayerKV(layer.k[start:end], layer.v[start:end])

    def record(self) -> ChunkKV:
        """Return the whole record, for a tier above; raises as :meth:`layer`."""
        return assemble_record(self.header, [self.layer(i) for i in range(self.num_layers)])

    def close(self) -> None:
        """Fetch no more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        first = 0
        try:
            while first < self.num_layers and not self._stopped:
                last = self._step(first)
                with self._gate.call():
                    self._note_fetching(True)
                    found = self._fetch(first, last)
                self._note_fetching(False)
                if len(found) != last - first:
                    raise DamagedRecordError(f"chunk {self.header.key}: {len(found)} layers came")
                if all(data is None for data in found):
                    raise GoneRecordError(f"chunk {self.header.key} went while it was read")
                for index, data in enumerate(found, first):
                    if data is None:
                        raise DamagedRecordError(
                            f"chunk {self.header.key}: layer {index} is missing"
                        )
                    layer = decode_layer(self.header, index, data)
                    with self._changed:
                        self._layers[index] = layer
                        self._num_fetched += 1
                        self._changed.notify_all()
                first = last
                self._wait_for_a_reader()
        except Exception as error:  # whoever waits for the layer hears of it
            with self._changed:
                self._error = error
                self._changed.notify_all()
            found_out: dict[type[Exception], Callable[[], None]] = {
                DamagedRecordError: self._damaged,
                GoneRecordError: self._gone,
            }
            with contextlib.suppress(OSError):
                found_out.get(type(error), lambda: None)()

    def _wait_for_a_reader(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_asked or self._stopped, _UNREAD_S):
                raise TimeoutError(f"chunk {self.header.key} was opened, and not read in time")

    def _note_fetching(self, is_fetching: bool) -> None:
        with self._changed:
            self._is_fetching = is_fetching
            self._changed.notify_all()

    def _step(self, first: int) -> int:
        """One layer at first, so that computing begins; then as many as a call may bring."""
        if first == 0:
            return 1
        last, begin = first + 1, self.header.layer_range(first)[0]
        while last < self.num_layers and self.header.layer_range(last)[1] - begin <= _STEP_BYTES:
            last += 1
        return last

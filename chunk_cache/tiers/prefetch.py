"""A record that a thread fetches layer by layer, ahead of whoever computes with it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from chunk_cache.errors import ChunkCacheError
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

Fetch = Callable[[int, int], Sequence[Buffer | None]]
"""Bytes of the layers ``[first, last)``; ``None`` for one that is gone. Raises :class:`OSError`."""


class PrefetchedRecord(HeaderReader):
    """A :class:`~chunk_cache.LayerReader` of a record whose header is here and whose layers are on their way.

    Fetching begins at once, in a thread; layers are checked and decoded there.

    Parameters
    ----------
    header : RecordHeader
        Of the record.
    fetch : callable
        See :data:`Fetch`; called from the thread, for layers in order.
    wait_s : float
        Longest that all calls of :meth:`layer` together wait, seconds: a place that is slow without being dead
        costs a request no more than this either.
    gate : semaphore
        Taken for each call of `fetch`: so many run at once, whatever number of records is read.
    damaged : callable
        Called from the thread where a layer is not what was written, or gone.
    """

    def __init__(
        self,
        header: RecordHeader,
        fetch: Fetch,
        *,
        wait_s: float,
        gate: threading.Semaphore,
        damaged: Callable[[], None] = lambda: None,
    ) -> None:
        self.header = header
        self._fetch = fetch
        self._left_s = wait_s
        self._gate = gate
        self._damaged = damaged
        self._layers: list[LayerKV] = []
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
            The layer is damaged or gone.
        """
        if not 0 <= index < self.num_layers:
            raise ChunkCacheError(
                f"layer {index} of {self.num_layers}: allowed is 0 to {self.num_layers - 1}"
            )
        began = time.monotonic()
        with self._changed:
            there = self._changed.wait_for(
                lambda: len(self._layers) > index or self._error is not None, self._left_s
            )
            self._left_s = max(0.0, self._left_s - (time.monotonic() - began))
            if len(self._layers) > index:
                layer = self._layers[index]
                return LayerKV(layer.k[start:end], layer.v[start:end])
            if there and self._error is not None:
                raise self._error
            self._stopped = True
        raise TimeoutError(f"layer {index} of {self.num_layers} did not come in time")

    def record(self) -> ChunkKV:
        """Return the whole record, for a tier above; raises as :meth:`layer`."""
        return assemble_record(self.header, [self.layer(i) for i in range(self.num_layers)])

    def close(self) -> None:
        """Fetch no more."""
        with self._changed:
            self._stopped = True

    def _run(self) -> None:
        first = 0
        try:
            while first < self.num_layers and not self._stopped:
                last = self._step(first)
                with self._gate:
                    found = self._fetch(first, last)
                if len(found) != last - first:
                    raise DamagedRecordError(f"chunk {self.header.key}: {len(found)} layers came")
                for index, data in enumerate(found, first):
                    if data is None:
                        raise DamagedRecordError(f"chunk {self.header.key}: layer {index} is gone")
                    layer = decode_layer(self.header, index, data)
                    with self._changed:
                        self._layers.append(layer)
                        self._changed.notify_all()
                first = last
        except Exception as error:  # whoever waits for the layer hears of it
            with self._changed:
                self._error = error
                self._changed.notify_all()
            if isinstance(error, DamagedRecordError):
                with contextlib.suppress(OSError):
                    self._damaged()

    def _step(self, first: int) -> int:
        """One layer at first, so that computing begins; then as many as a call may bring."""
        if first == 0:
            return 1
        last, begin = first + 1, self.header.layer_range(first)[0]
        while last < self.num_layers and self.header.layer_range(last)[1] - begin <= _STEP_BYTES:
            last += 1
        return last

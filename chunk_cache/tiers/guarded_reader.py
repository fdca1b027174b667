"""A record of a tier that may hang or be gone: each of its layers costs one bounded wait at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from chunk_cache.errors import ChunkCacheError, GoneRecordError
from chunk_cache.layouts.base import LayerKV
from chunk_cache.tiers.guarded_calls import GuardedCalls

T = TypeVar("T")


class GuardedReader:
    """A :class:`LayerReader` whose failures open the breaker of its tier, and which fails at once while it is open."""

    def __init__(self, guard: GuardedCalls, reader: Any) -> None:
        self._guard = guard
        self._reader = reader
        self._hangs = False

    def __getattr__(self, name: str) -> Any:
        """Everything else is the reader's own: token ids, layout, numbers."""
        return getattr(self._reader, name)

    def close(self) -> None:
        """Read no more. A file that hangs is closed when its call returns, if ever: nobody waits for that."""
        close = getattr(self._reader, "close", None)
        if close is not None and not self._hangs:
            close()

    @property
    def layout(self) -> str:
        """Name of the record's layout."""
        layout: str = self._reader.layout
        return layout

    def layer(self, index: int, start: int = 0, end: int | None = None) -> LayerKV:
        """Tokens of one layer; raises as the contract says, at once where the tier is down."""
        layer: LayerKV = self._demand(lambda: self._reader.layer(index, start, end))
        self._came(layer)
        return layer

    def layers_into(self, first: int, places: Sequence[LayerKV]) -> bool:
        """Write layers into their places, or return False where the reader cannot.

        A call that is given up may write there later: nobody reads a place that was not filled, and the call keeps its
        memory.
        """
        into = getattr(self._reader, "layers_into", None)
        if into is None or not self._demand(lambda: bool(into(first, places))):
            return False
        self._came(*places)
        return True

    def _demand(self, call: Callable[[], T]) -> T:
        try:
            return self._guard.demand_layer(call)
        except ChunkCacheError as error:
            self._guard.count("gone" if isinstance(error, GoneRecordError) else "damaged")
            raise
        except TimeoutError:
            self._hangs = True
            raise

    def _came(self, *layers: LayerKV) -> None:
        self._guard.count("layers", len(layers))
        self._guard.count("bytes", sum(layer.k.nbytes + layer.v.nbytes for layer in layers))

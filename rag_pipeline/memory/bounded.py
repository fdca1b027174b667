"""A table of what is cheap to keep and costly to make again, of a fixed size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedTable(Generic[K, V]):
    """Keeps the entries that were used last; safe for several threads.

    Parameters
    ----------
    size : int
        Most entries.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._rows: OrderedDict[K, V] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: K) -> V | None:
        """Return the entry, and note its use; None where there is none."""
        with self._lock:
            if key not in self._rows:
                return None
            self._rows.move_to_end(key)
            return self._rows[key]

    def put(self, key: K, value: V) -> None:
        """Keep an entry; the one that was not used for longest goes."""
        with self._lock:
            self._rows[key] = value
            self._rows.move_to_end(key)
            while len(self._rows) > self._size:
                self._rows.popitem(last=False)

    def drop(self, key: K) -> None:
        """Forget an entry, if it is there."""
        with self._lock:
            self._rows.pop(key, None)

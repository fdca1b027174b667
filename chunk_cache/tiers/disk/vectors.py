"""Several pieces of memory that one call reads or writes."""

from __future__ import annotations

from collections.abc import Sequence


def rest_of(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of pieces of bytes when the first `count` bytes are done; no piece of it is empty."""
    for number, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[number + 1 :]]
        count -= len(view)
    return []

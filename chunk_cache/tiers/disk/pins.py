"""When the pin of a record ends: the one number that its pin file holds.

The file is empty for a pin without an end. One whose end has passed counts as none, wherever it is met; the next
walk that tidies the folder removes it. So nobody has to wake up for it, and a restart changes nothing.

The process that pinned also knows the end on a clock that nobody sets, and goes by that: a wall clock that jumps ends
none of its pins early, and keeps none for longer. For other processes, and after a restart, the file is all there is.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from chunk_cache.errors import ChunkCacheError
from chunk_cache.tiers.disk.private_files import write_private

_own: dict[Path, tuple[float, float]] = {}
"""Pins with an end that this process set: what their files say, and their end by :func:`time.monotonic`."""
_MOST_OWN = 65_536
"""Where more are kept, the file is all there is of the oldest: others remove pins of ours, and nobody tells."""


def write_pin(path: Path, until: float) -> None:
    """Write a pin file.

    Parameters
    ----------
    path : Path
        Its place.
    until : float
        End of the pin, seconds since the epoch; infinite for none.

    Raises
    ------
    ChunkCacheError
        If the end is not a number.
    OSError
        Where the disk refuses.
    """
    if math.isnan(until):
        raise ChunkCacheError(f"pin until {until}: give seconds since the epoch, or infinity")
    write_private(path, b"" if math.isinf(until) else repr(float(until)).encode())
    if math.isinf(until):
        _own.pop(path, None)
    else:
        while len(_own) >= _MOST_OWN:
            _own.pop(next(iter(_own), path), None)
        _own[path] = until, time.monotonic() + until - time.time()


def remove_pin(path: Path) -> bool:
    """Remove a pin file; ``False`` if there was none.

    Raises
    ------
    OSError
        Where the disk refuses.
    """
    try:
        path.unlink()
    except FileNotFoundError:
        was_there = False
    else:
        was_there = True
    _own.pop(path, None)
    return was_there


def is_over(path: Path) -> bool:
    """Whether a pin that this process set has ended, whatever the wall clock says; the disk is not asked."""
    own = _own.get(path)  # asked once: another thread may take it out
    return own is not None and own[1] <= time.monotonic()


def read_pin(path: Path) -> float:
    """End of a pin, seconds since the epoch: infinite without one, 0 where there is no pin or its end has passed.

    What cannot be read is a pin without an end: a record that somebody wanted to keep is not lost to a fault.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        _own.pop(path, None)
        return 0.0
    except OSError:
        return math.inf
    try:
        until = float(text) if text else math.inf
    except ValueError:
        return math.inf
    now, own = time.time(), _own.get(path)
    if own is not None and own[0] == until:
        until = now + own[1] - time.monotonic()
    return until if until > now else 0.0

"""One host buffer for the tensors of all records, and which bytes of it are in use."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch

from chunk_cache.errors import ChunkCacheError, IntegrityError
from chunk_cache.host_memory import empty_mapped
from chunk_cache.records import ChunkKV

logger = logging.getLogger(__name__)

_Buffer = np.ndarray[tuple[int], np.dtype[np.uint8]]

_ALIGNMENT = 64
"""Bytes: a cache line, and more than any load instruction demands."""


class Slab:
    """Memory of a store that is asked for once, so that no order of records can make a process outgrow its budget.

    Records get blocks by best fit; neighbouring free blocks are one. A block is free again when the last tensor that
    lies in it is gone, whoever held it: that a reader sees another record's bytes is thereby impossible on the host.
    Locks are the store's job; tensors may die in any thread. Whoever copies from it without waiting holds the tensors
    until the copy is over.

    Parameters
    ----------
    num_bytes : int
        Size of the buffer. Without pinning, pages that were never written take no memory.
    pinned : bool, optional
        Page-locked, which copies to a GPU need to run beside the host; by default where there is a GPU. Where the
        system refuses, the buffer is ordinary memory, and a warning says so.
    """

    def __init__(self, num_bytes: int, *, pinned: bool | None = None) -> None:
        self.num_bytes = num_bytes // _ALIGNMENT * _ALIGNMENT
        locked = _pinned(self.num_bytes) if _wants_pinning(pinned) else None
        self.pinned = locked is not None
        self._buffer = (
            empty_mapped((self.num_bytes,), torch.uint8).numpy() if locked is None else locked
        )
        self._start = int(self._buffer.ctypes.data)
        self._free: dict[int, int] = {}
        self._free_ends: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self._used: dict[int, int] = {}
        self._blocks: dict[int, weakref.finalize[[int], _Buffer]] = {}
        """Of each block in use what notes its end."""
        # Tensors die wherever the collector runs, also inside the methods here: they only leave a note.
        self._returned: deque[int] = deque()
        if self.num_bytes:
            self._add_free(0, self.num_bytes)

    @property
    def free_bytes(self) -> int:
        """Bytes of all free blocks."""
        self._take_back()
        return sum(self._free.values())

    def adopt(self, record: ChunkKV) -> ChunkKV | None:
        """Copy a record's tensors into a block.

        Returns
        -------
        ChunkKV or None
            The same record, its tensors views of the slab; ``None`` where no free block is large enough.
        """
        self._take_back()
        size = self.block_bytes(record)
        at = bisect.bisect_left(self._by_size, (size, 0))
        if at == len(self._by_size):
            return None
        found, start = self._by_size[at]
        self._drop_free(start, found)
        if found > size:
            self._add_free(start + size, found - size)
        self._used[start] = size
        block = self._buffer[start : start + size]
        # The tensors keep `block` alive, and views of them do.
        self._blocks[start] = weakref.finalize(block, self._returned.append, start)
        self._blocks[start].atexit = False
        places = _views(block, record)
        for place, tensor in zip(places, (record.k, record.v), strict=True):
            place.copy_(tensor)
        return dataclasses.replace(record, k=places[0], v=places[1])

    def reviver(self, record: ChunkKV) -> Callable[[], ChunkKV | None]:
        """Return what makes a record whole again that is dropped, as long as somebody's tensor keeps its block.

        It holds no tensor itself, and returns ``None`` once the block may be another's. Called under the store's
        lock, as everything here.
        """
        noted = self._blocks[self._block_of(record)]
        form = dataclasses.replace(record, k=record.k.to("meta"), v=record.v.to("meta"))

        def revive() -> ChunkKV | None:
            found = noted.peek()
            if found is None:
                return None
            k, v = _views(found[0], form)
            return dataclasses.replace(form, k=k, v=v)

        return revive

    def fits(self, record: ChunkKV, without: Iterable[ChunkKV]) -> bool:
        """Whether a record would find a block if others, which lie here, were gone."""
        self._take_back()
        size = self.block_bytes(record)
        if self._by_size and self._by_size[-1][0] >= size:
            return True
        gone = [(start, self._used[start]) for start in map(self._block_of, without)]
        end = run = 0
        for start, length in sorted([*self._free.items(), *gone]):
            run = run + length if start == end else length
            end = start + length
            if run >= size:
                return True
        return False

    @staticmethod
    def block_bytes(record: ChunkKV) -> int:
        """Bytes of the block that a record takes; less than :attr:`ChunkKV.num_bytes`."""
        return _aligned(record.k.nbytes) + _aligned(record.v.nbytes)

    def check(self, records: Iterable[ChunkKV]) -> None:
        """Check that blocks cover the buffer without overlap, and that records lie in blocks of theirs.

        Raises
        ------
        IntegrityError
            Naming the first contradiction.
        """
        self._take_back()
        end, was_free = 0, False
        for start, length in sorted([*self._free.items(), *self._used.items()]):
            free = start in self._free
            if start != end or length <= 0 or start % _ALIGNMENT:
                raise IntegrityError(f"slab: a block of {length} bytes at {start}, expected {end}")
            if free and was_free:
                raise IntegrityError(f"slab: two free blocks meet at {start}")
            end, was_free = start + length, free
        if end != self.num_bytes:
            raise IntegrityError(f"slab: blocks end at {end} of {self.num_bytes} bytes")
        ends = {start + length: start for start, length in self._free.items()}
        sizes = sorted((length, start) for start, length in self._free.items())
        if ends != self._free_ends or sizes != self._by_size:
            raise IntegrityError("slab: the orders of the free blocks differ")
        seen: set[int] = set()
        for record in records:
            start = self._block_of(record)
            if start in seen or self._used.get(start) != self.block_bytes(record):
                raise IntegrityError(f"slab: chunk {record.key} has no block of its own")
            seen.add(start)

    def _block_of(self, record: ChunkKV) -> int:
        start = int(record.k.data_ptr()) - self._start
        if start not in self._used:
            raise IntegrityError(f"slab: chunk {record.key} does not lie in it")
        return start

    def _take_back(self) -> None:
        if self.pinned and self._returned:
            # A copy to the device may still read the block: it was only queued when its reader let go.
            torch.cuda.synchronize()
        while self._returned:
            start = self._returned.popleft()
            size = self._used.pop(start)
            del self._blocks[start]
            if start + size in self._free:
                behind = self._free[start + size]
                self._drop_free(start + size, behind)
                size += behind
            if start in self._free_ends:
                front = self._free_ends[start]
                length = self._free[front]
                self._drop_free(front, length)
                start, size = front, size + length
            self._add_free(start, size)

    def _add_free(self, start: int, size: int) -> None:
        self._free[start] = size
        self._free_ends[start + size] = start
        bisect.insort(self._by_size, (size, start))

    def _drop_free(self, start: int, size: int) -> None:
        del self._free[start]
        del self._free_ends[start + size]
        del self._by_size[bisect.bisect_left(self._by_size, (size, start))]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _views(block: _Buffer, form: ChunkKV) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a record's shapes in its block."""
    raw = torch.from_numpy(block)
    k, v = form.k, form.v
    first = _aligned(k.nbytes)
    return (
        raw[: k.nbytes].view(k.dtype).view(k.shape),
        raw[first : first + v.nbytes].view(v.dtype).view(v.shape),
    )


def _wants_pinning(pinned: bool | None) -> bool:
    if pinned and not torch.cuda.is_available():
        raise ChunkCacheError("pinned=True: there is no GPU here; leave it out")
    return torch.cuda.is_available() if pinned is None else pinned


def _pinned(num_bytes: int) -> _Buffer | None:
    try:
        buffer: _Buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    except RuntimeError as error:
        logger.warning(
            "%d bytes for chunk KV cannot be page-locked (%s): loading to the GPU is slower. Lower "
            "fusion.store_bytes or raise the limit of locked memory.",
            num_bytes,
            str(error).splitlines()[0],
        )
        return None
    return buffer

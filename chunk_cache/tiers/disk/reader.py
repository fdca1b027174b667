"""One chunk file, read layer by layer; nothing of it is believed before its checksum."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from chunk_cache.codecs.base import LOSSLESS
from chunk_cache.errors import GoneRecordError
from chunk_cache.keys import ChunkKey
from chunk_cache.layouts.base import LayerKV
from chunk_cache.records import ChunkKV
from chunk_cache.tiers.disk.vectors import rest_of
from chunk_cache.tiers.encoding import (
    DamagedRecordError,
    RecordHeader,
    assemble_record,
    check_layer,
    decode_layer,
    header_size,
    read_header,
)
from chunk_cache.tiers.header_reader import HeaderReader

_FIRST_BYTES = 16 << 10
"""Read at once; most headers are shorter."""
_GONE = (errno.ESTALE, errno.ENOENT)
"""What a network file system says of an open file that another machine removed."""


class FileReader(HeaderReader):
    """A record's file, open: a :class:`~chunk_cache.LayerReader` that has read the header only.

    The file stays readable until :meth:`close`, or until nobody holds the reader, though it is removed or replaced
    meanwhile. It is read with ``pread``, never mapped: a file that is cut under a map kills the process. Several
    threads may read. Reading ends when the disk answers; a disk that hangs holds the caller up.

    Parameters
    ----------
    path : Path
        The file.
    key : ChunkKey
        Which record it should hold.
    damaged : callable, optional
        Told the number (inode) of the file when a part of it turns out to be damaged, before it is raised.

    Raises
    ------
    OSError
        If it cannot be read.
    GoneRecordError
        If it was removed meanwhile and the file system does not keep what is open, as a network's does not.
    DamagedRecordError
        If the header is not of this record, or the file is not as long as the header says.
    """

    def __init__(
        self,
        path: Path,
        key: ChunkKey,
        damaged: Callable[[int], None] = lambda number: None,
    ) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._damaged = damaged
        try:
            self.header = self._read_header(key)
        except BaseException:
            self.close()
            raise

    def _read_header(self, key: ChunkKey) -> RecordHeader:
        status = os.fstat(self._descriptor)
        self._number = status.st_ino
        try:
            data = self._read(0, min(_FIRST_BYTES, status.st_size))
            wanted = header_size(key, data)
            if wanted > len(data):
                data = self._read(0, min(wanted, status.st_size))
            header = read_header(key, data)
            if header is None or header.num_bytes != status.st_size:
                raise DamagedRecordError(f"chunk {key}: its file has another header or length")
        except DamagedRecordError:
            self._damaged(self._number)
            raise
        return header

    # -- LayerReader --------------------------------------------------------------------------

    def layer(self, index: int, start: int = 0, end: int | None = None) -> LayerKV:
        """Tokens ``[start, end)`` of one layer, on the CPU; the whole layer is read, for its checksum.

        Raises
        ------
        OSError
            If the disk refuses.
        GoneRecordError
            If it was removed meanwhile.
        DamagedRecordError
            If it is not what was written.
        """
        try:
            layer = decode_layer(self.header, index, self._read(*self.header.layer_range(index)))
        except DamagedRecordError:
            self._damaged(self._number)
            raise
        return LayerKV(layer.k[start:end], layer.v[start:end])

    def layers_into(self, first: int, places: Sequence[LayerKV]) -> bool:
        """Read layers straight into memory of their shapes; see :class:`~chunk_cache.tiers.base.DirectReader`.

        They lie one behind the other in the file, so that one call reads them all.

        Raises
        ------
        OSError
            If the disk refuses.
        DamagedRecordError
            If one is not what was written.
        """
        views = [self._views(first + number, place) for number, place in enumerate(places)]
        if not all(views):
            return False
        self._read_into(
            [one for layer in views for one in layer], self.header.layer_range(first)[0]
        )
        try:
            for number, layer in enumerate(views):
                check_layer(self.header, first + number, *layer)
        except DamagedRecordError:
            self._damaged(self._number)
            raise
        return True

    def _views(self, index: int, place: LayerKV) -> list[memoryview]:
        """The memory of a layer's tensors in their order in the file; empty where it is stored otherwise."""
        parts, stored = place._asdict(), self.header.tensors[index]
        is_plain = self.header.codec == LOSSLESS and len(stored) == len(parts)
        if not is_plain or any(
            one.name not in parts
            or (one.shape, one.dtype) != (tuple(parts[one.name].shape), parts[one.name].dtype)
            or not parts[one.name].is_contiguous()
            for one in stored
        ):
            return []
        return [parts[one.name].view(-1).view(torch.uint8).numpy().data for one in stored]

    # -- more ---------------------------------------------------------------------------------

    def record(self) -> ChunkKV:
        """Read everything; raises as :meth:`layer` does."""
        return assemble_record(self.header, map(self.layer, range(self.num_layers)))

    def check(self) -> None:
        """Read everything and decode nothing; raises as :meth:`layer` does."""
        for index in range(self.num_layers):
            check_layer(self.header, index, self._read(*self.header.layer_range(index)))

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        self._descriptor = -1  # the number may soon be another file's
        self._close()

    def _read(self, start: int, end: int) -> memoryview:
        """Bytes ``[start, end)`` of the file; fewer where it ends before."""
        view = np.empty(end - start, dtype=np.uint8).data
        return view[: self._read_into([view], start)]

    def _read_into(self, views: Sequence[memoryview], start: int) -> int:
        """Fill views with the bytes from `start` on, one behind the other; returns how many there were."""
        left, done = list(views), 0
        while left:
            try:
                count = os.preadv(self._descriptor, left, start + done)
            except OSError as error:
                if error.errno in _GONE:
                    raise GoneRecordError(f"a file went while it was read: {error}") from None
                raise
            if not count:
                break
            done += count
            left = rest_of(left, count)
        return done

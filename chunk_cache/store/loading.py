"""A record on its way into memory: leased and used while its later layers are still being read.

One thread fills the layers in order; any number of forwards wait for the layer that they need. This is the paper's
layer-wise pre-loading (CachedAttention, https://arxiv.org/abs/2403.19708, section 3.2): layer ``l + 1`` is loaded while
layer ``l`` is computed.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from chunk_cache.errors import DamagedRecordError, LoadError
from chunk_cache.keys import ChunkKey, TokenIds
from chunk_cache.layouts.base import LayerKV
from chunk_cache.records import ChunkKV


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RecordForm:
    """Shapes and dtypes of the records of one engine.

    Attributes
    ----------
    layout : str
        Name of their :class:`~chunk_cache.KVLayout`.
    k, v : Tensor
        As of a record (``[L, T, H, D]``, ``[L, T, H, D_v]``) of any number of tokens; only shape and dtype count.
    """

    layout: str
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, record: ChunkKV) -> Self:
        """Form of a record."""
        return cls(record.layout, record.k[:, :0], record.v[:, :0])

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return int(self.k.shape[0])

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return sum(
            part.shape[0] * math.prod(part.shape[2:]) * part.element_size()
            for part in (self.k, self.v)
        )

    def empty(
        self,
        key: ChunkKey,
        token_ids: TokenIds,
        base_position: int,
        codec: str = "plain",
        side: Mapping[str, Tensor] | None = None,
    ) -> ChunkKV:
        """Make a record on the host whose K and V nobody has written yet."""
        k, v = (
            torch.empty(part.shape[0], key.num_tokens, *part.shape[2:], dtype=part.dtype)
            for part in (self.k, self.v)
        )
        return ChunkKV(
            key=key,
            token_ids=token_ids,
            base_position=base_position,
            k=k,
            v=v,
            layout=self.layout,
            codec=codec,
            side=side or {},
        )


class Patience:
    """How long forwards wait for the layers of records that were asked for together, all waits added up.

    Parameters
    ----------
    seconds : float
        What there is of it.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        """Seconds that may still be waited."""
        return self._left

    def spend(self, seconds: float) -> None:
        """Note a wait."""
        with self._lock:
            self._left = max(0.0, self._left - seconds)


class LoadingChunk:
    """A record whose layers arrive in order: a :class:`~chunk_cache.LayerReader`.

    Thread-safe: one thread calls :meth:`fill` and :meth:`fail`, any thread the rest. What :meth:`layer` returned
    is never written again.

    Parameters
    ----------
    record : ChunkKV
        With unwritten tensors (:meth:`RecordForm.empty`); complete when the last layer was filled.
    patience : Patience
        How long its readers wait.
    source : str
        Name of the tier that it comes from.
    """

    def __init__(self, record: ChunkKV, patience: Patience, source: str = "") -> None:
        self.record = record
        self.source = source
        self._patience = patience
        self._num_filled = 0
        self._fault: Exception | None = None
        self._changed = threading.Condition()

    # -- LayerReader --------------------------------------------------------------------------

    @property
    def key(self) -> ChunkKey:
        """Key of the record."""
        return self.record.key

    @property
    def token_ids(self) -> TokenIds:
        """Token ids of the record."""
        return self.record.token_ids

    @property
    def base_position(self) -> int:
        """Position at which the first token's KV was computed."""
        return self.record.base_position

    @property
    def layout(self) -> str:
        """Name of the layout."""
        return self.record.layout

    @property
    def codec(self) -> str:
        """Name of the codec that the KV went through."""
        return self.record.codec

    @property
    def side(self) -> Mapping[str, Tensor]:
        """Side tensors of the record, there from the beginning on."""
        return self.record.side

    @property
    def is_lossless(self) -> bool:
        """Whether every bit is as the model computed it."""
        return self.record.is_lossless

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.record.num_layers

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self.record.num_tokens

    @property
    def num_bytes(self) -> int:
        """What the record is charged against a byte budget, from the beginning on."""
        return self.record.num_bytes

    def layer(self, index: int, start: int = 0, end: int | None = None) -> LayerKV:
        """Tokens ``[start, end)`` of one layer; waits for that layer, as long as there is patience.

        Raises
        ------
        LoadError
            If the layer does not come: reading failed, or it takes too long.
        """
        with self._changed:
            if self._num_filled <= index and self._fault is None:
                began = time.monotonic()
                self._changed.wait_for(
                    lambda: self._num_filled > index or self._fault is not None,
                    self._patience.left,
                )
                self._patience.spend(time.monotonic() - began)
            if self._num_filled <= index:
                why = repr(self._fault) if self._fault is not None else "it takes too long"
                raise LoadError(f"layer {index} of chunk {self.key} was not loaded: {why}")
        return self.record.layer(index, start, end)

    # -- filling ------------------------------------------------------------------------------

    @property
    def num_filled(self) -> int:
        """Layers that are there."""
        return self._num_filled

    @property
    def is_usable(self) -> bool:
        """Whether it makes sense to begin with it: nothing failed, and there is patience to wait for what is missing."""
        with self._changed:
            is_whole = self._num_filled == self.num_layers
            return self._fault is None and (is_whole or self._patience.left > 0)

    def fill(self, index: int, layer: LayerKV) -> None:
        """Write the next layer.

        Raises
        ------
        DamagedRecordError
            If it is not the next, or not of the shapes and dtypes of the record.
        """
        place = self.place(index)
        for there, given in zip(place, layer, strict=True):
            if there.shape != given.shape or there.dtype != given.dtype:
                raise DamagedRecordError(
                    f"layer {index} of chunk {self.key} is {list(given.shape)} of {given.dtype}; "
                    f"this engine's are {list(there.shape)} of {there.dtype}"
                )
        for there, given in zip(place, layer, strict=True):
            there.copy_(given)
        self.filled(index)

    def place(self, index: int) -> LayerKV:
        """Memory of the next layer, to be written by the thread that calls :meth:`filled`; nobody reads it before.

        Raises
        ------
        DamagedRecordError
            If it is not the next.
        """
        if index != self._num_filled:
            raise DamagedRecordError(
                f"layer {index} of chunk {self.key} came after {self._num_filled}"
            )
        return self.record.layer(index)

    def places(self, first: int, number: int) -> list[LayerKV]:
        """:meth:`place` of the next layers together."""
        return [self.place(first), *map(self.record.layer, range(first + 1, first + number))]

    def filled(self, index: int) -> None:
        """Say that the layer of :meth:`place`, and all before it, are whole; whoever waits for them goes on."""
        with self._changed:
            self._num_filled = index + 1
            self._changed.notify_all()

    def fail(self, fault: Exception) -> None:
        """Nothing more will come; whoever waits is told. A record that is whole stays so."""
        with self._changed:
            if self._num_filled < self.num_layers:
                self._fault = fault
            self._changed.notify_all()

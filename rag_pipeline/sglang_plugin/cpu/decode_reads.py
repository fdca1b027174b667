"""Which keys the requests of a decode batch read, where an attention method says so: pure data between the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

DECODE_READS_KEY = "rag_decode_reads"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodeReads:
    """Keys of a decode batch; travels in ``ForwardBatch.model_specific_states``.

    Attributes
    ----------
    positions : tuple of Tensor or None
        For each request of the batch, int64 ``[n]`` on the host: positions that its token reads, rising, its own the
        last. None for every position up to its own.
    dense_layers : tuple of frozenset of int
        For each request, the layers in which its token reads every position all the same.
    """

    positions: tuple[torch.Tensor | None, ...]
    dense_layers: tuple[frozenset[int], ...]

    def of_layer(self, layer: int) -> tuple[torch.Tensor | None, ...]:
        """:attr:`positions` in one layer."""
        return tuple(
            None if layer in dense else kept
            for kept, dense in zip(self.positions, self.dense_layers, strict=True)
        )


def find_reads(forward_batch: Any) -> DecodeReads | None:
    """Return what a batch's requests read, None where all of them read everything."""
    states = getattr(forward_batch, "model_specific_states", None)
    found = states.get(DECODE_READS_KEY) if states else None
    return found if isinstance(found, DecodeReads) else None

"""4-bit copies of a pool's keys, each made once for a slot and of no use once the slot is written again.

Shape suffixes: T tokens, N key/value heads, D head dimension. D / 2 + 4 bytes per head and slot, beside 4 D of keys and
values in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rag_kernels.sparse.sale.quantization import Int4, pack_int4, quantize_int4, unpack_int4


class SideTable:
    """One layer of a pool. Its owner is whoever writes the pool: only he knows when a slot changes.

    Each write to the pool must be followed by :meth:`write` or :meth:`invalidate` of the same slots before anything
    reads here; an entry that is not known to be that of its slot is not read. Keys of one request must be smoothed by
    one mean, so slots that requests of several means share are not for this table.

    Parameters
    ----------
    num_slots, num_heads, head_dim : int
        Of the pool; an even number of dimensions.
    device : torch.device or str
        Of the pool.
    """

    def __init__(
        self,
        num_slots: int,
        num_heads: int,
        head_dim: int,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_slots, num_heads)
        self._packed = torch.zeros((*shape, head_dim // 2), dtype=torch.uint8, device=device)
        self._scale = torch.zeros(shape, device=device)
        self._is_known = torch.zeros(num_slots, dtype=torch.bool, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return int(self._packed.nbytes + self._scale.nbytes + self._is_known.nbytes)

    def write(self, slots: Tensor, k_TND: Tensor) -> None:
        """Quantise the smoothed keys of slots, all different."""
        self._is_known[slots] = False  # a write that fails half way leaves nothing to read
        int4 = quantize_int4(k_TND.float(), "keys")
        self._packed[slots] = pack_int4(int4.values)
        self._scale[slots] = int4.scale
        self._is_known[slots] = True

    def invalidate(self, slots: Tensor) -> None:
        """Forget slots whose keys changed, moved or were given back."""
        self._is_known[slots] = False

    def missing(self, slots: Tensor) -> Tensor:
        """Those of the slots that have no entry, in their order."""
        return slots[~self._is_known[slots]]

    def read(self, slots: Tensor) -> Int4:
        """Entries of slots, ``[T, N, D]``.

        Raises
        ------
        KeyError
            One of them is missing.
        """
        if len(self.missing(slots)):
            raise KeyError("a slot has no 4-bit keys; write those that are missing first")
        return Int4(values=unpack_int4(self._packed[slots]), scale=self._scale[slots])

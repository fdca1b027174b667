"""The last look before a fused pass writes: never into KV that a request shares with others.

The radix tree owns the slots of a request's exact prefix, and other requests read them. No plan of this package names
one; a plan that does all the same, whatever the reason, is refused before its first layer runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ProtectedWriteError(RuntimeError):
    """A pass would write a slot that is not its request's to write; its batch is prefilled as usual."""


class WriteGuard:
    """Slots of a pool that the passes of one forward must not write.

    Parameters
    ----------
    pool_size : int
        Slots of the pool.
    protected : sequence of Tensor
        Integer slots, on one device: of every request of the batch, those in front of its own part.
    """

    def __init__(self, pool_size: int, protected: Sequence[Tensor]) -> None:
        slots = torch.cat([part.to(torch.int64) for part in protected])
        self._own_from = [part.numel() for part in protected]
        self._is_spared: Tensor | None = None
        self._is_protected = torch.zeros(pool_size, dtype=torch.bool, device=slots.device)
        self._is_protected.index_fill_(0, slots, True)

    def check_rows(self, first: Sequence[tuple[int, int]]) -> None:
        """Look at where a pass begins to write, on the host alone.

        Parameters
        ----------
        first : sequence of (int, int)
            Request of the batch, and the first position of it that is written.

        Raises
        ------
        ProtectedWriteError
            It lies in front of the request's own part.
        """
        for index, position in first:
            if position < self._own_from[index]:
                raise ProtectedWriteError(
                    f"a fused pass would write position {position} of request {index}, whose own part begins at "
                    f"{self._own_from[index]}"
                )

    def spare(self, slots: Tensor, otherwise: int) -> Tensor:
        """Slots to write, with another in the place of those that are protected; see :attr:`is_spared`."""
        is_wrong = self._is_protected[slots]
        found = is_wrong.any()
        self._is_spared = found if self._is_spared is None else self._is_spared | found
        return slots.masked_fill(is_wrong, otherwise)

    @property
    def is_spared(self) -> Tensor:
        """bool, on the device: whether any slot had to be replaced."""
        if self._is_spared is None:
            return torch.zeros((), dtype=torch.bool)
        return self._is_spared

    def check(self, written: Sequence[Tensor]) -> None:
        """Look at all slots that a pass is going to write.

        Raises
        ------
        ProtectedWriteError
            One of them is protected.
        """
        slots = torch.cat([part.to(self._is_protected.device, torch.int64) for part in written])
        wrong = int(self._is_protected[slots].sum())
        if wrong:
            raise ProtectedWriteError(
                f"a fused pass would write {wrong} of {slots.numel()} slots that the radix tree or an earlier "
                "piece owns"
            )

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
        self._is_protected = torch.zeros(pool_size, dtype=torch.bool, device=slots.device)
        self._is_protected[slots] = True

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

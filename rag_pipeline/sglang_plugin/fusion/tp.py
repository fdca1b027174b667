"""Agreement of tensor-parallel ranks: every rank loads the same spans and computes the same rows.

Ranks run the scheduler in step on the same requests, but each keeps its own head shard of every chunk; a record
that one rank lost would change that rank's shapes. So what is found is intersected over the ranks, and
scores are reduced before anything is selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class RankGroup:
    """The attention tensor-parallel group, or a stand-in for one rank.

    Parameters
    ----------
    coordinator : object or None
        SGLang's group coordinator (``cpu_group``, ``device_group``, ``world_size``, ``rank_in_group``).
    """

    def __init__(self, coordinator: Any = None) -> None:
        self._coordinator = coordinator
        self.size: int = 1 if coordinator is None else int(coordinator.world_size)
        self.rank: int = 0 if coordinator is None else int(coordinator.rank_in_group)

    def common(self, items: Sequence[tuple[int, ...]]) -> set[tuple[int, ...]]:
        """Those of this rank's items that every rank has. All ranks must call it together."""
        mine = set(items)
        if self.size == 1:
            return mine
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(
            gathered, sorted(mine), group=self._coordinator.cpu_group
        )
        for other in gathered:
            mine &= {tuple(item) for item in other}
        return mine

    def all_true(self, value: bool) -> bool:
        """Whether the value is true on every rank."""
        return bool(self.common([(int(value),)]) == {(1,)})

    def first(self, tensor: Tensor) -> Tensor:
        """Return the first rank's tensor of integers on every rank."""
        if self.size == 1:
            return tensor
        return self.total(tensor if self.rank == 0 else torch.zeros_like(tensor))

    def mean(self, tensor: Tensor) -> Tensor:
        """Average over the ranks; the tensor itself where there is one."""
        if self.size == 1:
            return tensor
        return self.total(tensor) / self.size

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on each."""
        if self.size == 1:
            return tensor
        reduced = tensor.contiguous().clone()
        group = (
            self._coordinator.cpu_group
            if reduced.device.type == "cpu"
            else self._coordinator.device_group
        )
        torch.distributed.all_reduce(reduced, group=group)
        return reduced

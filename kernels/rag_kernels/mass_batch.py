"""Attention mass of several requests of a pass: planned once, two launches per layer on a GPU whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rag_kernels.attention.base import LogitRules
from rag_kernels.host_copy import to_device
from rag_kernels.mass import query_attention_mass

if TYPE_CHECKING:
    from rag_kernels.mass_triton import MassRuns


_NO_RULES = LogitRules()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MassPlan:
    """What every layer of a pass needs; made by :func:`plan_attention_mass`.

    Attributes
    ----------
    rows : tuple of (int, int)
        Half-open rows of each request in the queries.
    positions : tuple of Tensor
        Per request int64 positions of those rows, on the host.
    slots : tuple of Tensor
        Per request int64 ``[kv_len]`` on the device.
    row_positions : Tensor or None
        int32 positions by row of the queries, on the device; None on the CPU.
    all_slots : Tensor or None
        int64, the slots of all requests one behind the other; None on the CPU.
    runs : MassRuns or None
        How the work is cut; None on the CPU.
    """

    rows: tuple[tuple[int, int], ...]
    positions: tuple[Tensor, ...]
    slots: tuple[Tensor, ...]
    row_positions: Tensor | None = None
    all_slots: Tensor | None = None
    runs: MassRuns | None = None

    @property
    def lengths(self) -> list[int]:
        """Keys of each request."""
        return [int(part.numel()) for part in self.slots]


def plan_attention_mass(
    rows: Sequence[tuple[int, int]],
    positions: Sequence[Tensor],
    slots: Sequence[Tensor],
    *,
    uses_triton: bool | None = None,
) -> MassPlan:
    """Plan the mass of a pass.

    Parameters
    ----------
    rows : sequence of (int, int)
        Per request: rows of the pass whose mass is wanted, half-open, rising.
    positions : sequence of Tensor
        Per request integer, on the host: absolute positions of those rows, below the number of slots.
    slots : sequence of Tensor
        Per request integer ``[kv_len]`` on the device.
    uses_triton : bool, optional
        By default where the slots are on a GPU.
    """
    device = slots[0].device
    own = tuple(part.long() for part in slots)
    plan = MassPlan(rows=tuple(rows), positions=tuple(positions), slots=own)
    if not (device.type == "cuda" if uses_triton is None else uses_triton):
        return plan
    from rag_kernels.mass_triton import cut_runs

    by_row = torch.full((max(high for _, high in rows),), -1, dtype=torch.int32)
    for (low, high), at in zip(rows, positions, strict=True):
        by_row[low:high] = at.to(torch.int32)
    return MassPlan(
        rows=plan.rows,
        positions=plan.positions,
        slots=own,
        row_positions=to_device(by_row, device),
        all_slots=torch.cat(own),
        runs=cut_runs(plan.rows, tuple(plan.lengths), device),
    )


def attention_mass(
    q_RNH: Tensor, k_pool: Tensor, plan: MassPlan, scale: float, rules: LogitRules = _NO_RULES
) -> Tensor:
    """:func:`rag_kernels.query_attention_mass` of every request, one behind the other.

    Parameters
    ----------
    q_RNH : Tensor
        ``[R, Hq, D]`` rotated queries of the pass.
    k_pool : Tensor
        ``[num_slots, Hk, D]`` with every key of the requests written.
    plan : MassPlan
        From :func:`plan_attention_mass`.
    scale : float
        Softmax scale.
    rules : LogitRules
        Window and cap of the layer; with either, request by request on a GPU too.

    Returns
    -------
    Tensor
        fp32 ``[sum of kv_len]``; split it by :attr:`MassPlan.lengths`.
    """
    if (
        rules != _NO_RULES
        or plan.runs is None
        or plan.row_positions is None
        or plan.all_slots is None
    ):
        parts = [
            query_attention_mass(q_RNH[low:high], k_pool, slots, at, slots.numel(), scale, rules)
            for (low, high), at, slots in zip(plan.rows, plan.positions, plan.slots, strict=True)
        ]
        return torch.cat(parts)
    from rag_kernels.mass_triton import mass_triton

    q = q_RNH if q_RNH.stride(-1) == 1 else q_RNH.contiguous()
    return mass_triton(q, k_pool, plan.row_positions, plan.all_slots, plan.runs, scale)

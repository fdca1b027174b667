"""Load many spans of stored KV into one layer of a paged pool, each rotated by its own position difference.

What is the same for every layer (slots, angles, how the work is cut) is planned once per forward.

Shape suffixes: S spans, T tokens of all spans, N key/value heads, H head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rag_kernels.host_copy import to_device
from rag_kernels.rotary import RotarySpec

if TYPE_CHECKING:
    from rag_kernels.load_cpu import Block


@dataclass(frozen=True, slots=True, eq=False)
class SpanLoadPlan:
    """Where the spans of one forward go, and how far each is rotated; made by :func:`plan_span_load`.

    Attributes
    ----------
    slots : Tensor
        int64 ``[T]`` on the pool's device, span after span.
    lengths : tuple of int
        Tokens of each span.
    deltas : tuple of int
        New position minus old, per span.
    cos, sin : Tensor
        fp32 ``[R, rotary_dim / 2]`` on the pool's device, one row per distinct difference.
    token_rows : Tensor
        int32 ``[T]`` on the pool's device: row of the tables of each token.
    spec : RotarySpec
        The model's rotation.
    """

    slots: Tensor
    lengths: tuple[int, ...]
    deltas: tuple[int, ...]
    cos: Tensor
    sin: Tensor
    token_rows: Tensor
    spec: RotarySpec
    blocks: dict[int, list[Block]] = field(default_factory=dict, repr=False)
    """On the CPU: how the work was cut, by key elements per token."""


def plan_span_load(
    slots: Sequence[Tensor], deltas: Sequence[int], spec: RotarySpec
) -> SpanLoadPlan:
    """Plan the loads of one forward.

    Parameters
    ----------
    slots : sequence of Tensor
        Integer ``[tokens]`` per span, on the pool's device; all slots of all spans differ.
    deltas : sequence of int
        New position minus old, per span.
    spec : RotarySpec
        The model's rotation.

    Raises
    ------
    ValueError
        There is no span, or the counts differ.

    Notes
    -----
    The angles are formed anew for each forward, once per distinct difference: 256 of 32 frequencies take less time
    than one layer of the load, so that no table is kept from one forward to the next.
    """
    if not slots or len(slots) != len(deltas):
        raise ValueError(
            f"{len(slots)} spans of slots for {len(deltas)} position differences; give one per span, and one or more."
        )
    device = slots[0].device
    lengths = torch.tensor([part.numel() for part in slots])
    distinct, rows = torch.tensor([int(delta) for delta in deltas]).unique(return_inverse=True)
    cos, sin = spec.cos_sin(distinct, device)
    return SpanLoadPlan(
        slots=torch.cat([part.long() for part in slots]),
        lengths=tuple(lengths.tolist()),
        deltas=tuple(int(delta) for delta in deltas),
        cos=cos,
        sin=sin,
        token_rows=to_device(rows.to(torch.int32).repeat_interleave(lengths), device),
        spec=spec,
    )


def load_spans_inplace(
    k_pool: Tensor,
    v_pool: Tensor,
    k_srcs: Sequence[Tensor],
    v_srcs: Sequence[Tensor],
    plan: SpanLoadPlan,
) -> None:
    """Write the spans' keys, rotated to their new positions, and their values into one layer of the pool.

    Parameters
    ----------
    k_pool, v_pool : Tensor
        ``[num_slots, N, H]`` and ``[num_slots, N, H_v]``; written at the plan's slots only.
    k_srcs, v_srcs : sequence of Tensor
        ``[tokens, N, H]`` and ``[tokens, N, H_v]`` per span of the plan, as stored: keys carry the rotation of the
        position they were computed at. Any floating type, on any device; each value is rounded once to the pool's
        type. The keys of a span whose difference is 0 are copied bit for bit.
    plan : SpanLoadPlan
        Serves every layer.

    Raises
    ------
    ValueError
        The sources do not fit the plan or the pools; nothing was written.
    """
    _check(k_pool, k_srcs, "keys", plan)
    _check(v_pool, v_srcs, "values", plan)
    if k_pool.shape[-1] < plan.spec.rotary_dim:
        raise ValueError(
            f"keys have {k_pool.shape[-1]} dimensions per head; {plan.spec.rotary_dim} are to be rotated."
        )
    if k_pool.device.type == "cuda":
        from rag_kernels.load_triton import load_spans_triton

        load_spans_triton(k_pool, v_pool, k_srcs, v_srcs, plan)
    else:
        from rag_kernels.load_cpu import load_spans_cpu

        load_spans_cpu(k_pool, v_pool, k_srcs, v_srcs, plan)


def _check(pool: Tensor, sources: Sequence[Tensor], what: str, plan: SpanLoadPlan) -> None:
    given = [int(source.shape[0]) for source in sources]
    if tuple(given) != plan.lengths:
        raise ValueError(
            f"{what} of {given} tokens for spans of {list(plan.lengths)}; the counts must agree."
        )
    for source in sources:
        if source.shape[1:] != pool.shape[1:]:
            raise ValueError(
                f"{what} of shape {list(source.shape)} for a pool of shape {list(pool.shape)}; "
                "heads and dimensions must agree."
            )

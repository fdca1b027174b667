"""Mean shift: move the rows that stay cached by the average change of the recomputed rows of their chunk.

Per chunk ``c`` with ``n_c >= 2`` recomputed tokens and strength ``A`` the weight is ``A * n_c / (n_c + 4)``. The
mean of ``K_new - K_cached`` is taken with the rotation removed and added, rotated, to every other token of
the chunk; the mean of ``V_new - V_cached`` is added as it is. After AgentKVShift (arXiv 2607.21604), which has no
damping; the damping and ``A = 0.4`` were found by measurement on small models, above 0.7 the mean KL rises.

Only differences of positions inside a chunk matter, so the rotations are taken from the chunk's first
position: small angles, and the same table for every layer.

Shape suffixes: T tokens, N key/value heads, H head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.rotary import RotarySpec, rotate

_DAMPING = 4.0
_FEWEST_PROBES = 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShiftedChunk:
    """One chunk's share of a plan: tensors on the device, see :func:`plan_mean_shift`."""

    weight: float
    probe_rows: Tensor
    probe_slots: Tensor
    probe_cos: Tensor
    probe_sin: Tensor
    other_slots: Tensor
    other_cos: Tensor
    other_sin: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeanShiftPlan:
    """What every layer needs for the shift; made by :func:`plan_mean_shift`."""

    chunks: tuple[ShiftedChunk, ...]
    spec: RotarySpec


def plan_mean_shift(
    chunks: Sequence[tuple[int, int]],
    row_positions: Tensor,
    slots: Tensor,
    spec: RotarySpec,
    strength: float = 0.4,
    first_row: int = 0,
) -> MeanShiftPlan:
    """Plan the shift of one request.

    Parameters
    ----------
    chunks : sequence of (int, int)
        Half-open ranges of positions, one per chunk, of reused tokens.
    row_positions : Tensor
        Integer ``[R]`` on the host: positions of the request's computed rows, in the order of the layer's new
        keys. Rows outside the chunks are ignored.
    slots : Tensor
        Integer ``[kv_len]`` on the device; slot ``j`` holds position ``j``.
    spec : RotarySpec
        The model's rotation.
    strength : float
        ``A``, 0 to 1.
    first_row : int
        Row of the new keys where this request begins, for a batch.

    Returns
    -------
    MeanShiftPlan
        Chunks with fewer than 2 recomputed tokens, or with no other token, are left out.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(
            f"mean-shift strength is {strength}; it must be between 0 and 1 (0.4 is usual)."
        )
    device = slots.device
    rows = row_positions.detach().to("cpu", torch.int64)
    planned = []
    for start, end in chunks:
        inside = (rows >= start) & (rows < end)
        count = int(inside.sum())
        stays = torch.ones(end - start, dtype=torch.bool)
        stays[rows[inside] - start] = False
        if strength == 0.0 or count < _FEWEST_PROBES or not bool(stays.any()):
            continue
        probes = rows[inside]
        others = stays.nonzero().flatten() + start
        back = spec.table(start - probes, device)
        forth = spec.table(others - start, device)
        planned.append(
            ShiftedChunk(
                weight=strength * count / (count + _DAMPING),
                probe_rows=(inside.nonzero().flatten() + first_row).to(device),
                probe_slots=slots[probes.to(device)].long(),
                probe_cos=back.cos[:, None, :],
                probe_sin=back.sin[:, None, :],
                other_slots=slots[others.to(device)].long(),
                other_cos=forth.cos[:, None, :],
                other_sin=forth.sin[:, None, :],
            )
        )
    return MeanShiftPlan(chunks=tuple(planned), spec=spec)


def mean_shift_inplace(
    k_pool: Tensor,
    v_pool: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    plan: MeanShiftPlan,
    *,
    k_old: Tensor | None = None,
    v_old: Tensor | None = None,
) -> None:
    """Shift the cached rows of one layer. Call it after the layer's new K and V are known, before its attention.

    Parameters
    ----------
    k_pool, v_pool : Tensor
        ``[num_slots, N, H]``; the rows that stay cached are rewritten. They must be private to the request.
    k_new, v_new : Tensor
        ``[R, N, H]`` the layer's new rotated keys and values of all computed rows.
    plan : MeanShiftPlan
        From :func:`plan_mean_shift`.
    k_old, v_old : Tensor, optional
        ``[R, N, H]`` cached keys (rotated to the new positions) and values of the same rows. When not given they
        are read from the pool, which then must not hold the new rows yet.

    Notes
    -----
    Layer 0 never needs it: there K and V depend on the token and its position only.
    """
    spec = plan.spec
    for chunk in plan.chunks:
        old_k = k_pool[chunk.probe_slots] if k_old is None else k_old[chunk.probe_rows]
        old_v = v_pool[chunk.probe_slots] if v_old is None else v_old[chunk.probe_rows]
        moved = k_new[chunk.probe_rows].float() - old_k.float()
        shift_k = rotate(moved, chunk.probe_cos, chunk.probe_sin, spec).mean(dim=0) * chunk.weight
        shift_v = (v_new[chunk.probe_rows].float() - old_v.float()).mean(dim=0) * chunk.weight
        turned = rotate(
            shift_k[None].expand(chunk.other_slots.numel(), *shift_k.shape),
            chunk.other_cos,
            chunk.other_sin,
            spec,
        )
        stays_k = k_pool[chunk.other_slots].float().add_(turned)
        k_pool.index_copy_(0, chunk.other_slots, stays_k.to(k_pool.dtype))
        stays_v = v_pool[chunk.other_slots].float().add_(shift_v)
        v_pool.index_copy_(0, chunk.other_slots, stays_v.to(v_pool.dtype))

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

from rag_kernels.paged import gather_kv, scatter_kv_inplace
from rag_kernels.rotary import RotarySpec, add_rotated_inplace, rotate

_DAMPING = 4.0
_FEWEST_PROBES = 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeanShiftPlan:
    """What every layer needs for the shift; made by :func:`plan_mean_shift`.

    Attributes
    ----------
    spec : RotarySpec
        The model's rotation.
    probe_rows, probe_slots : Tensor
        int64 ``[P]``: rows of the new keys, and slots, of the recomputed tokens of all shifted chunks.
    probe_cos, probe_sin : Tensor
        fp32 ``[P, 1, rotary_dim / 2]``: rotation back to the chunk's first position.
    averaging : Tensor
        fp32 ``[C, P]``: weight of each probe in the shift of each chunk, damping included.
    other_slots : Tensor
        int64 ``[T]``: slot of every token that is shifted, chunk by chunk.
    other_ends : tuple of int
        Where each of the ``C`` chunks ends in ``other_slots``.
    other_cos, other_sin : Tensor
        fp32 ``[T, 1, rotary_dim / 2]``: rotation from the chunk's first position.
    """

    spec: RotarySpec
    probe_rows: Tensor
    probe_slots: Tensor
    probe_cos: Tensor
    probe_sin: Tensor
    averaging: Tensor
    other_slots: Tensor
    other_ends: tuple[int, ...]
    other_cos: Tensor
    other_sin: Tensor

    @property
    def num_shifted(self) -> int:
        """Tokens that each layer rewrites."""
        return int(self.other_slots.numel())


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
    probe_parts, back_parts, other_parts, forth_parts, weights = [], [], [], [], []
    for start, end in chunks:
        inside = ((rows >= start) & (rows < end)).nonzero().flatten()
        stays = torch.ones(end - start, dtype=torch.bool)
        stays[rows[inside] - start] = False
        count = inside.numel()
        if strength == 0.0 or count < _FEWEST_PROBES or not bool(stays.any()):
            continue
        others = stays.nonzero().flatten()
        probe_parts.append(inside)
        back_parts.append(start - rows[inside])
        other_parts.append(others + start)
        forth_parts.append(others)
        weights.append(strength / (count + _DAMPING))
    probe_rows, others = _joined(probe_parts), _joined(other_parts)
    averaging = torch.zeros(len(weights), probe_rows.numel())
    other_ends: list[int] = []
    probe_at = 0
    for chunk, (probes, stay) in enumerate(zip(probe_parts, other_parts, strict=True)):
        averaging[chunk, probe_at : probe_at + probes.numel()] = weights[chunk]
        probe_at += probes.numel()
        other_ends.append(stay.numel() + (other_ends[-1] if other_ends else 0))
    back = spec.table(_joined(back_parts), device)
    forth = spec.table(_joined(forth_parts), device)
    return MeanShiftPlan(
        spec=spec,
        probe_rows=(probe_rows + first_row).to(device),
        probe_slots=slots[rows[probe_rows].to(device)].long(),
        probe_cos=back.cos[:, None, :],
        probe_sin=back.sin[:, None, :],
        averaging=averaging.to(device),
        other_slots=slots[others.to(device)].long(),
        other_ends=tuple(other_ends),
        other_cos=forth.cos[:, None, :],
        other_sin=forth.sin[:, None, :],
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


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
    if plan.num_shifted == 0:
        return
    heads, dim = k_new.shape[1:]
    chunks = plan.averaging.shape[0]
    old_k = (
        gather_kv(k_pool, plan.probe_slots)
        if k_old is None
        else k_old.index_select(0, plan.probe_rows)
    )
    old_v = (
        gather_kv(v_pool, plan.probe_slots)
        if v_old is None
        else v_old.index_select(0, plan.probe_rows)
    )
    moved_k = k_new.index_select(0, plan.probe_rows).float() - old_k
    moved_v = v_new.index_select(0, plan.probe_rows).float() - old_v
    level = rotate(moved_k, plan.probe_cos, plan.probe_sin, plan.spec)
    shift_k = torch.mm(plan.averaging, level.flatten(1)).view(chunks, heads, dim)
    shift_v = torch.mm(plan.averaging, moved_v.flatten(1)).view(chunks, heads, dim)

    stays_k = gather_kv(k_pool, plan.other_slots).float()
    stays_v = gather_kv(v_pool, plan.other_slots).float()
    lo = 0
    for chunk, hi in enumerate(plan.other_ends):
        # Chunk by chunk, because a copy of the shift for every token would cost more than the sum itself.
        add_rotated_inplace(
            stays_k[lo:hi], shift_k[chunk], plan.other_cos[lo:hi], plan.other_sin[lo:hi], plan.spec
        )
        stays_v[lo:hi].add_(shift_v[chunk])
        lo = hi
    scatter_kv_inplace(k_pool, plan.other_slots, stays_k)
    scatter_kv_inplace(v_pool, plan.other_slots, stays_v)

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

import torch
from torch import Tensor

from rag_kernels.host_copy import to_device
from rag_kernels.mean_shift_plan import MeanShiftPlan
from rag_kernels.native.selection import native_shift
from rag_kernels.paged import gather_kv, scatter_kv_inplace
from rag_kernels.rotary import add_rotated_inplace, rotate


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
        ``[num_slots, N, H]``, values of any ``H``; the rows that stay cached are rewritten. They must be private to the
        request.
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
    if native_shift(k_pool, v_pool, k_new, v_new, plan, k_old, v_old):
        return
    if k_pool.device.type == "cuda" and _fits_triton(k_pool, v_pool, k_new, v_new, k_old, v_old):
        from rag_kernels.shift_triton import mean_shift_triton

        mean_shift_triton(k_pool, v_pool, k_new, v_new, plan, k_old, v_old)
        return
    for part in plan.parts:
        mean_shift_inplace(k_pool, v_pool, k_new, v_new, part, k_old=k_old, v_old=v_old)
    if plan.parts:
        return
    averaging = to_device(plan.averaging(), k_pool.device)
    chunks = averaging.shape[0]
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
    shift_k = torch.mm(averaging, level.flatten(1)).view(chunks, *k_new.shape[1:])
    shift_v = torch.mm(averaging, moved_v.flatten(1)).view(chunks, *v_new.shape[1:])

    stays_k = gather_kv(k_pool, plan.other_slots).float()
    stays_v = gather_kv(v_pool, plan.other_slots).float()
    lo = 0
    for chunk, hi in enumerate(plan.other_ends.tolist()):
        # Chunk by chunk, because a copy of the shift for every token would cost more than the sum itself.
        add_rotated_inplace(
            stays_k[lo:hi], shift_k[chunk], plan.other_cos[lo:hi], plan.other_sin[lo:hi], plan.spec
        )
        stays_v[lo:hi].add_(shift_v[chunk])
        lo = hi
    scatter_kv_inplace(k_pool, plan.other_slots, stays_k)
    scatter_kv_inplace(v_pool, plan.other_slots, stays_v)


def _fits_triton(k_pool: Tensor, v_pool: Tensor, *rows: Tensor | None) -> bool:
    """Whether values are as wide as keys, old rows are given for both or neither, and heads lie in one piece."""
    given = [k_pool, v_pool, *(one for one in rows if one is not None)]
    return (
        len(given) % 2 == 0
        and all(one.shape[1:] == k_pool.shape[1:] for one in given)
        and all(one.stride(-1) == 1 for one in given)
    )

"""Attention of non-contiguous rows, causal by absolute position: one function, a kernel per device."""

from __future__ import annotations

import logging

from torch import Tensor

from rag_kernels.attention.base import AttentionCall, KernelUnavailableError
from rag_kernels.attention.choice import kernel_of_call
from rag_kernels.attention.mask import BlockMask
from rag_kernels.attention.plan import PositionCausalPlan

logger = logging.getLogger(__name__)


def position_causal_attention(
    q_RNH: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    plan: PositionCausalPlan,
    scale: float,
    sliding_window: int | None = None,
    logit_cap: float | None = None,
    mask: BlockMask | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with every row to keys ``0 .. position`` of its own request.

    The keys and values of the rows themselves must be in the pool before the call.

    Parameters
    ----------
    q_RNH : Tensor
        ``[R, Hq, D]`` rotated queries, rows in the order in which the plan was given their positions.
    k_pool, v_pool : Tensor
        ``[num_slots, Hk, D]``.
    plan : PositionCausalPlan
        From :func:`plan_position_causal`.
    scale : float
        Softmax scale.
    sliding_window : int, optional
        A row at position ``p`` sees only keys ``p - sliding_window + 1 .. p`` (its own key counted).
    logit_cap : float, optional
        Logits become ``cap * tanh(logit / cap)``.
    mask : BlockMask, optional
        Blocks of keys that rows may read, causality on top; None for all.
    sinks : Tensor, optional
        ``[Hq]``: logit per query head of a key without a value that every row reads too, never capped.

    Returns
    -------
    Tensor
        ``[R, Hq, D]`` in the type of ``q_RNH``.

    Notes
    -----
    The CPU kernel is measured; the FlashInfer and Triton kernels have not been run on a GPU here: their numbers
    are unmeasured.
    """
    if tuple(q_RNH.shape) != (plan.num_rows, plan.num_q_heads, plan.head_dim):
        raise ValueError(
            f"queries have shape {tuple(q_RNH.shape)}; the plan was made for "
            f"({plan.num_rows}, {plan.num_q_heads}, {plan.head_dim})."
        )
    if k_pool.shape[1:] != (plan.num_kv_heads, plan.head_dim) or v_pool.shape != k_pool.shape:
        raise ValueError(
            f"pools have shapes {tuple(k_pool.shape)} and {tuple(v_pool.shape)}; the plan was made for "
            f"[slots, {plan.num_kv_heads}, {plan.head_dim}]."
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"sliding_window is {sliding_window}; it must be at least 1, or None for no window."
        )
    if sinks is not None and tuple(sinks.shape) != (plan.num_q_heads,):
        raise ValueError(
            f"sinks have shape {tuple(sinks.shape)}; give one per query head, ({plan.num_q_heads},)."
        )
    if mask is not None:
        mask.check(plan)
    if plan.num_rows == 0:
        return q_RNH.new_empty(q_RNH.shape)
    call = AttentionCall(
        q_RNH=q_RNH,
        k_pool=k_pool,
        v_pool=v_pool,
        plan=plan,
        scale=scale,
        sliding_window=sliding_window,
        logit_cap=logit_cap,
        mask=mask,
        sinks=sinks,
    )
    while True:
        try:
            return kernel_of_call(call).attend(call)
        except KernelUnavailableError as error:
            logger.warning("%s; the next best kernel takes its place", error)

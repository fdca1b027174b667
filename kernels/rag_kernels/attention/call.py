"""Attention of non-contiguous rows, causal by absolute position: one function, a kernel per device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall, AttentionKernel, KernelUnavailableError
from rag_kernels.attention.choice import kernel_of_call
from rag_kernels.attention.mask import BlockMask
from rag_kernels.attention.plan import PositionCausalPlan

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
    return _by_first_able(call, lambda kernel: kernel.attend(call))


def prepare_attention(
    plan: PositionCausalPlan, k_pool: Tensor, v_pool: Tensor, dtype: torch.dtype, scale: float
) -> None:
    """Let the kernel of a plan do what it can before the first layer, for calls without a mask, a window or a cap.

    Parameters
    ----------
    plan : PositionCausalPlan
        From :func:`plan_position_causal`.
    k_pool, v_pool : Tensor
        Of any layer.
    dtype : torch.dtype
        Of the queries.
    scale : float
        Softmax scale.
    """
    if plan.num_rows == 0:
        return
    shape = (0, plan.num_q_heads, plan.head_dim)
    call = AttentionCall(
        q_RNH=torch.empty(shape, dtype=dtype, device=plan.device),
        k_pool=k_pool,
        v_pool=v_pool,
        plan=plan,
        scale=scale,
    )
    _by_first_able(call, lambda kernel: kernel.prepare(call))


def _by_first_able(call: AttentionCall, work: Callable[[AttentionKernel], T]) -> T:
    """Do it with the best kernel that does not fail; a failed one refuses the call from then on."""
    while True:
        try:
            return work(kernel_of_call(call))
        except KernelUnavailableError as error:
            level = logging.WARNING if error.is_final else logging.INFO
            logger.log(level, "%s; the next best kernel takes its place", error)

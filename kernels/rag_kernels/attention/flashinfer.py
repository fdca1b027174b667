"""Position-causal attention through FlashInfer's paged prefill (0.7.2): plan level tested, not run on a GPU here.

FlashInfer's ``causal=True`` aligns the last row with the last key, which is wrong for scattered rows. Its fa2
kernels take an attention variant that owns the mask; the variant below hides every key behind the row's own
position, which travels as an extra int32 tensor. The kernel visits every key tile of a request, so the rows of
a request are planned as pseudo-requests of at most 128 sorted rows whose keys end at their last position.
Speed and numerics on a GPU: unmeasured.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall, AttentionKernel
from rag_kernels.attention.plan import PositionCausalPlan

_WORKSPACE_BYTES = 128 << 20  # the least that FlashInfer's split-KV asks for
_HEAD_DIMS = (64, 128, 256)

# Rows past the end of a tile are padding: they read the last row's position instead of memory behind the tensor.
_VARIANT = r"""
struct PositionCausal : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  uint32_t qo_len, kv_len, window_left;
  int32_t row_base;
  float sm_scale_log2;
  template <typename Params>
  __device__ __host__ PositionCausal(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = kv_len;
    row_base = params.q_indptr[batch_idx];
    sm_scale_log2 = params.sm_scale * math::log2e;
  }
  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    const uint32_t row = qo_idx < qo_len ? qo_idx : qo_len - 1;
    return int32_t(kv_idx) <= params.q_pos[row_base + int32_t(row)];
  })
};
"""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PagedLayout:
    """Arguments of the wrapper's ``plan``: host index pointers, device page lists, page size 1.

    Attributes
    ----------
    qo_indptr, kv_indptr : Tensor
        int32 ``[pseudo-requests + 1]`` on the host, so that planning does not wait for the device.
    kv_indices : Tensor
        int32 ``[sum of kv_len]`` on the device.
    last_page_len : Tensor
        int32 ``[pseudo-requests]`` ones, on the host.
    q_pos : Tensor
        int32 ``[rows]`` on the device, in sorted order.
    """

    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    last_page_len: Tensor
    q_pos: Tensor


def paged_layout(plan: PositionCausalPlan) -> PagedLayout:
    """Pseudo-requests of a plan: one per block, keys cut at the block's last position."""
    rows, keys = [0], [0]
    pages = []
    for block in plan.blocks:
        rows.append(block.row_hi)
        keys.append(keys[-1] + block.kv_len)
        pages.append(plan.slots[block.request][: block.kv_len])
    return PagedLayout(
        qo_indptr=torch.tensor(rows, dtype=torch.int32),
        kv_indptr=torch.tensor(keys, dtype=torch.int32),
        kv_indices=torch.cat(pages).to(torch.int32),
        last_page_len=torch.ones(len(plan.blocks), dtype=torch.int32),
        q_pos=plan.sorted_positions,
    )


def variant_arguments(dtype: torch.dtype, head_dim: int) -> list[Any]:
    """``jit_args`` of the wrapper for one element type and head size."""
    name = f"rag_position_causal_{str(dtype).removeprefix('torch.')}_{head_dim}"
    return [
        name,
        dtype,
        dtype,
        dtype,
        torch.int32,
        head_dim,
        head_dim,
        ["q_pos"],
        ["int32_t"],
        ["sm_scale"],
        ["double"],
        "PositionCausal",
        _VARIANT,
    ]


class _Holder:
    """One wrapper per element type, head size and device; it remembers whose plan it holds."""

    def __init__(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self.wrapper = BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            "NHD",
            backend="fa2",
            jit_args=variant_arguments(dtype, head_dim),
            variant_owns_mask=True,
        )
        self.planned: tuple[PositionCausalPlan, float] | None = None
        self.q_pos: Tensor | None = None

    def plan(self, plan: PositionCausalPlan, scale: float, dtype: torch.dtype) -> None:
        """Plan unless this very plan is held; layers of one forward pass share it."""
        if self.planned is not None and self.planned[0] is plan and self.planned[1] == scale:
            return
        layout = paged_layout(plan)
        self.wrapper.plan(
            layout.qo_indptr,
            layout.kv_indptr,
            layout.kv_indices,
            layout.last_page_len,
            plan.num_q_heads,
            plan.num_kv_heads,
            plan.head_dim,
            1,
            causal=False,
            sm_scale=scale,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        self.planned, self.q_pos = (plan, scale), layout.q_pos


_HOLDERS: dict[tuple[torch.dtype, int, torch.device], _Holder] = {}


class FlashInferKernel(AttentionKernel):
    """FlashInfer's fa2 kernels with a mask of their own; no sliding window, no logit cap."""

    name = "flashinfer"

    def refuse_device(self, device: torch.device) -> str | None:
        """Refuse everything but CUDA."""
        return None if device.type == "cuda" else f"needs a CUDA device, not {device}"

    def is_default_on(self, device: torch.device) -> bool:
        """Be chosen where the package is installed; it is not imported here."""
        return device.type == "cuda" and importlib.util.find_spec("flashinfer") is not None

    def refuse(self, call: AttentionCall) -> str | None:
        """Refuse what the fa2 kernels do not cover."""
        dtype, pool_dtype = call.q_RNH.dtype, call.k_pool.dtype
        if call.sliding_window is not None or call.logit_cap:
            return "no sliding window and no logit cap"
        if dtype not in (torch.float16, torch.bfloat16) or pool_dtype != dtype:
            return f"queries of {dtype} over a pool of {pool_dtype}"
        if call.plan.head_dim not in _HEAD_DIMS:
            return f"heads of {call.plan.head_dim}"
        return super().refuse(call)

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the call."""
        dtype = call.q_RNH.dtype
        key = (dtype, call.plan.head_dim, call.q_RNH.device)
        holder = _HOLDERS.get(key)
        if holder is None:
            holder = _HOLDERS[key] = _Holder(*key)
        holder.plan(call.plan, call.scale, dtype)
        # Page size 1: a slot is a page.
        pools = (call.k_pool.unsqueeze(1), call.v_pool.unsqueeze(1))
        out: Tensor = holder.wrapper.run(call.sorted_q.contiguous(), pools, holder.q_pos)
        return call.unsorted(out)

"""Position-causal attention through FlashInfer's paged prefill (0.7.2): plan level tested, not run on a GPU here.

FlashInfer's ``causal=True`` aligns the last row with the last key, which is wrong for scattered rows. Its fa2
kernels take an attention variant that owns the mask; the variant below hides every key behind the row's own
position, which travels as an extra int32 tensor. The kernel visits every key tile of a request, so the rows of
a request are planned as pseudo-requests of at most 128 sorted rows whose keys end at their last position.
Speed and numerics on a GPU: unmeasured.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall, AttentionKernel, KernelUnavailableError
from rag_kernels.attention.flashinfer_rows import PagedLayout, RowGroups, group_rows
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


class _Planned:
    """A wrapper of FlashInfer's; it remembers whose plan it holds.

    Parameters
    ----------
    wrapper : object
        ``BatchPrefillWithPagedKVCacheWrapper``.
    is_causal : bool
        For runs of rows; the variant masks by position instead.
    """

    def __init__(self, wrapper: Any, is_causal: bool) -> None:
        self._wrapper = wrapper
        self._is_causal = is_causal
        self._planned: tuple[PositionCausalPlan, float] | None = None

    def attend(self, call: AttentionCall, layout: PagedLayout, q: Tensor) -> Tensor:
        """Compute the rows of a layout; planned anew unless this very plan is held, as layers of one pass share it."""
        plan, dtype = call.plan, q.dtype
        if self._planned is None or self._planned[0] is not plan or self._planned[1] != call.scale:
            self._wrapper.plan(
                layout.qo_indptr,
                layout.kv_indptr,
                layout.kv_indices,
                layout.last_page_len,
                plan.num_q_heads,
                plan.num_kv_heads,
                plan.head_dim,
                1,
                causal=self._is_causal,
                sm_scale=call.scale,
                q_data_type=dtype,
                kv_data_type=dtype,
            )
            self._planned = (plan, call.scale)
        # Page size 1: a slot is a page.
        pools = (call.k_pool.unsqueeze(1), call.v_pool.unsqueeze(1))
        extra = () if self._is_causal else (layout.q_pos,)
        out: Tensor = self._wrapper.run(q.contiguous(), pools, *extra)
        return out


class _Wrappers:
    """The two wrappers for one element type, head size and device; they share a workspace."""

    def __init__(self, dtype: torch.dtype, head_dim: int, device: torch.device) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper as Wrapper

        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        variant = {
            "backend": "fa2",
            "jit_args": variant_arguments(dtype, head_dim),
            "variant_owns_mask": True,
        }
        self.runs = _Planned(Wrapper(workspace, "NHD", backend="auto"), is_causal=True)
        self.scattered = _Planned(Wrapper(workspace, "NHD", **variant), is_causal=False)


class FlashInferKernel(AttentionKernel):
    """FlashInfer's kernels; no sliding window, no logit cap."""

    name = "flashinfer"

    def __init__(self) -> None:
        self._wrappers: dict[tuple[torch.dtype, int, torch.device], _Wrappers] = {}
        self._broken = ""

    def refuse_device(self, device: torch.device) -> str | None:
        """Refuse everything but CUDA."""
        return None if device.type == "cuda" else f"needs a CUDA device, not {device}"

    def is_default_on(self, device: torch.device) -> bool:
        """Be chosen where the package is installed; it is not imported here."""
        return device.type == "cuda" and importlib.util.find_spec("flashinfer") is not None

    def refuse(self, call: AttentionCall) -> str | None:
        """Refuse what the kernels do not cover, and everything once they could not be built."""
        dtype, pool_dtype = call.q_RNH.dtype, call.k_pool.dtype
        if self._broken:
            return self._broken
        if call.sliding_window is not None or call.logit_cap:
            return "no sliding window and no logit cap"
        if dtype not in (torch.float16, torch.bfloat16) or pool_dtype != dtype:
            return f"queries of {dtype} over a pool of {pool_dtype}"
        if call.plan.head_dim not in _HEAD_DIMS:
            return f"heads of {call.plan.head_dim}"
        return super().refuse(call)

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the call."""
        plan, q = call.plan, call.sorted_q
        groups: RowGroups | None = plan.memo.get("flashinfer rows")
        if groups is None:
            groups = plan.memo["flashinfer rows"] = group_rows(plan)
        try:
            return call.unsorted(self._attend(call, groups, q))
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            # They are compiled at their first use: no compiler, no headers, an unknown device end here.
            self._broken = f"failed: {' '.join(str(error).split())[:200] or repr(error)}"
            raise KernelUnavailableError(f"attention kernel {self.name} {self._broken}") from error

    def _attend(self, call: AttentionCall, groups: RowGroups, q: Tensor) -> Tensor:
        key = (q.dtype, call.plan.head_dim, q.device)
        wrappers = self._wrappers.get(key)
        if wrappers is None:
            wrappers = self._wrappers[key] = _Wrappers(*key)
        parts = [
            (layout, planned)
            for layout, planned in (
                (groups.runs, wrappers.runs),
                (groups.scattered, wrappers.scattered),
            )
            if layout is not None
        ]
        out: Tensor | None = None
        for layout, planned in parts:
            if layout.rows is None:
                return planned.attend(call, layout, q)
            part = planned.attend(call, layout, q.index_select(0, layout.rows))
            out = torch.empty_like(q) if out is None else out
            out.index_copy_(0, layout.rows, part)
        assert out is not None
        return out

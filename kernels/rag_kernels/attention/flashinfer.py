"""Position-causal attention through FlashInfer's paged prefill (0.7.2): plan level tested, not run on a GPU here.

FlashInfer's ``causal=True`` aligns the last row with the last key, which is wrong for scattered rows. Its fa2
kernels take an attention variant that owns the mask; the variant below hides every key behind the row's own
position, which travels as an extra int32 tensor. The kernel visits every key tile of a request, so the rows of
a request are planned as pseudo-requests of at most 128 sorted rows whose keys end at their last position. A block mask
that follows from positions alone is planned the same way, with the pages of the kept blocks: FlashInfer's own
``BlockSparseAttentionWrapper`` plans just that, but wants the keys of a request contiguous, and here they are in a pool.
Speed and numerics on a GPU: unmeasured.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall, AttentionKernel, KernelUnavailableError
from rag_kernels.attention.flashinfer_rows import (
    PagedLayout,
    RowGroups,
    group_rows,
    refuse_mask,
)
from rag_kernels.attention.mask import BlockMask
from rag_kernels.attention.plan import PositionCausalPlan

_WORKSPACE_BYTES = 128 << 20  # the least that FlashInfer's split-KV asks for
_HEAD_DIMS = (64, 128, 256)
_POOL_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types of a pool beside that of the queries."""
_MOST_FAULTS = 3
"""Batches in a row that fail; then no further one is tried."""

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


def variant_arguments(
    dtype: torch.dtype, head_dim: int, kv_dtype: torch.dtype | None = None
) -> list[Any]:
    """``jit_args`` of the wrapper for one element type, that of the pool, and one head size."""
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    types = "_".join(str(one).removeprefix("torch.") for one in dict.fromkeys((dtype, kv_dtype)))
    return [
        f"rag_position_causal_{types}_{head_dim}",
        dtype,
        kv_dtype,
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


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What a wrapper is planned with besides rows and keys."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    sliding_window: int | None = None
    logit_cap: float | None = None

    @classmethod
    def of(cls, call: AttentionCall) -> PlanOptions:
        """Options of a call."""
        return cls(
            dtype=call.q_RNH.dtype,
            kv_dtype=call.k_pool.dtype,
            scale=call.scale,
            sliding_window=call.sliding_window,
            logit_cap=call.logit_cap,
        )


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
        self._planned: tuple[PagedLayout, PlanOptions] | None = None

    def plan(self, plan: PositionCausalPlan, layout: PagedLayout, options: PlanOptions) -> None:
        """Plan anew unless this very layout is held, as layers of one pass share it."""
        if self._planned is not None and self._planned[0] is layout and self._planned[1] == options:
            return
        self._planned = None  # a fault leaves the wrapper with nobody's plan
        window, cap = options.sliding_window, options.logit_cap
        extra: dict[str, Any] = {}
        if window is not None:
            extra["window_left"] = window - 1  # FlashInfer does not count the row's own key
        if cap:
            extra["logits_soft_cap"] = cap
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
            sm_scale=options.scale,
            q_data_type=options.dtype,
            kv_data_type=options.kv_dtype,
            **extra,
        )
        self._planned = (layout, options)

    def attend(self, call: AttentionCall, layout: PagedLayout, q: Tensor) -> Tensor:
        """Compute the rows of a layout."""
        self.plan(call.plan, layout, PlanOptions.of(call))
        # Page size 1: a slot is a page.
        pools = (call.k_pool.unsqueeze(1), call.v_pool.unsqueeze(1))
        extra = () if self._is_causal else (layout.q_pos,)
        out: Tensor = self._wrapper.run(q.contiguous(), pools, *extra)
        return out


class _Wrappers:
    """The wrappers for one pair of element types, head size and device; they share a workspace.

    Layers with a block mask, a window or a cap and layers without have their own, so that a model of both is planned once
    per pass: planning anew for each layer takes time, and would write over tables that the device may not have read yet.
    """

    def __init__(
        self, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, device: torch.device
    ) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper as Wrapper

        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        variant = {
            "backend": "fa2",
            "jit_args": variant_arguments(dtype, head_dim, kv_dtype),
            "variant_owns_mask": True,
        }

        def pair() -> tuple[_Planned, _Planned]:
            return (
                _Planned(Wrapper(workspace, "NHD", backend="auto"), is_causal=True),
                _Planned(Wrapper(workspace, "NHD", **variant), is_causal=False),
            )

        self._pairs = collections.defaultdict[
            tuple[bool, int | None, float | None], tuple[_Planned, _Planned]
        ](pair)
        self.has_run = False

    def parts(self, call: AttentionCall) -> list[tuple[PagedLayout, _Planned]]:
        """Layouts with rows, and the wrapper of each."""
        groups = _groups(call.plan, call.mask)
        rules = (call.mask is not None, call.sliding_window, call.logit_cap)
        runs, scattered = self._pairs[rules]
        pairs = ((groups.runs, runs), (groups.scattered, scattered))
        return [(layout, planned) for layout, planned in pairs if layout is not None]


class FlashInferKernel(AttentionKernel):
    """FlashInfer's kernels.

    A sliding window and a logit cap are passed on where all rows stand in runs; scattered rows with them go to another
    kernel, and so do block masks that queries decide. A pool of 8-bit floats is read as it is, without scales.

    A fault before anything has run (no compiler, no headers, an unknown device) ends its use; a fault of one batch (its
    workspace is too small) sends that batch to another kernel, and :data:`_MOST_FAULTS` batches in a row end its use.

    Attributes
    ----------
    batch_faults : int
        Batches that another kernel computed because of a fault.
    """

    name = "flashinfer"
    reads_masks = True

    def __init__(self) -> None:
        self._wrappers: dict[tuple[Any, ...], _Wrappers] = {}
        self._broken = ""
        self._faults_in_row = 0
        self.batch_faults = 0

    def refuse_device(self, device: torch.device) -> str | None:
        """Refuse everything but CUDA."""
        return None if device.type == "cuda" else f"needs a CUDA device, not {device}"

    def is_default_on(self, device: torch.device) -> bool:
        """Be chosen where the package is installed; it is not imported here."""
        return device.type == "cuda" and importlib.util.find_spec("flashinfer") is not None

    def refuse(self, call: AttentionCall) -> str | None:
        """Refuse what the kernels do not cover, batches that failed, and everything once they could not be built."""
        plan, dtype, pool_dtype = call.plan, call.q_RNH.dtype, call.k_pool.dtype
        failed: str | None = plan.memo.get("flashinfer fault")
        if self._broken or failed:
            return self._broken or failed
        if dtype not in (torch.float16, torch.bfloat16) or pool_dtype not in (dtype, *_POOL_TYPES):
            return f"queries of {dtype} over a pool of {pool_dtype}"
        if plan.head_dim not in _HEAD_DIMS:
            return f"heads of {plan.head_dim}"
        if call.mask is not None:
            reason = refuse_mask(call.mask)
            if reason is not None:
                return reason
        if call.sliding_window is not None or call.logit_cap:
            if call.mask is not None:
                return "no sliding window and no logit cap with a block mask"
            if _groups(plan, None).scattered is not None:
                return "no sliding window and no logit cap for scattered rows"
        return super().refuse(call)

    def prepare(self, call: AttentionCall) -> None:
        """Plan the wrappers before the first layer."""
        with self._noting(call):
            self._prepared(call)

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the call."""
        q = call.sorted_q
        with self._noting(call):
            wrappers, parts = self._prepared(call)
            out = _run(call, parts, q)
            wrappers.has_run = True
            self._faults_in_row = 0
        return call.unsorted(out)

    def _prepared(
        self, call: AttentionCall
    ) -> tuple[_Wrappers, list[tuple[PagedLayout, _Planned]]]:
        key = _key(call)
        wrappers = self._wrappers.get(key)
        if wrappers is None:
            wrappers = self._wrappers[key] = _Wrappers(*key)
        parts = wrappers.parts(call)
        for layout, planned in parts:
            planned.plan(call.plan, layout, PlanOptions.of(call))
        return wrappers, parts

    @contextlib.contextmanager
    def _noting(self, call: AttentionCall) -> Iterator[None]:
        """Turn a fault into a refusal: of this batch, or of everything.

        Raises
        ------
        KernelUnavailableError
            What failed was FlashInfer; another kernel can compute the call.
        """
        try:
            yield
        except (torch.cuda.OutOfMemoryError, torch.AcceleratorError):
            raise  # the device itself, which no other kernel would find better
        except Exception as error:
            said = " ".join(str(error).split())[:200] or repr(error)
            wrappers = self._wrappers.get(_key(call))
            # Kernels are compiled at their first use; a workspace that is too small says nothing of later batches.
            has_run = wrappers is not None and wrappers.has_run
            is_of_batch = has_run or any(word in said.lower() for word in ("workspace", "allocat"))
            call.plan.memo["flashinfer fault"] = f"failed: {said}"
            self.batch_faults += is_of_batch
            self._faults_in_row += is_of_batch
            if not is_of_batch:
                self._broken = f"failed: {said}"
            elif self._faults_in_row >= _MOST_FAULTS:
                self._broken = f"failed {_MOST_FAULTS} batches in a row: {said}"
            raise KernelUnavailableError(
                f"attention kernel {self.name} {self._broken or f'failed in one batch: {said}'}",
                is_final=bool(self._broken),
            ) from error


def _key(call: AttentionCall) -> tuple[torch.dtype, torch.dtype, int, torch.device]:
    return call.q_RNH.dtype, call.k_pool.dtype, call.plan.head_dim, call.q_RNH.device


def _groups(plan: PositionCausalPlan, mask: BlockMask | None) -> RowGroups:
    """Made once per plan and mask; a method hands the same blocks to all layers."""
    blocks = () if mask is None else mask.requests
    key = ("flashinfer rows", *(id(one) for one in blocks))
    found: tuple[RowGroups, Any] | None = plan.memo.get(key)
    if found is None:
        found = plan.memo[key] = (
            group_rows(plan, mask),
            blocks,
        )  # held, so that the ids stay theirs
    return found[0]


def _run(call: AttentionCall, parts: list[tuple[PagedLayout, _Planned]], q: Tensor) -> Tensor:
    out: Tensor | None = None
    for layout, planned in parts:
        if layout.rows is None:
            return planned.attend(call, layout, q)
        part = planned.attend(call, layout, q.index_select(0, layout.rows))
        out = torch.empty_like(q) if out is None else out
        out.index_copy_(0, layout.rows, part)
    assert out is not None
    return out

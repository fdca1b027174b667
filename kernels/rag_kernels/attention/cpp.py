"""Position-causal and block-sparse attention on the CPU in C++; see ``native/attention.cpp`` for how.

Queries are read and results written in the caller's order, keys where they lie in the pool: nothing is copied before.
A row's result does not depend on the rows beside it, on the order of the rows, or on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rag_kernels.attention.base import AttentionCall, AttentionKernel
from rag_kernels.attention.plan import PositionCausalPlan
from rag_kernels.native.library import LARGEST_HEAD, TYPES, CallStruct, RequestStruct, load_library

_NO_WINDOW = 1 << 30


class CppKernel(AttentionKernel):
    """Tiles of rows and heads over packed keys, all threads of torch on one queue."""

    name = "cpp"
    reads_masks = True
    reads_sinks = True

    def refuse_device(self, device: torch.device) -> str | None:
        """Refuse everything but the CPU, and a CPU for which it cannot be built."""
        if device.type != "cpu":
            return f"cannot run on {device}"
        return None if load_library() is not None else "could not be built on this machine"

    def refuse(self, call: AttentionCall) -> str | None:
        """Refuse types that it does not read, and layouts that no pool has."""
        if call.k_pool.dtype != call.v_pool.dtype or not {
            call.q_RNH.dtype,
            call.k_pool.dtype,
        } <= set(TYPES):
            return "reads bf16, fp16 and fp32 only"
        if call.plan.head_dim > LARGEST_HEAD:
            return f"heads above {LARGEST_HEAD}"
        if call.k_pool.stride(2) != 1 or call.v_pool.stride(2) != 1:
            return "heads that do not lie in one piece"
        if call.scale <= 0.0:
            return "a scale that is not positive"
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the call."""
        library = load_library()
        assert library is not None, "choose_kernel refuses it then"
        plan = call.plan
        q = call.q_RNH if call.q_RNH.stride(2) == 1 else call.q_RNH.contiguous()
        largest = _largest_slot(plan)
        if largest >= call.k_pool.shape[0]:
            raise IndexError(
                f"slot {largest} for a pool of {call.k_pool.shape[0]} slots; the plan is not for this pool."
            )
        out = torch.empty(q.shape, dtype=q.dtype)
        requests, kept = _requests(call)
        sinks = None if call.sinks is None else call.sinks.detach().float().contiguous()
        struct = CallStruct(
            q=q.data_ptr(),
            k=call.k_pool.data_ptr(),
            v=call.v_pool.data_ptr(),
            out=out.data_ptr(),
            order=None if plan.order is None else plan.order.data_ptr(),
            positions=plan.sorted_positions.data_ptr(),
            requests=ctypes.addressof(requests),
            sinks=None if sinks is None else sinks.data_ptr(),
            num_requests=len(plan.slots),
            q_row=q.stride(0),
            q_head=q.stride(1),
            k_slot=call.k_pool.stride(0),
            k_head=call.k_pool.stride(1),
            v_slot=call.v_pool.stride(0),
            v_head=call.v_pool.stride(1),
            q_heads=plan.num_q_heads,
            kv_heads=plan.num_kv_heads,
            dim=plan.head_dim,
            q_type=TYPES[q.dtype],
            kv_type=TYPES[call.k_pool.dtype],
            window=0 if call.sliding_window is None else min(call.sliding_window, _NO_WINDOW),
            threads=torch.get_num_threads(),
            scale=call.scale,
            cap=call.logit_cap or 0.0,
        )
        if library.rag_attend(ctypes.byref(struct)) != 0:
            raise RuntimeError(f"attention kernel 'cpp' does not know {q.dtype}.")
        del kept, sinks
        return out


def _requests(call: AttentionCall) -> tuple[ctypes.Array[RequestStruct], list[Tensor]]:
    """Requests as the library reads them, and the tensors that must outlive the call."""
    plan = call.plan
    found = plan.memo.get("cpp requests")
    if found is None:
        slots = [one.contiguous() for one in plan.slots]
        found = (RequestStruct * max(1, len(slots)))(), slots
        for one, own, lo, hi in zip(
            found[0], slots, plan.row_starts, plan.row_starts[1:], strict=False
        ):
            one.row_lo, one.row_hi, one.slots = lo, hi, own.data_ptr()
        plan.memo["cpp requests"] = found
    if call.mask is None:
        return found
    requests, kept = type(found[0]).from_buffer_copy(found[0]), list(found[1])
    for one, blocks in zip(requests, call.mask.requests, strict=False):
        if blocks is None:
            continue
        allowed = blocks.allowed.contiguous()
        kept.append(allowed)
        one.allowed = allowed.data_ptr()
        one.mask_heads, one.mask_rows, one.mask_cols = allowed.shape
        one.query_block, one.key_block = blocks.query_block, blocks.key_block
        one.first_query_block = blocks.first_query_block
    return requests, kept


def _largest_slot(plan: PositionCausalPlan) -> int:
    """Largest slot that the plan reads; looked for once per plan, because the library does not look."""
    largest = plan.memo.get("cpp largest slot")
    if largest is None:
        largest = -1
        for slots in plan.slots:
            if slots.numel():
                least, most = (int(x) for x in slots.aminmax())
                if least < 0:
                    raise IndexError(f"slot {least} in a plan; slots start at 0.")
                largest = max(largest, most)
        plan.memo["cpp largest slot"] = largest
    return int(largest)

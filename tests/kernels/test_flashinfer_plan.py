"""The arguments handed to FlashInfer, replayed in plain torch: what the kernel would compute is position-causal."""

from __future__ import annotations

import sys

import pytest
import torch

from rag_kernels import AttentionCall, BlockMask, plan_position_causal, position_causal_attention
from rag_kernels.attention import call as call_module
from rag_kernels.attention.choice import kernel_named
from rag_kernels.attention.flashinfer import FlashInferKernel, variant_arguments
from rag_kernels.attention.flashinfer_rows import group_rows


def replay(q_sorted, k_pool, v_pool, layout, scale, is_causal):
    """Paged attention of each pseudo-request in fp32: causal at the bottom right, or with the variant's mask."""
    rows = torch.arange(q_sorted.shape[0]) if layout.rows is None else layout.rows
    q, out = q_sorted[rows], torch.empty(rows.numel(), *q_sorted.shape[1:])
    group = q_sorted.shape[1] // k_pool.shape[1]
    qo, kv = layout.qo_indptr.tolist(), layout.kv_indptr.tolist()
    assert qo[-1] == rows.numel()
    for i in range(len(qo) - 1):
        pages = layout.kv_indices[kv[i] : kv[i + 1]].long()
        assert int(layout.last_page_len[i]) == 1
        k = k_pool[pages].repeat_interleave(group, 1)
        v = v_pool[pages].repeat_interleave(group, 1)
        count = qo[i + 1] - qo[i]
        logits = torch.einsum("rhd,thd->hrt", q[qo[i] : qo[i + 1]], k) * scale
        last = (
            torch.arange(pages.numel() - count, pages.numel())
            if is_causal
            else layout.q_pos[qo[i] : qo[i + 1]]
        )
        seen = torch.arange(pages.numel())[None] <= last[:, None]
        logits = logits.masked_fill(~seen, float("-inf"))
        out[qo[i] : qo[i + 1]] = torch.einsum("hrt,thd->rhd", logits.softmax(-1), v)
    return rows, out


def plan_of(positions, slots, block_rows):
    # The CPU cannot run the FlashInfer kernel, but a plan's blocks depend on block_rows only.
    return plan_position_causal(
        positions,
        slots,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        kernel="reference",
        block_rows=block_rows,
    )


@pytest.mark.parametrize("block_rows", [1, 16, 128])
def test_pseudo_requests_compute_the_same_as_the_reference(block_rows):
    torch.manual_seed(0)
    lengths = [200, 50, 1, 90, 400]
    free = torch.randperm(900)
    slots = list(torch.split(free[: sum(lengths)], lengths))
    fused = torch.cat([torch.randperm(150)[:40], torch.arange(170, 300), torch.arange(320, 400)])
    positions = [
        torch.randperm(200)[:77],
        torch.arange(50),
        torch.tensor([0]),
        torch.empty(0, dtype=torch.int64),
        fused[torch.randperm(fused.numel())],
    ]
    plan = plan_of(positions, slots, block_rows)
    groups = group_rows(plan)
    k, v = torch.randn(2, 900, 2, 16)
    q = torch.randn(plan.num_rows, 4, 16)
    q_sorted, got = q[plan.order], torch.full(q.shape, float("nan"))
    for layout, is_causal in ((groups.runs, True), (groups.scattered, False)):
        rows, part = replay(q_sorted, k, v, layout, 0.25, is_causal)
        assert got[rows].isnan().all()
        got[rows] = part
        assert layout.qo_indptr.dtype == layout.kv_indptr.dtype == torch.int32
        assert layout.kv_indices.dtype == layout.q_pos.dtype == torch.int32
        assert layout.qo_indptr.device.type == layout.kv_indptr.device.type == "cpu"
        assert (layout.qo_indptr.diff() >= 1).all()
    assert (groups.scattered.qo_indptr.diff() <= block_rows).all()
    assert groups.runs.qo_indptr.tolist() == [0, 130, 210]
    want = position_causal_attention(q, k, v, plan, 0.25)
    torch.testing.assert_close(got[plan.inverse], want, rtol=1e-5, atol=1e-6)


def test_ordinary_requests_are_one_run_each():
    plan = plan_of([torch.arange(300), torch.arange(90, 200)], [torch.arange(300)] * 2, 128)
    groups = group_rows(plan)
    assert groups.scattered is None
    assert groups.runs.rows is None
    assert groups.runs.kv_indptr.tolist() == [0, 300, 500]


def test_keys_behind_a_block_are_not_planned():
    plan = plan_of([torch.arange(0, 1024, 4)], [torch.arange(1024)], 128)
    groups = group_rows(plan)
    assert groups.runs is None
    assert groups.scattered.kv_indptr.tolist() == [0, 509, 509 + 1021]


def test_a_kernel_that_cannot_be_built_is_said_once_and_replaced(monkeypatch, caplog):
    """The first use compiles; here it cannot even be imported."""
    kernel, calls = FlashInferKernel(), []
    caplog.set_level("WARNING", logger=call_module.__name__)  # an engine may have set another
    monkeypatch.setattr(kernel, "refuse_device", lambda device: None)
    monkeypatch.setitem(sys.modules, "flashinfer", None)

    def choose(call):
        calls.append(kernel.refuse(call))
        return kernel if calls[-1] is None else kernel_named("reference")

    monkeypatch.setattr(call_module, "kernel_of_call", choose)
    q = torch.randn(3, 4, 64, dtype=torch.bfloat16)
    plan = plan_position_causal(
        [torch.arange(3)], [torch.arange(3)], num_q_heads=4, num_kv_heads=2, head_dim=64
    )
    k, v = torch.randn(2, 3, 2, 64, dtype=torch.bfloat16)
    got = [position_causal_attention(q, k, v, plan, 0.2) for _ in range(2)]
    assert calls[0] is None
    assert calls[1].startswith("failed: ")
    assert len(calls) == 3
    assert len(caplog.records) == 1
    assert "flashinfer" in caplog.text
    assert torch.equal(got[0], got[1])


def test_shapes_that_the_fa2_kernels_lack_go_to_triton():
    def plan(dim):
        return plan_position_causal(
            [torch.tensor([0])], [torch.arange(1)], num_q_heads=1, num_kv_heads=1, head_dim=dim
        )

    def refusal(dim, dtype=torch.bfloat16, pool=torch.bfloat16, window=None, cap=None, mask=None):
        k_pool = torch.zeros(1, 1, dim, dtype=pool)
        call = AttentionCall(
            q_RNH=torch.zeros(1, 1, dim, dtype=dtype),
            k_pool=k_pool,
            v_pool=k_pool,
            plan=plan(dim),
            scale=1.0,
            sliding_window=window,
            logit_cap=cap,
            mask=mask,
        )
        return FlashInferKernel().refuse(call)

    assert refusal(64) is None
    assert refusal(80) == "heads of 80"
    assert "float32" in refusal(64, torch.float32)
    assert "float32" in refusal(64, pool=torch.float32)
    assert "window" in refusal(64, window=8)
    assert "cap" in refusal(64, cap=3.0)
    assert refusal(64, mask=BlockMask(requests=(None,))) == "reads no block mask"


def test_variant_names_differ_wherever_the_compiled_code_does():
    names = {variant_arguments(d, h)[0] for d in (torch.float16, torch.bfloat16) for h in (64, 128)}
    assert len(names) == 4
    declared = variant_arguments(torch.bfloat16, 128)
    assert declared[7:11] == [["q_pos"], ["int32_t"], ["sm_scale"], ["double"]]
    assert f"struct {declared[11]} " in declared[12]

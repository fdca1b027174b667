"""The arguments handed to FlashInfer, replayed in plain torch: what the kernel would compute is position-causal."""

from __future__ import annotations

import pytest
import torch

from rag_kernels import AttentionCall, BlockMask, plan_position_causal, position_causal_attention
from rag_kernels.attention.flashinfer import FlashInferKernel, paged_layout, variant_arguments


def replay(q_sorted, k_pool, v_pool, layout, scale):
    """Paged non-causal attention of each pseudo-request with the variant's mask, in fp32."""
    out = torch.empty_like(q_sorted)
    group = q_sorted.shape[1] // k_pool.shape[1]
    qo, kv = layout.qo_indptr.tolist(), layout.kv_indptr.tolist()
    for i in range(len(qo) - 1):
        pages = layout.kv_indices[kv[i] : kv[i + 1]].long()
        assert int(layout.last_page_len[i]) == 1
        k = k_pool[pages].repeat_interleave(group, 1)
        v = v_pool[pages].repeat_interleave(group, 1)
        logits = torch.einsum("rhd,thd->hrt", q_sorted[qo[i] : qo[i + 1]], k) * scale
        seen = torch.arange(pages.numel())[None] <= layout.q_pos[qo[i] : qo[i + 1], None]
        logits = logits.masked_fill(~seen, float("-inf"))
        out[qo[i] : qo[i + 1]] = torch.einsum("hrt,thd->rhd", logits.softmax(-1), v)
    return out


@pytest.mark.parametrize("block_rows", [1, 16, 128])
def test_pseudo_requests_compute_the_same_as_the_reference(block_rows):
    torch.manual_seed(0)
    lengths = [200, 50, 1, 90]
    free = torch.randperm(500)
    slots = list(torch.split(free[: sum(lengths)], lengths))
    positions = [
        torch.randperm(200)[:77],
        torch.arange(50),
        torch.tensor([0]),
        torch.empty(0, dtype=torch.int64),
    ]
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "block_rows": block_rows}
    # The CPU cannot run the FlashInfer kernel, but a plan's blocks depend on block_rows only.
    plan = plan_position_causal(positions, slots, kernel="reference", **heads)
    layout = paged_layout(plan)
    k, v = torch.randn(2, 500, 2, 16)
    q = torch.randn(plan.num_rows, 4, 16)
    got = replay(q[plan.order], k, v, layout, 0.25)[plan.inverse]
    torch.testing.assert_close(
        got, position_causal_attention(q, k, v, plan, 0.25), rtol=1e-5, atol=1e-6
    )
    assert (
        layout.qo_indptr.dtype == layout.kv_indptr.dtype == layout.kv_indices.dtype == torch.int32
    )
    assert layout.q_pos.dtype == torch.int32
    assert layout.qo_indptr.device.type == layout.kv_indptr.device.type == "cpu"
    assert (layout.qo_indptr.diff() >= 1).all()
    assert (layout.qo_indptr.diff() <= block_rows).all()


def test_keys_behind_a_block_are_not_planned():
    plan = plan_position_causal(
        [torch.arange(0, 1024, 4)],
        [torch.arange(1024)],
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=64,
        kernel="reference",
        block_rows=128,
    )
    assert paged_layout(plan).kv_indptr.tolist() == [0, 509, 509 + 1021]


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

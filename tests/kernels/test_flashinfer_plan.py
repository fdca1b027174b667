"""The arguments handed to FlashInfer, replayed in plain torch: what the kernel would compute is position-causal."""

from __future__ import annotations

import inspect
import sys
import types
from typing import ClassVar

import pytest
import torch

from rag_kernels import (
    AttentionCall,
    BlockMask,
    MethodsOfPass,
    RequestBlocks,
    create_attention_method,
    plan_position_causal,
    position_causal_attention,
    prepare_attention,
)
from rag_kernels.attention import call as call_module
from rag_kernels.attention.choice import kernel_named
from rag_kernels.attention.flashinfer import FlashInferKernel, variant_arguments
from rag_kernels.attention.flashinfer_rows import group_rows, refuse_mask


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
        last = torch.arange(pages.numel() - count, pages.numel())
        assert int(layout.q_pos[qo[i + 1] - 1]) == pages.numel() - 1
        if not is_causal:
            last = layout.q_pos[qo[i] : qo[i + 1]]
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


@pytest.mark.parametrize(
    "name", ["power:block=32+window=2", "streaming:block=64", "strided:block=16"]
)
def test_static_masks_are_planned_as_pages_of_the_kept_blocks(name):
    torch.manual_seed(1)
    lengths = [700, 500, 64]
    slots = list(torch.randperm(1300)[: sum(lengths)].split(lengths))
    rows = torch.cat([torch.randperm(250)[:60].sort().values, torch.arange(256, 650)])
    positions = [rows, torch.arange(37, 500), torch.arange(64)]
    plan = plan_of(positions, slots, 48)
    methods = MethodsOfPass(plan, [create_attention_method(name)] * 2 + [None])
    k, v = torch.randn(2, 1300, 2, 16)
    q = torch.randn(plan.num_rows, 4, 16)
    call = AttentionCall(q_RNH=q, k_pool=k, v_pool=v, plan=plan, scale=0.25)
    mask = methods.mask(1, call)
    assert refuse_mask(mask) is None
    got = torch.full(q.shape, float("nan"))
    groups = group_rows(plan, mask)
    for layout, is_causal in ((groups.runs, True), (groups.scattered, False)):
        if layout is None:
            continue
        at, part = replay(q, k, v, layout, 0.25, is_causal)
        assert got[at].isnan().all()
        got[at] = part
    want = position_causal_attention(q, k, v, plan, 0.25, mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert work_of(groups) < work_of(group_rows(plan))


def work_of(groups):
    layouts = [one for one in (groups.runs, groups.scattered) if one is not None]
    return sum(int((one.qo_indptr.diff() * one.kv_indptr.diff()).sum()) for one in layouts)


def test_masks_that_queries_decide_are_refused():
    allowed = torch.ones(1, 2, 2, dtype=torch.bool)
    square = RequestBlocks(allowed=allowed, query_block=8, key_block=8)
    assert "queries decide" in refuse_mask(BlockMask(requests=(square,)))
    oblong = RequestBlocks(allowed=allowed, query_block=8, key_block=4, on_host=allowed)
    assert "square" in refuse_mask(BlockMask(requests=(oblong,)))
    assert refuse_mask(BlockMask(requests=(None,))) is None


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


class Wrapper:
    """In the place of FlashInfer's: notes what it is planned with, fails when told to, returns the queries."""

    plans: ClassVar[list] = []
    faults: ClassVar[list] = []

    def __init__(self, workspace, layout, **options):
        self.options = options

    def plan(self, qo, kv, indices, last, *sizes, **options):
        if self.faults and (fault := self.faults.pop(0)):
            raise fault
        self.plans.append(options | self.options)

    def run(self, q, pools, *extra):
        return q.clone()


@pytest.fixture
def kernel(monkeypatch):
    """A kernel over the stand-in, in the place of the CPU's; the reference takes what it refuses."""
    Wrapper.plans, Wrapper.faults = [], []
    module = types.SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    made = FlashInferKernel()

    def choose(call):
        return made if made.refuse(call) is None else kernel_named("reference")

    monkeypatch.setattr(call_module, "kernel_of_call", choose)
    return made


def attend(length=3, **options):
    plan = plan_position_causal(
        [torch.arange(length)],
        [torch.arange(length)],
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        kernel="reference",
    )
    q = torch.randn(length, 4, 64, dtype=torch.bfloat16)
    pools = torch.randn(2, length, 2, 64).to(options.pop("pool", torch.bfloat16))
    out = position_causal_attention(q, *pools, plan, 0.2, **options)
    return bool(torch.equal(out, q))  # the stand-in was asked


def test_a_kernel_that_cannot_be_built_is_said_once_and_replaced(kernel, monkeypatch, caplog):
    """The first use compiles; here it cannot even be imported."""
    caplog.set_level("WARNING", logger=call_module.__name__)  # an engine may have set another
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert [attend(), attend()] == [False, False]
    assert kernel.batch_faults == 0
    assert len(caplog.records) == 1
    assert "flashinfer failed" in caplog.text


def test_a_fault_of_one_batch_is_of_that_batch_until_three_in_a_row(kernel):
    fault = RuntimeError("Failed to allocate memory for batch_prefill_tmp_v in AlignedAllocator")
    Wrapper.faults = [fault, None, fault, fault, None, ValueError("anything"), fault, fault, None]
    assert [attend() for _ in range(9)] == [False, True, False, False, True] + [False] * 4
    assert kernel.batch_faults == 6
    assert Wrapper.faults == [None]  # given up: not even asked


def test_a_fault_before_anything_has_run_is_for_good(kernel):
    Wrapper.faults = [RuntimeError("Ninja build failed: nvcc not found"), None]
    assert [attend(), attend()] == [False, False]
    assert kernel.batch_faults == 0


def test_layers_of_a_pass_are_planned_once_and_before_the_first(kernel):
    plan = plan_position_causal(
        [torch.tensor([0, 7, 9])],
        [torch.arange(10)],
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        kernel="reference",
    )
    pool = torch.zeros(10, 2, 64, dtype=torch.bfloat16)
    prepare_attention(plan, pool, pool, torch.bfloat16, 0.5)
    assert len(Wrapper.plans) == 1
    assert Wrapper.plans[0]["sm_scale"] == 0.5
    for _ in range(3):
        q = torch.randn(3, 4, 64, dtype=torch.bfloat16)
        assert torch.equal(position_causal_attention(q, pool, pool, plan, 0.5), q)
    assert len(Wrapper.plans) == 1


def test_layers_with_and_without_a_window_do_not_plan_over_one_another(kernel):
    rows = torch.arange(100)
    plan = plan_position_causal(
        [rows], [rows], num_q_heads=4, num_kv_heads=2, head_dim=64, kernel="reference"
    )
    q = torch.randn(100, 4, 64, dtype=torch.bfloat16)
    pool = torch.zeros(100, 2, 64, dtype=torch.bfloat16)
    for layer in range(6):
        window = None if layer % 3 == 2 else 32
        assert torch.equal(
            position_causal_attention(q, pool, pool, plan, 0.5, sliding_window=window), q
        )
    assert [one.get("window_left") for one in Wrapper.plans] == [31, None]


def test_window_and_cap_of_runs_and_the_pools_type_are_passed_on(kernel):
    assert attend(100, sliding_window=32, logit_cap=5.0)
    (planned,) = Wrapper.plans
    assert planned["causal"] is True
    assert planned["window_left"] == 31
    assert planned["logits_soft_cap"] == 5.0
    assert attend(100, pool=torch.float8_e4m3fn)
    assert Wrapper.plans[-1]["kv_data_type"] == torch.float8_e4m3fn
    assert attend(3, pool=torch.float8_e4m3fn)  # scattered
    assert "float8_e4m3fn" in Wrapper.plans[-1]["jit_args"][0]
    assert Wrapper.plans[-1]["jit_args"][2] == torch.float8_e4m3fn


def test_what_no_wrapper_covers_is_refused_with_a_reason():
    def refusal(dim, dtype=torch.bfloat16, pool=torch.bfloat16, window=None, cap=None):
        k_pool = torch.zeros(1, 1, dim, dtype=pool)
        plan = plan_position_causal(
            [torch.tensor([0])], [torch.arange(1)], num_q_heads=1, num_kv_heads=1, head_dim=dim
        )
        call = AttentionCall(
            q_RNH=torch.zeros(1, 1, dim, dtype=dtype),
            k_pool=k_pool,
            v_pool=k_pool,
            plan=plan,
            scale=1.0,
            sliding_window=window,
            logit_cap=cap,
        )
        return FlashInferKernel().refuse(call)

    assert refusal(64) is None
    assert refusal(80) == "heads of 80"
    assert "float32" in refusal(64, torch.float32)
    assert "float32" in refusal(64, pool=torch.float32)
    assert "window" in refusal(64, window=8)
    assert "cap" in refusal(64, cap=3.0)


def test_the_installed_flashinfer_takes_what_it_is_given():
    """A changed signature would fail on a GPU only, and be taken for a machine without one."""
    flashinfer = pytest.importorskip("flashinfer")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    made = list(inspect.signature(wrapper.__init__).parameters)
    assert made[1:3] == ["float_workspace_buffer", "kv_layout"]
    assert {"backend", "jit_args", "variant_owns_mask"} <= set(made)
    planned = list(inspect.signature(wrapper.plan).parameters)
    assert planned[1:9] == [
        "qo_indptr",
        "paged_kv_indptr",
        "paged_kv_indices",
        "paged_kv_last_page_len",
        "num_qo_heads",
        "num_kv_heads",
        "head_dim_qk",
        "page_size",
    ]
    named = {"causal", "sm_scale", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type"}
    assert named <= set(planned)
    run = inspect.signature(wrapper.run).parameters
    assert list(run)[1:3] == ["q", "paged_kv_cache"]
    assert any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in run.values())


def test_variant_names_differ_wherever_the_compiled_code_does():
    names = {variant_arguments(d, h)[0] for d in (torch.float16, torch.bfloat16) for h in (64, 128)}
    assert len(names) == 4
    declared = variant_arguments(torch.bfloat16, 128)
    assert declared[7:11] == [["q_pos"], ["int32_t"], ["sm_scale"], ["double"]]
    assert f"struct {declared[11]} " in declared[12]

"""Position-causal attention against plain fp32 torch, row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCE

from rag_kernels import plan_position_causal, position_causal_attention


def reference(q, k_pool, v_pool, positions, slots, scale, window=None, cap=None, sinks=None):
    """One row at a time: only the keys that the row may see are ever touched."""
    out = torch.empty(q.shape, dtype=torch.float32)
    group = q.shape[1] // k_pool.shape[1]
    for row, p in enumerate(positions.tolist()):
        first = 0 if window is None else max(0, p - window + 1)
        seen = slots[first : p + 1]
        k = k_pool[seen].float().repeat_interleave(group, 1)
        v = v_pool[seen].float().repeat_interleave(group, 1)
        logits = torch.einsum("hd,thd->ht", q[row].float(), k) * scale
        if cap:
            logits = cap * torch.tanh(logits / cap)
        if sinks is not None:
            logits = torch.cat([logits, sinks.float()[:, None]], -1)
        out[row] = torch.einsum("ht,thd->hd", logits.softmax(-1)[:, : p + 1 - first], v)
    return out


def batch(seed, kv_heads, dim, dtype, lengths, row_counts):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    free = torch.randperm(2 * total + 3, generator=g)
    slots = list(torch.split(free[:total], lengths))
    positions = [
        torch.randperm(n, generator=g)[:r] for n, r in zip(lengths, row_counts, strict=True)
    ]
    k, v = torch.randn(2, 2 * total + 3, kv_heads, dim, generator=g).to(dtype)
    return slots, positions, k, v


@pytest.mark.parametrize("kernel", ["amx", "cpp", "cpu", "reference"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 128), (8, 1, 64), (14, 2, 24), (12, 1, 320)]
)
def test_scattered_unsorted_rows_of_a_mixed_batch(kernel, dtype, q_heads, kv_heads, dim):
    lengths, counts = [170, 1, 60, 7, 90], [97, 1, 0, 7, 31]
    slots, positions, k, v = batch(1, kv_heads, dim, dtype, lengths, counts)
    q = torch.randn(sum(counts), q_heads, dim).to(dtype)
    plan = plan_position_causal(
        positions, slots, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=dim, kernel=kernel
    )
    got = position_causal_attention(q, k, v, plan, dim**-0.5)
    rows = q.split(counts)
    want = torch.cat(
        [
            reference(r, k, v, p, s, dim**-0.5)
            for r, p, s in zip(rows, positions, slots, strict=True)
        ]
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 1, 20, 70, 1000])
@pytest.mark.parametrize("shares", [True, False], ids=["one pool", "two pools"])
def test_blocks_in_tiles_see_what_single_rows_see(window, shares):
    """Whatever stands beside a row in its block, and whether values are the keys' own rows."""
    lengths, counts = [300, 90, 64], [200, 90, 1]
    slots, positions, k, v = batch(5, 2, 32, torch.bfloat16, lengths, counts)
    v = k if shares else v
    q = torch.randn(sum(counts), 6, 32).bfloat16()
    heads = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 32, "kernel": "amx"}
    plan = plan_position_causal(positions, slots, **heads)
    got = position_causal_attention(q, k, v, plan, 32**-0.5, sliding_window=window)
    rows = q.split(counts)
    want = torch.cat(
        [
            reference(r, k, v, p, s, 32**-0.5, window)
            for r, p, s in zip(rows, positions, slots, strict=True)
        ]
    )
    torch.testing.assert_close(got.float(), want, **TOLERANCE[torch.bfloat16])
    alone = plan_position_causal([positions[0][:1]], slots[:1], **heads)
    one = position_causal_attention(q[:1], k, v, alone, 32**-0.5, sliding_window=window)
    torch.testing.assert_close(one.float(), want[:1], **TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("kernel", ["cpp", "cpu", "reference"])
@pytest.mark.parametrize(
    ("window", "cap"), [(None, None), (1, None), (20, None), (1000, None), (None, 3.0), (33, 3.0)]
)
@pytest.mark.parametrize("sinks", [None, (0.5, -3.0, 40.0, -90.0)])
def test_sliding_window_logit_cap_and_sinks(kernel, window, cap, sinks):
    sinks = None if sinks is None else torch.tensor(sinks)
    lengths, counts = [150, 90, 64], [60, 90, 1]
    slots, positions, k, v = batch(2, 2, 32, torch.float32, lengths, counts)
    positions[1] = torch.arange(90)
    q = torch.randn(sum(counts), 4, 32)
    plan = plan_position_causal(
        positions, slots, num_q_heads=4, num_kv_heads=2, head_dim=32, kernel=kernel, block_rows=16
    )
    got = position_causal_attention(
        q, k, v, plan, 0.4, sliding_window=window, logit_cap=cap, sinks=sinks
    )
    rows = q.split(counts)
    want = torch.cat(
        [
            reference(r, k, v, p, s, 0.4, window, cap, sinks)
            for r, p, s in zip(rows, positions, slots, strict=True)
        ]
    )
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


def test_all_rows_are_ordinary_causal_attention():
    slots, _, k, v = batch(3, 3, 64, torch.float32, [257], [0])
    q = torch.randn(257, 9, 64)
    plan = plan_position_causal(
        [torch.arange(257)], slots, num_q_heads=9, num_kv_heads=3, head_dim=64
    )
    assert plan.kernel in ("amx", "cpp", "cpu")
    got = position_causal_attention(q, k, v, plan, 0.125)
    want = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[slots[0]].transpose(0, 1)[None],
        v[slots[0]].transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=True,
    )[0].transpose(0, 1)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


def test_suffix_rows_are_bottom_right_causal_attention():
    slots, _, k, v = batch(4, 1, 32, torch.float32, [200], [0])
    q = torch.randn(60, 2, 32)
    plan = plan_position_causal(
        [torch.arange(140, 200)], slots, num_q_heads=2, num_kv_heads=1, head_dim=32, block_rows=32
    )
    got = position_causal_attention(q, k, v, plan, 0.2)
    want = reference(q, k, v, torch.arange(140, 200), slots[0], 0.2)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("kernel", ["cpp", "cpu", "reference"])
def test_later_keys_never_leak(kernel):
    """Keys and values behind the largest position are poisoned; a bottom-right aligned mask would read them."""
    slots, _, k, v = batch(5, 1, 32, torch.float32, [100], [0])
    positions = torch.tensor([3, 40, 77])
    k[slots[0][78:]] = float("nan")
    v[slots[0][78:]] = float("nan")
    q = torch.randn(3, 1, 32)
    plan = plan_position_causal(
        [positions], [slots[0][:78]], num_q_heads=1, num_kv_heads=1, head_dim=32, kernel=kernel
    )
    before = position_causal_attention(q, k, v, plan, 0.2)
    assert torch.isfinite(before).all()
    k[slots[0][41:78]] += 5.0
    v[slots[0][41:78]] -= 5.0
    after = position_causal_attention(q, k, v, plan, 0.2)
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=1e-6)
    assert not torch.allclose(after[2], before[2])


def test_no_rows_at_all():
    for positions, slots in ([], []), ([torch.empty(0, dtype=torch.int64)], [torch.arange(5)]):
        plan = plan_position_causal(positions, slots, num_q_heads=2, num_kv_heads=1, head_dim=8)
        out = position_causal_attention(
            torch.empty(0, 2, 8), torch.zeros(9, 1, 8), torch.zeros(9, 1, 8), plan, 1.0
        )
        assert out.shape == (0, 2, 8)


def test_the_same_rows_give_the_same_bits_whatever_else_is_in_the_batch():
    """A request must not feel its neighbours: blocks are cut within a request."""
    slots, positions, k, v = batch(6, 2, 32, torch.bfloat16, [120, 80], [50, 30])
    q = torch.randn(80, 4, 32).bfloat16()
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    both = position_causal_attention(q, k, v, plan_position_causal(positions, slots, **heads), 0.2)
    alone = position_causal_attention(
        q[50:], k, v, plan_position_causal(positions[1:], slots[1:], **heads), 0.2
    )
    assert torch.equal(both[50:], alone)


def test_blocks_cover_every_row_once_and_end_at_their_last_position():
    g = torch.Generator().manual_seed(7)
    positions = [torch.randperm(500, generator=g)[:131], torch.arange(40, 90), torch.tensor([5])]
    plan = plan_position_causal(
        positions,
        [torch.arange(500), torch.arange(90), torch.arange(6)],
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=8,
        block_rows=32,
    )
    covered = torch.cat([torch.arange(b.row_lo, b.row_hi) for b in plan.blocks])
    assert torch.equal(covered, torch.arange(plan.num_rows))
    for block in plan.blocks:
        own = plan.sorted_positions[block.row_lo : block.row_hi]
        assert block.row_hi - block.row_lo <= 32
        assert (block.open_len, block.kv_len) == (int(own[0]) + 1, int(own[-1]) + 1)
        assert block.is_run == torch.equal(
            own, torch.arange(int(own[0]), int(own[0]) + own.numel())
        )
    assert torch.equal(plan.positions[plan.order], plan.sorted_positions)
    assert torch.equal(plan.order[plan.inverse], torch.arange(plan.num_rows))
    assert torch.equal(plan.positions.long(), torch.cat(positions))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "gpu"}, "choose one of"),
        ({"kernel": "flashinfer"}, "needs a CUDA device"),
        ({"kernel": "triton"}, "TRITON_INTERPRET=1"),
        ({"num_q_heads": 3}, "must be a multiple"),
        ({"q_positions": [torch.tensor([10])]}, "positions 10..10 for 10 keys"),
        ({"q_positions": [torch.tensor([-1])]}, "positions -1..-1"),
        ({"q_positions": []}, "0 position lists for 1 slot lists"),
        ({"block_rows": 0}, "at least 1"),
    ],
)
def test_bad_plan_is_named(change, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    good = {
        "q_positions": [torch.tensor([1])],
        "slots": [torch.arange(10)],
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    } | change
    with pytest.raises(ValueError, match=message):
        plan_position_causal(good.pop("q_positions"), good.pop("slots"), **good)


def test_tensors_that_do_not_fit_the_plan_are_named():
    plan = plan_position_causal(
        [torch.tensor([1])], [torch.arange(4)], num_q_heads=2, num_kv_heads=1, head_dim=8
    )
    pool = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match="the plan was made for"):
        position_causal_attention(torch.zeros(2, 2, 8), pool, pool, plan, 1.0)
    with pytest.raises(ValueError, match="pools have shapes"):
        position_causal_attention(torch.zeros(1, 2, 8), pool, torch.zeros(4, 2, 8), plan, 1.0)
    with pytest.raises(ValueError, match="sliding_window is 0"):
        position_causal_attention(torch.zeros(1, 2, 8), pool, pool, plan, 1.0, sliding_window=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("kernel", ["flashinfer", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_kernels_agree_with_the_reference(kernel, dtype):
    lengths, counts = [901, 64, 300], [200, 64, 1]
    slots, positions, k, v = batch(8, 2, 128, dtype, lengths, counts)
    q = torch.randn(sum(counts), 8, 128).to(dtype)
    plan = plan_position_causal(
        positions, slots, num_q_heads=8, num_kv_heads=2, head_dim=128, device="cuda", kernel=kernel
    )
    got = position_causal_attention(q.cuda(), k.cuda(), v.cuda(), plan, 128**-0.5).cpu()
    rows = q.split(counts)
    want = torch.cat(
        [
            reference(r, k, v, p, s, 128**-0.5)
            for r, p, s in zip(rows, positions, slots, strict=True)
        ]
    )
    torch.testing.assert_close(got.float(), want, **TOLERANCE[dtype])

"""Scatter, deviation, attention mass and mean shift against plain fp32 or fp64 torch."""

from __future__ import annotations

import pytest
import torch
from pretend_gpu import GPU, pretend_gpu

from rag_kernels import (
    LogitRules,
    RotarySpec,
    join_mean_shifts,
    kv_deviation,
    mean_shift_inplace,
    plan_mean_shift,
    query_attention_mass,
    rerotate_keys,
    scatter_kv_inplace,
    to_device,
    to_host,
)


def make_spec(dim, rotary_dim=None, neox=True):
    rotary_dim = rotary_dim or dim
    return RotarySpec.from_inv_freq(
        10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim), rotary_dim, neox
    )


def test_scatter_into_a_pool_that_is_a_strided_view():
    big = torch.zeros(10, 2, 4, 6, dtype=torch.bfloat16)
    rows = torch.randn(3, 4, 6).bfloat16()
    scatter_kv_inplace(big[:, 1], torch.tensor([7, 0, 3]), rows)
    assert torch.equal(big[[7, 0, 3], 1], rows)
    assert not big[:, 0].any()


@pytest.mark.parametrize("metric", ["v", "k", "kv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deviation_is_the_squared_difference_over_heads_and_dimensions(metric, dtype):
    k_new, k_old, v_new, v_old = torch.randn(4, 19, 3, 64).to(dtype)
    want = torch.zeros(19, dtype=torch.float64)
    if "k" in metric:
        want += ((k_new.double() - k_old.double()) ** 2).sum((1, 2))
    if "v" in metric:
        want += ((v_new.double() - v_old.double()) ** 2).sum((1, 2))
    got = kv_deviation(k_new, k_old, v_new, v_old, metric)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_deviation_of_keys_does_not_depend_on_the_position_they_are_rotated_to():
    spec = make_spec(32)
    new, old = torch.randn(2, 7, 2, 32)
    base = kv_deviation(new, old, new, new, "k")
    moved = kv_deviation(rerotate_keys(new, 91, spec), rerotate_keys(old, 91, spec), new, new, "k")
    torch.testing.assert_close(base, moved, rtol=1e-5, atol=1e-5)


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match="choose k, v or kv"):
        kv_deviation(*torch.zeros(4, 1, 1, 2), metric="q")


@pytest.mark.parametrize("rules", [LogitRules(5, None), LogitRules(None, 2.0), LogitRules(7, 2.0)])
def test_mass_is_that_of_the_layer_with_its_window_and_cap(rules):
    pool, slots = torch.randn(60, 2, 16), torch.randperm(60)[:40]
    q, positions = torch.randn(6, 4, 16) * 3, torch.tensor([3, 9, 20, 30, 38, 39])
    got = query_attention_mass(q, pool, slots, positions, 40, 0.5, rules)
    keys = pool[slots].repeat_interleave(2, dim=1)
    logits = torch.einsum("rhd,nhd->rhn", q, keys) * 0.5
    if rules.logit_cap:
        logits = rules.logit_cap * torch.tanh(logits / rules.logit_cap)
    at = torch.arange(40)[None, None]
    hidden = at > positions[:, None, None]
    if rules.sliding_window:
        hidden = hidden | (at <= positions[:, None, None] - rules.sliding_window)
    want = logits.masked_fill(hidden, float("-inf")).softmax(-1).mean((0, 1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "q_heads", "kv_heads"), [(1, 9, 3), (13, 4, 1), (5, 2, 2)])
@pytest.mark.parametrize("block_elements", [1, 8 << 20])
def test_mass_is_the_mean_softmax_row(dtype, rows, q_heads, kv_heads, block_elements, monkeypatch):
    from rag_kernels import mass as module

    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block_elements)
    pool = torch.randn(90, kv_heads, 16).to(dtype)
    slots = torch.randperm(90)[:50]
    q = torch.randn(rows, q_heads, 16).to(dtype)
    positions = torch.randint(5, 50, (rows,))
    want = torch.zeros(50, dtype=torch.float64)
    for r in range(rows):
        for h in range(q_heads):
            keys = pool[slots[: positions[r] + 1], h // (q_heads // kv_heads)].double()
            weights = torch.softmax(keys @ q[r, h].double() * 0.3, 0)
            want[: positions[r] + 1] += weights / (rows * q_heads)
    got = query_attention_mass(q, pool, slots, positions, 50, 0.3)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)
    assert got.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_mass_of_no_rows_is_zero():
    got = query_attention_mass(
        torch.empty(0, 2, 8),
        torch.zeros(4, 1, 8),
        torch.arange(4),
        torch.empty(0, dtype=torch.int64),
        4,
        1.0,
    )
    assert got.shape == (4,)
    assert not got.any()


def reference_shift(k_pool, v_pool, k_new, v_new, chunks, rows, slots, spec, strength):
    """fp64, by un-rotating to position 0, token by token."""
    k_out, v_out = k_pool.double(), v_pool.double()
    freq = spec.inv_freq

    def turn(x, p):
        half, out = spec.rotary_dim // 2, x.clone()
        index = (
            (slice(0, half), slice(half, 2 * half))
            if spec.is_neox_style
            else (
                slice(0, 2 * half, 2),
                slice(1, 2 * half, 2),
            )
        )
        z = torch.complex(x[..., index[0]], x[..., index[1]])
        z = z * torch.polar(torch.ones_like(freq), p * freq)
        out[..., index[0]], out[..., index[1]] = z.real, z.imag
        return out

    for start, end in chunks:
        inside = [(i, p) for i, p in enumerate(rows.tolist()) if start <= p < end]
        if len(inside) < 2:
            continue
        weight = strength * len(inside) / (len(inside) + 4)
        dk = torch.stack(
            [turn(k_new[i].double() - k_pool[slots[p]].double(), -p) for i, p in inside]
        ).mean(0)
        dv = torch.stack([v_new[i].double() - v_pool[slots[p]].double() for i, p in inside]).mean(0)
        done = {p for _, p in inside}
        for p in range(start, end):
            if p not in done:
                k_out[slots[p]] += weight * turn(dk, p)
                v_out[slots[p]] += weight * dv
    return k_out, v_out


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 16), (24, 16)])
@pytest.mark.parametrize("given_old", [False, True])
def test_mean_shift_moves_only_the_rows_that_stay(neox, dim, rotary_dim, given_old):
    torch.manual_seed(3)
    spec = make_spec(dim, rotary_dim, neox)
    k_pool, v_pool = torch.randn(2, 400, 2, dim)
    slots = torch.randperm(400)[:300]
    # Chunk 1 gets five probes, chunk 2 one (too few), chunk 3 none, chunk 4 all of its tokens; 290.. is fresh.
    chunks = [(20, 100), (100, 150), (150, 220), (220, 225)]
    rows = torch.tensor([90, 25, 26, 70, 99, 120, 220, 221, 222, 223, 224, 295, 299])
    k_new, v_new = torch.randn(2, 3 + rows.numel(), 2, dim)
    want_k, want_v = reference_shift(
        k_pool, v_pool, k_new[3:], v_new[3:], chunks, rows, slots, spec, 0.4
    )
    plan = plan_mean_shift(chunks, rows, slots, spec, 0.4, first_row=3)
    assert plan.num_shifted == 75
    old = {}
    if given_old:
        k_old, v_old = torch.zeros_like(k_new), torch.zeros_like(v_new)
        k_old[3:], v_old[3:] = k_pool[slots[rows]], v_pool[slots[rows]]
        k_pool[slots[rows]], v_pool[slots[rows]] = k_new[3:], v_new[3:]
        want_k[slots[rows]], want_v[slots[rows]] = k_new[3:].double(), v_new[3:].double()
        old = {"k_old": k_old, "v_old": v_old}
    mean_shift_inplace(k_pool, v_pool, k_new, v_new, plan, **old)
    torch.testing.assert_close(k_pool.double(), want_k, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(v_pool.double(), want_v, rtol=1e-5, atol=1e-6)


def test_mean_shift_of_position_parts_and_latents_that_lie_in_one_row():
    """Rotated part and rest differ in size, and are views of one pool: as of latent attention."""
    torch.manual_seed(4)
    spec = make_spec(8, 8, False)
    pool = torch.randn(120, 1, 40)
    slots, chunks = torch.randperm(120)[:90], [(10, 50), (50, 80)]
    rows = torch.tensor([12, 20, 31, 49, 60, 61, 79, 85])
    new = torch.randn(rows.numel(), 1, 40)
    parts = (pool[..., 32:], pool[..., :32], new[..., 32:], new[..., :32])
    want = reference_shift(*parts, chunks, rows, slots, spec, 0.4)
    plan = plan_mean_shift(chunks, rows, slots, spec, 0.4)
    mean_shift_inplace(*parts, plan)
    for got, wanted in zip(parts[:2], want, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-6)


def test_shift_of_a_common_offset_repairs_the_others():
    """Every cached key off by the same un-rotated vector: strength 1 and many probes remove nearly all of it."""
    spec = make_spec(32)
    truth = torch.randn(200, 1, 32)
    positions = torch.arange(500, 700)
    offset = rerotate_keys(torch.ones(200, 1, 32), positions, spec)
    pool, v_pool = torch.zeros(2, 700, 1, 32)
    pool[500:] = truth - offset
    rows = torch.arange(500, 596)
    plan = plan_mean_shift([(500, 700)], rows, torch.arange(700), spec, strength=1.0)
    mean_shift_inplace(pool, v_pool, truth[:96], torch.zeros(96, 1, 32), plan)
    left = (pool[596:] - truth[96:]).norm() / offset[96:].norm()
    assert left == pytest.approx(4 / 100, abs=1e-4)


def test_strength_zero_or_no_probe_changes_nothing():
    spec = make_spec(8)
    pool = torch.randn(2, 30, 1, 8)
    before = pool.clone()
    new = torch.randn(2, 4, 1, 8)
    for chunks, rows, strength in [
        ([(0, 20)], [1, 2, 3, 4], 0.0),
        ([(0, 20)], [25, 26, 27, 28], 0.4),
        ([], [1, 2, 3, 4], 0.4),
    ]:
        plan = plan_mean_shift(chunks, torch.tensor(rows), torch.arange(30), spec, strength)
        mean_shift_inplace(pool[0], pool[1], new[0], new[1], plan)
    assert torch.equal(pool, before)
    with pytest.raises(ValueError, match="between 0 and 1"):
        plan_mean_shift([], torch.tensor([1]), torch.arange(3), spec, 1.5)


def test_tensors_of_all_types_come_to_the_host_as_they_are():
    with pretend_gpu() as gpu:
        given = [torch.tensor([1.5, float("inf")]), torch.tensor([[2**40, -3]]), torch.tensor(True)]
        there = [gpu.put(one) for one in given]
        own = torch.arange(3)
        found = to_host([there[0], own, *there[1:]])
        assert len(gpu.waits) == 1
        assert found[1] is own
        assert [one.dtype for one in found] == [torch.float32, torch.int64, torch.int64, torch.bool]
        for one, want in zip([found[0], *found[2:]], given, strict=True):
            assert one.device.type == "cpu"
            assert torch.equal(one, want)
        assert to_host([own]) == [own]
        assert len(gpu.waits) == 1


def test_what_the_pretended_gpu_calls_a_wait():
    with pretend_gpu() as gpu:
        there = to_device(torch.arange(4), GPU)
        assert there.device == GPU
        assert not gpu.waits
        for wait in (
            lambda: there.sum().item(),
            lambda: there[there > 1],
            lambda: there.nonzero(),
            lambda: there.unique(),
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: torch.arange(4).to(GPU),
            lambda: torch.tensor([1, 2], device=GPU),
            lambda: there[torch.tensor([1])],
        ):
            gpu.waits.clear()
            wait()
            assert len(gpu.waits) == 1, gpu.waits


def test_joined_plans_stay_apart_by_rotation_and_shift_as_one_by_one():
    """Layers of a model rotate by one of two tables: a plan of the other table must never reach them."""
    specs = (
        make_spec(16),
        RotarySpec.from_inv_freq(50.0 ** -(torch.arange(0, 16, 2) / 16), 16, True),
    )
    slots = torch.randperm(60).split(30)
    rows = torch.tensor([3, 5, 9, 14])
    plans = [
        plan_mean_shift([(0, 12), (12, 28)], rows, own, spec, first_row=4 * request)
        for request, own in enumerate(slots)
        for spec in specs
    ]
    joined = join_mean_shifts(plans)
    assert [id(one.spec) for one in joined] == [id(spec) for spec in specs]
    pools, new = torch.randn(2, 60, 2, 16), torch.randn(2, 8, 2, 16)
    for spec, together in zip(specs, joined, strict=True):
        want, got = pools.clone(), pools.clone()
        for plan in plans:
            if plan.spec is spec:
                mean_shift_inplace(want[0], want[1], new[0], new[1], plan)
        mean_shift_inplace(got[0], got[1], new[0], new[1], together)
        torch.testing.assert_close(got, want)
    assert join_mean_shifts([]) == []


def test_mass_of_a_layer_with_a_window_makes_nobody_wait():
    """Positions are on the host; their copy to a GPU comes from page-locked memory."""
    with pretend_gpu() as gpu:
        q, k, slots = (
            gpu.put(one) for one in (torch.randn(3, 2, 8), torch.randn(9, 1, 8), torch.arange(9))
        )
        rules = LogitRules(sliding_window=4, logit_cap=20.0)
        query_attention_mass(q, k, slots, torch.tensor([6, 7, 8]), 9, 0.3, rules)
        assert gpu.waits == []

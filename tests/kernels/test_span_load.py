"""One call loads all spans of a layer: the bits of one span at a time, and plain fp64 rotation within rounding.

Per span, as the reference: ``scatter(pool, slots, rerotate(keys, delta))``. In one call: plan, then
``load_spans_inplace`` for every layer.
"""

from __future__ import annotations

import pytest
import torch

from rag_kernels import (
    RotarySpec,
    load_cpu,
    load_spans_inplace,
    plan_span_load,
    rerotate_keys,
    scatter_kv_inplace,
)


def make_spec(rotary_dim, neox=True):
    return RotarySpec.from_inv_freq(
        10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim), rotary_dim, neox
    )


def span_by_span(k_pool, v_pool, slots, k_srcs, v_srcs, deltas, spec):
    for places, k, v, delta in zip(slots, k_srcs, v_srcs, deltas, strict=True):
        out = torch.empty(k.shape, dtype=k_pool.dtype)
        k_pool.index_copy_(0, places, rerotate_keys(k, delta, spec, out=out))
        v_pool.index_copy_(0, places, v.to(v_pool.dtype))


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("pool_type", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("type_", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "dim", "rotary_dim", "v_dim", "neox"),
    [
        (3, 64, 64, 64, True),
        (1, 2, 2, 2, True),
        (5, 10, 10, 10, False),
        (2, 24, 16, 24, True),
        (1, 32, 32, 96, False),
    ],
)
@pytest.mark.parametrize(
    ("lengths", "deltas"),
    [
        ((19,), (-300,)),
        ((7,), (0,)),
        ((1, 40, 3, 3, 90, 2), (5, -77, 0, 5, 1000, 0)),
        ((4, 0, 4), (9, 9, 0)),
        ((0,), (3,)),
    ],
)
@pytest.mark.parametrize("block", [262144, 600])
def test_all_spans_in_one_call_have_the_bits_of_one_at_a_time(
    monkeypatch, pool_type, type_, heads, dim, rotary_dim, v_dim, neox, lengths, deltas, block
):
    monkeypatch.setattr(load_cpu, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(load_cpu, "_ALONE_ELEMENTS", block // 4)
    torch.manual_seed(0)
    spec = make_spec(rotary_dim, neox)
    slots = torch.randperm(200)[: sum(lengths)].split(lengths)
    k_srcs = [torch.randn(n, heads, dim).to(type_) for n in lengths]
    v_srcs = [torch.randn(n, heads, v_dim).to(type_) for n in lengths]
    for k in k_srcs:
        k[:1, :1] = -0.0
    before = (
        torch.randn(200, heads, dim).to(pool_type),
        torch.randn(200, heads, v_dim).to(pool_type),
    )
    want, got = [p.clone() for p in before], [p.clone() for p in before]
    span_by_span(*want, slots, k_srcs, v_srcs, deltas, spec)
    plan = plan_span_load(slots, deltas, spec)
    for _ in range(2):  # the second layer takes what the first prepared
        load_spans_inplace(*got, k_srcs, v_srcs, plan)
    for one, other in zip(want, got, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_a_thousand_differences_are_those_of_fp64():
    """No table is kept, so none is made again: 1000 spans of one token, each at another distance."""
    spec = make_spec(32)
    deltas = torch.randperm(30000)[:1000] - 15000
    keys = torch.randn(1000, 2, 32)
    k_pool, v_pool = torch.zeros(2, 1000, 2, 32)
    parts = list(keys.split(1))
    plan = plan_span_load(list(torch.arange(1000).split(1)), deltas.tolist(), spec)
    load_spans_inplace(k_pool, v_pool, parts, parts, plan)
    turn = torch.polar(torch.ones(1000, 16).double(), deltas[:, None] * spec.inv_freq)[:, None]
    z = torch.complex(keys[..., :16].double(), keys[..., 16:].double()) * turn
    torch.testing.assert_close(
        k_pool.double(), torch.cat([z.real, z.imag], -1), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(v_pool, keys)


def test_pools_and_sources_that_are_views_without_alignment():
    spec = make_spec(8)
    big = torch.zeros(10, 2, 4, 8, dtype=torch.bfloat16)
    flat = torch.randn(1 + 3 * 32).bfloat16()
    odd = flat[1:].view(3, 4, 8)
    slots = torch.tensor([7, 0, 3])
    plan = plan_span_load([slots], [0], spec)
    load_spans_inplace(big[:, 1], big[:, 0], [odd], [odd.flip(0)], plan)
    assert torch.equal(big[slots, 1], odd)
    assert torch.equal(big[slots, 0], odd.flip(0))
    pool = torch.zeros(10, 4, 8, dtype=torch.bfloat16)
    scatter_kv_inplace(pool, slots, odd)
    assert torch.equal(pool[slots], odd)
    assert not pool[[1, 2, 4, 5, 6, 8, 9]].any()


def test_what_does_not_fit_is_refused_before_anything_is_written():
    spec = make_spec(8)
    k_pool, v_pool = torch.ones(2, 9, 1, 8)
    rows = torch.zeros(2, 1, 8)
    plan = plan_span_load([torch.tensor([1, 2]), torch.tensor([4, 5])], [3, 0], spec)
    for k, v, told in [
        ([rows], [rows, rows], r"keys of \[2\] tokens for spans of \[2, 2\]"),
        ([rows, rows], [rows, rows[:1]], r"values of \[2, 1\] tokens"),
        ([rows, torch.zeros(2, 1, 9)], [rows, rows], r"keys of shape \[2, 1, 9\]"),
        ([rows, rows], [rows, torch.zeros(2, 2, 8)], r"values of shape \[2, 2, 8\]"),
    ]:
        with pytest.raises(ValueError, match=told):
            load_spans_inplace(k_pool, v_pool, k, v, plan)
    assert (k_pool == 1).all()
    assert (v_pool == 1).all()
    with pytest.raises(ValueError, match="give one per span"):
        plan_span_load([torch.tensor([1])], [1, 2], spec)
    wide = plan_span_load([torch.tensor([1, 2])], [1], make_spec(16))
    with pytest.raises(ValueError, match="16 are to be rotated"):
        load_spans_inplace(k_pool, v_pool, [rows], [rows], wide)

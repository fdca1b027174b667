"""The choice of SALE in C++ against that by torch: the same blocks, whatever the shape, the piece or the threads."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from rag_kernels import AttentionCall, create_attention_method, plan_position_causal
from rag_kernels.native.library import load_library

pytestmark = pytest.mark.skipif(
    load_library() is None, reason="the library cannot be built on this machine"
)
SMALL = "sale:block_q=16+block_k=8+local_window=32+segment=32+min_tokens=64"
TOKENS = 460
MOST_APART = 1e-3
"""Share of blocks that may differ: fp32 sums in another order move a key that stands exactly at a threshold."""


def call_of(q_heads, kv_heads, dim, dtype, positions=None):
    """A prompt whose rows look for far keys now and then, at random slots, queries part of a larger tensor."""
    g = torch.Generator().manual_seed(q_heads * 100 + dim)
    group = q_heads // kv_heads
    k = torch.randn(TOKENS, kv_heads, dim, generator=g)
    far = torch.randint(TOKENS, (TOKENS, kv_heads), generator=g)
    looked_for = k[far, torch.arange(kv_heads)].repeat_interleave(group, dim=1)
    q = torch.randn(TOKENS, q_heads, dim, generator=g) * 0.5
    q += looked_for * (torch.rand(TOKENS, q_heads, 1, generator=g) < 0.2)
    k += 2 * torch.randn(kv_heads, dim, generator=g)
    slots = torch.randperm(2 * TOKENS, generator=g)[:TOKENS]
    pool = torch.full((2 * TOKENS, kv_heads, dim), float("nan"))
    pool[slots] = k
    positions = torch.arange(TOKENS) if positions is None else positions
    plan = plan_position_causal(
        [positions],
        [slots[: int(positions.max()) + 1]],
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
    )
    wide = torch.cat((q, q), dim=2).to(dtype)
    return AttentionCall(
        q_RNH=wide[positions, :, :dim],
        k_pool=pool.to(dtype),
        v_pool=pool.to(dtype),
        plan=plan,
        scale=1.5 * dim**-0.5,
    )


def chosen(call, options, monkeypatch=None):
    """Blocks by the library, or by torch where ``monkeypatch`` is given."""
    method = create_attention_method(options)
    if monkeypatch is not None:
        monkeypatch.setattr(type(method), "_choose_natively", lambda *args: False)
    mask = method.mask(0, call, method.prepare(call.plan, (0,)))
    if monkeypatch is not None:
        monkeypatch.undo()
    return mask.requests[0].allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim"),
    [(1, 1, 64), (4, 2, 128), (9, 3, 64), (6, 2, 80), (9, 1, 64), (3, 1, 34), (2, 1, 17)],
)
def test_the_blocks_of_torch(q_heads, kv_heads, dim, dtype, monkeypatch):
    call = call_of(q_heads, kv_heads, dim, dtype)
    options = f"{SMALL}+thresholds=0.2"
    got, want = chosen(call, options), chosen(call, options, monkeypatch)
    fewest = int(chosen(call, f"{SMALL}+thresholds=inf").sum())
    assert fewest * 1.05 < int(want.sum()) < 0.95 * want.numel()
    assert int((got != want).sum()) <= MOST_APART * want.numel()


@pytest.mark.parametrize(
    "options",
    [
        "sale:block_q=16+block_k=32+local_window=0+segment=64+min_tokens=64",
        "sale:block_q=64+block_k=64+local_window=128+segment=64+min_tokens=100",
        "sale:block_q=19+block_k=38+local_window=20+segment=76+min_tokens=76",
        "sale:block_q=15+block_k=9+local_window=7+segment=45+min_tokens=20",
    ],
)
def test_blocks_of_any_size(options, monkeypatch):
    call = call_of(4, 2, 64, torch.bfloat16)
    options = f"{options}+thresholds=0.2"
    got, want = chosen(call, options), chosen(call, options, monkeypatch)
    assert not bool(want.all())
    assert int((got != want).sum()) <= MOST_APART * want.numel()


@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(200, TOKENS),
        torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))[:120],
        torch.tensor([459]),
        torch.tensor([5, 300, 300, 301, 70]),
    ],
)
def test_pieces_and_scattered_rows(positions, monkeypatch):
    call = call_of(6, 2, 64, torch.bfloat16, positions)
    options = f"{SMALL}+thresholds=0.2"
    got, want = chosen(call, options), chosen(call, options, monkeypatch)
    assert int((got != want).sum()) <= MOST_APART * want.numel()


def test_threads_change_no_bit():
    call = call_of(9, 3, 64, torch.bfloat16)
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(chosen(call, f"{SMALL}+thresholds=0.2"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_keys_and_queries_of_nothing_but_zeros(monkeypatch):
    call = call_of(2, 1, 64, torch.float32)
    call.q_RNH.zero_()
    call.k_pool.zero_()
    options = f"{SMALL}+thresholds=0.001"
    assert torch.equal(chosen(call, options), chosen(call, options, monkeypatch))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_that_are_no_numbers_cost_their_own_block_alone(value, dtype):
    """A row of another request's batch must not end the process; the blocks of other rows stay as they are."""
    options = f"{SMALL}+thresholds=0.2"
    want = chosen(call_of(9, 3, 64, dtype), options)
    for channels in (slice(3, 4), slice(None)):
        call = call_of(9, 3, 64, dtype)
        call.q_RNH[300, 4, channels] = value
        got = chosen(call, options)
        others = torch.arange(want.shape[1]) != 300 // 16
        assert torch.equal(got[:, others], want[:, others])
        assert bool(got[:, :, 0].all())


def test_queries_of_another_plan_are_told():
    call = call_of(4, 2, 64, torch.bfloat16)
    for other in (call.q_RNH[:-1], call.q_RNH[:, :3], call.q_RNH[..., :32]):
        wrong = dataclasses.replace(call, q_RNH=other)
        with pytest.raises(IndexError, match="for a plan of 460 rows, 4 heads of 64"):
            chosen(wrong, f"{SMALL}+thresholds=0.2")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process from /proc")
def test_memory_of_a_long_prompt_is_given_back():
    """400,000 keys of 256 dimensions are 410 MB without their mean; all stand in one slot."""
    script = f"""
import os, sys, torch
from rag_kernels import AttentionCall, create_attention_method, plan_position_causal
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
def choose(keys):
    plan = plan_position_causal([torch.tensor([keys - 1])], [torch.zeros(keys, dtype=torch.int64)],
                                num_q_heads=1, num_kv_heads=1, head_dim=256)
    pool = torch.ones(1, 1, 256)
    call = AttentionCall(q_RNH=torch.ones(1, 1, 256), k_pool=pool, v_pool=pool, plan=plan, scale=0.1)
    method = create_attention_method("{SMALL}+thresholds=0.2")
    method.mask(0, call, method.prepare(plan, (0,)))
choose(4_000)
before = resident()
choose(400_000)
print(resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert float(done.stdout) < 256 + 32

"""What SALE chooses for pieces of a prompt, scattered rows and batches, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from sale_calls import (
    DIM,
    KV_HEADS,
    Q_HEADS,
    SMALL,
    TOKENS,
    attend,
    call_of,
    choose,
    planted,
    weights_of,
)
from tolerances import TOLERANCE

from rag_kernels import AttentionCall, create_attention_method, plan_position_causal


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


@pytest.mark.parametrize("estimate", ["int4", "exact"])
@pytest.mark.parametrize("cuts", [(160, 320), (16, 48, 448), (256,)])
def test_pieces_choose_what_the_whole_prompt_chooses(estimate, cuts):
    q, k, v = planted()
    method = f"sale:thresholds=0.02+{SMALL}+estimate={estimate}"
    whole = choose(method, call_of(q, k, v)).requests[0]
    edges = (0, *cuts, TOKENS)
    for start, stop in itertools.pairwise(edges):
        unwritten = k.clone()
        unwritten[stop:] = float("nan")
        call = call_of(q[start:stop], unwritten, v, torch.arange(start, stop), torch.arange(stop))
        mask = choose(method, call)
        if mask is None:
            assert stop <= 96  # so early that everything is read
            continue
        piece = mask.requests[0]
        rows = torch.arange(start, stop)
        read = piece.rows(rows)
        assert torch.equal(read, whole.rows(rows)[..., : read.shape[2]])


def test_scattered_rows_in_any_order_choose_from_the_right_keys():
    """Exact logits of a row block do not depend on which other rows of it are there, a kept block does."""
    q, k, v = planted()
    rows = torch.randperm(TOKENS)[:90]
    method = f"sale:thresholds=0.02+{SMALL}+estimate=exact"
    whole = choose(method, call_of(q, k, v)).requests[0]
    slots = torch.randperm(TOKENS)
    pool_k, pool_v = torch.empty_like(k), torch.empty_like(v)
    pool_k[slots], pool_v[slots] = k, v
    call = call_of(q[rows], pool_k, pool_v, rows, slots)
    mask = choose(method, call)
    part = mask.requests[0].rows(rows)
    assert not bool((part & ~whole.rows(rows)[..., : part.shape[2]]).any())
    weights = weights_of(call_of(q, k, v))[:, rows]
    read = part.repeat_interleave(8, dim=2)[..., :TOKENS]
    assert weights[..., : read.shape[2]].masked_fill(read, 0).max() <= 0.02 * (1 + 1e-4)
    got = attend(call, mask)
    torch.testing.assert_close(got, attend(call_of(q, k, v), None)[rows], atol=0.2, rtol=0.2)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_a_batch_of_several_prompts(kernel):
    lengths = (TOKENS, 40, 0, 200)
    made = [planted(max(n, 1)) for n in lengths]
    q, k, v = (torch.cat([m[i][:n] for m, n in zip(made, lengths, strict=True)]) for i in range(3))
    slots = list(torch.arange(sum(lengths)).split(lengths))
    plan = plan_position_causal(
        [torch.arange(n) for n in lengths],
        slots,
        num_q_heads=Q_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        kernel=kernel,
    )
    call = AttentionCall(q_RNH=q, k_pool=k, v_pool=v, plan=plan, scale=DIM**-0.5)
    method = create_attention_method(f"sale:thresholds=0.02+{SMALL}")
    mask = method.mask(0, call, method.prepare(plan, (0, 1, 2)))
    assert [blocks is None for blocks in mask.requests] == [False, True, True, True]
    alone = choose(f"sale:thresholds=0.02+{SMALL}", call_of(*made[0]))
    assert torch.equal(mask.requests[0].allowed, alone.requests[0].allowed)
    got = attend(call, mask)
    torch.testing.assert_close(
        got[:TOKENS], attend(call_of(*made[0]), alone), **TOLERANCE[torch.float32]
    )


def test_where_nothing_is_known_everything_is_read():
    q, k, v = planted()
    method = f"sale:thresholds=0.02+{SMALL}"
    assert choose(method, call_of(q, k, v)) is not None
    assert choose(method, call_of(q, k, v, sliding_window=200)) is None
    assert choose(method, call_of(q, k, v, logit_cap=30.0)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("block_q=48", "segment 128 is not a multiple of block_q 48"),
        ("block_k=0", "must be at least 8"),
        ("block_q=4+block_k=4+segment=4", "must be at least 8"),
        ("min_tokens=8", "more than block_k 32"),
        ("granularity=warp", "one of token, thread_group"),
        ("thresholds=nan", "must be at least 0"),
        ("thresholds=-1", "must be at least 0"),
        ("thresholds=no-such", "'no-such' are not known; give auto, a number, or one of"),
        ("thresholds=../../etc/passwd", "are not known"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        create_attention_method(f"sale:{options}")

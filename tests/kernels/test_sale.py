"""SALE against plain fp32 torch: smoothing, 4-bit integers, the estimate, the selection, and what a mask promises."""

from __future__ import annotations

import math

import pytest
import torch
from sale_calls import (
    DIM,
    KV_HEADS,
    Q_HEADS,
    SMALL,
    TOKENS,
    always_read,
    call_of,
    choose,
    keys_read,
    lookups,
    planted,
    weights_of,
)
from tolerances import TOLERANCE

from rag_kernels.sparse.sale.estimate import KeyTable, largest_excess
from rag_kernels.sparse.sale.quantization import quantize_int4
from rag_kernels.sparse.sale.selection import row_thresholds
from rag_kernels.sparse.sale.smoothing import smooth_keys, smooth_queries


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


# -- S1: smoothing and quantisation -----------------------------------------------------------------


def test_smoothing_changes_no_softmax_weight():
    q, k, _ = planted()
    smooth, mean = smooth_keys(k.transpose(0, 1), 50)
    torch.testing.assert_close(smooth + mean, k.transpose(0, 1), **TOLERANCE[torch.float32])
    before = (q[:, 0] @ k[:, 0].T * 0.2).softmax(-1)
    after = (q[:, 0] @ smooth[0].T * 0.2).softmax(-1)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    rest, mean_q = smooth_queries(q[:64, 0])
    again = rest @ smooth[0].T + mean_q @ smooth[0].T
    torch.testing.assert_close(again, q[:64, 0] @ smooth[0].T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("role", ["queries", "keys"])
@pytest.mark.parametrize("granularity", ["token", "thread_group"])
@pytest.mark.parametrize("tokens", [1, 19, 64, 99])
def test_a_4_bit_value_is_off_by_half_a_scale_at_most(role, granularity, tokens):
    x = torch.randn(2, tokens, 16) * torch.rand(2, tokens, 1).exp()
    x[0, 0] = 0
    int4 = quantize_int4(x, role, granularity)
    assert int4.values.dtype == torch.int8
    assert int4.values.abs().max() == 7
    off = (int4.dequantize() - x).abs()
    assert bool((off <= int4.scale[..., None] / 2 * (1 + 1e-5)).all())


def test_a_thread_group_shares_its_scale_as_the_kernel_has_it():
    x = torch.randn(64, 16)
    largest = x.abs().amax(-1) / 7
    queries = quantize_int4(x, "queries", "thread_group").scale
    keys = quantize_int4(x, "keys", "thread_group").scale
    for token in range(64):
        tile, row = divmod(token, 16)
        pair = [16 * tile + row % 8, 16 * tile + row % 8 + 8]
        assert queries[token] == largest[pair].max()
        tile, key = divmod(token, 32)
        group = [32 * tile + j for j in range(32) if j % 8 // 2 == key % 8 // 2]
        assert len(group) == 8
        assert keys[token] == largest[group].max()
    assert torch.equal(quantize_int4(x, "keys").scale, largest)


# -- the estimate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "thread_group"])
@pytest.mark.parametrize("rows", [1, 16, 7])
def test_the_estimate_is_that_of_4_bit_integers(granularity, rows):
    """Against the paper's formula element by element; common scales and lanes round by a few hundredths more."""
    q, k, _ = planted()
    keys = k.transpose(0, 1).contiguous()
    queries = q[400 : 400 + 2 * rows, :KV_HEADS].reshape(2, rows, KV_HEADS, DIM).permute(2, 0, 1, 3)
    threshold = (queries @ keys[:, None].transpose(-1, -2)).amax(-1) - torch.rand(KV_HEADS, 2, rows)
    table = KeyTable(keys, num_sink=8, num_frozen=64, granularity=granularity)
    got = largest_excess(queries, threshold, table, 256, granularity)

    smooth, mean = smooth_keys(keys, 64)
    rest, mean_q = smooth_queries(queries)
    q4 = quantize_int4(rest, "queries", granularity).dequantize()
    k4 = quantize_int4(smooth, "keys", granularity).dequantize()[:, None, :256]
    logits = (q4 + mean_q * 0) @ k4.transpose(-1, -2)
    logits = logits + mean_q @ smooth[:, None, :256].transpose(-1, -2)
    logits = logits + queries @ mean[:, None].transpose(-1, -2)
    want = (logits - threshold[..., None]).amax(-2)
    exact = (queries @ keys[:, None, :256].transpose(-1, -2) - threshold[..., None]).amax(-2)
    own_error = (want - exact)[..., 8:].square().mean().sqrt()
    assert (got - want)[..., 8:].square().mean().sqrt() <= 0.35 * own_error + 1e-4
    unquantised = KeyTable(keys, num_sink=8, num_frozen=64, is_estimated=False)
    torch.testing.assert_close(
        largest_excess(queries, threshold, unquantised, 256), exact, atol=1e-3, rtol=1e-4
    )


def test_a_threshold_far_above_the_others_keeps_more_and_never_less():
    q, k, _ = planted()
    keys = k.transpose(0, 1).contiguous()
    queries = q[400:416, :KV_HEADS].transpose(0, 1)[:, None]
    table = KeyTable(keys, num_sink=8, num_frozen=64)
    exact = (queries @ keys[:, None, :256].transpose(-1, -2)).amax(-2)
    threshold = torch.zeros(KV_HEADS, 1, 16)
    off = (largest_excess(queries, threshold, table, 256) - exact)[..., 8:].abs().max()
    threshold[..., 5:] = 1e7
    got = largest_excess(queries, threshold, table, 256)
    first = (queries[:, :, :5] @ keys[:, None, :256].transpose(-1, -2)).amax(-2)
    assert bool((got >= first - 2 * off).all())


# -- S2: the ends -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_threshold_of_zero_is_dense(dtype):
    call = call_of(*planted(dtype=dtype))
    assert choose(f"sale:thresholds=0+{SMALL}", call) is None
    mask = choose(f"sale:thresholds=1e-30+{SMALL}", call)
    assert mask is None


def test_an_infinite_threshold_leaves_sink_and_neighbourhood():
    call = call_of(*planted())
    mask = choose(f"sale:thresholds=inf+{SMALL}", call)
    read = keys_read(mask, TOKENS)
    assert torch.equal(read, always_read(TOKENS).expand_as(read))


def test_the_defaults_leave_the_papers_sink_and_neighbourhood():
    call = call_of(*planted(1500))
    read = keys_read(choose("sale:thresholds=inf", call), 1500)
    wanted = always_read(1500, 64, 32, 128, 128, 1024)
    assert torch.equal(read, wanted.expand_as(read))
    assert choose("sale:thresholds=inf", call_of(*planted(1024))) is None


# -- S3: the rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", ["int4", "exact"])
@pytest.mark.parametrize("granularity", ["token", "thread_group"])
def test_a_higher_threshold_keeps_a_part_of_what_a_lower_one_keeps(estimate, granularity):
    call = call_of(*planted())
    options = f"{SMALL}+estimate={estimate}+granularity={granularity}"
    counts, last = [], None
    for tau in (0.0005, 0.004, 0.03, 0.3, 3.0):
        read = keys_read(choose(f"sale:thresholds={tau}+{options}", call), TOKENS)
        assert last is None or not bool((read & ~last).any())
        assert not bool((always_read(TOKENS) & ~read).any())
        counts.append(int(read.sum()))
        last = read
    assert len(set(counts)) > 3


def test_no_exponential_is_needed():
    """The form in log2 chooses what the score's definition chooses."""
    call = call_of(*planted())
    mask = choose(f"sale:thresholds=0.02+{SMALL}+estimate=exact", call)
    read, reference = keys_read(mask, TOKENS), always_read(TOKENS)
    q, k = call.q_RNH, call.k_pool.repeat_interleave(2, 1)
    wanted = reference.expand(Q_HEADS, -1, -1).clone()
    close = torch.zeros_like(wanted)
    for head in range(Q_HEADS):
        logits = q[:, head] @ k[:, head].T * call.scale
        score = logits.exp() / (logits.exp() * reference).sum(-1, keepdim=True)
        for row in range(64, TOKENS, 16):
            block = score[row : row + 16].amax(0)
            end = row // 16 * 16 - 32
            end = end // 32 * 32
            for start in range(8, end, 8):
                most = block[start : start + 8].max()
                wanted[head, row : row + 16, start : start + 8] |= most > 0.02
                close[head, row : row + 16, start : start + 8] |= (most / 0.02).log().abs() < 1e-4
    assert torch.equal(read | close, wanted | close)
    assert not torch.equal(wanted, reference.expand_as(wanted))


def test_the_threshold_of_a_row():
    logits = torch.randn(3, 40)
    logits[:, 30:] = -math.inf
    tau = torch.tensor([0.01, 0.1, 1.0])
    got = row_thresholds(logits.clone(), tau, 0.3)
    want = (torch.exp(0.3 * logits).sum(-1) * tau).log() / 0.3
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


# -- S4: the bound ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.004, 0.03])
def test_what_is_left_out_by_exact_logits_weighs_less_than_the_threshold(tau):
    call = call_of(*planted())
    read = keys_read(choose(f"sale:thresholds={tau}+{SMALL}+estimate=exact", call), TOKENS)
    left_out = weights_of(call).masked_fill(read, 0)
    count = (~read & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()).sum(-1)
    assert int(count.sum()) > 0.2 * Q_HEADS * TOKENS**2 / 2
    assert left_out.max() <= tau * (1 + 1e-4)
    assert bool((left_out.sum(-1) <= tau * count + 1e-6).all())


# -- S5: against block means ------------------------------------------------------------------------


def pooled(call, mask):
    """As many blocks per row block and head, by the logits of block means; what is always read is read, too."""
    blocks = mask.requests[0]
    always = always_read(TOKENS)
    allowed = blocks.allowed.clone()
    q = call.q_RNH.float()
    k = call.k_pool.float().repeat_interleave(2, 1)
    for row in range(allowed.shape[1]):
        fixed = always[row * 16, : allowed.shape[2] * 8 : 8]
        open_blocks = (~fixed[: row * 2]).nonzero().flatten()
        mean_k = torch.stack([k[8 * j : 8 * j + 8].mean(0) for j in range(allowed.shape[2])])
        scores = torch.einsum("hd,jhd->hj", q[16 * row : 16 * row + 16].mean(0), mean_k)
        for head in range(allowed.shape[0]):
            count = int(allowed[head, row, open_blocks].sum())
            allowed[head, row, open_blocks] = False
            best = scores[head, open_blocks].topk(count).indices if count else []
            allowed[head, row, open_blocks[best]] = True
    return type(mask)(requests=(type(blocks)(allowed=allowed, query_block=16, key_block=8),))


def test_heavy_keys_are_found_that_block_means_hide():
    call = call_of(*planted())
    weights = weights_of(call)
    int4 = choose(f"sale:thresholds=0.02+{SMALL}", call)
    exact = choose(f"sale:thresholds=0.02+{SMALL}+estimate=exact", call)
    other = pooled(call, int4)
    assert other.requests[0].allowed.sum() == int4.requests[0].allowed.sum()
    lost = {}
    for name, mask in {"int4": int4, "exact": exact, "pooled": other}.items():
        left_out = weights.masked_fill(keys_read(mask, TOKENS), 0).sum(-1)
        lost[name] = sum(float(left_out[head, row]) for _, row, head in lookups())
    assert lost["int4"] < 0.2 * lost["pooled"]
    assert lost["int4"] < 1.3 * lost["exact"]


# -- pieces, other rows, batches --------------------------------------------------------------------

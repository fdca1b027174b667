"""The CPU backend's arithmetic against a plain fp32 reference.

Reference: for each query, take the keys it may see, softmax over the scaled products, weigh values.
Code under test: blocks, packed query heads, truncated keys, masks, padding.
"""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import TOLERANCE

from rag_kernels.attention.torch_sdpa import (
    causal_mask,
    decode_attention,
    extend_attention,
    packed_decode_attention,
)
from rag_kernels.attention.torch_softmax import written_out_attention
from rag_pipeline.sglang_plugin.cpu.softcap import softcap_logits


def reference(q_THD, k_NKD, v_NKE, *, scale, window=None):
    q, k, v = q_THD.float(), k_NKD.float(), v_NKE.float()
    new, heads, _ = q.shape
    group = heads // k.shape[1]
    out = torch.empty(new, heads, v.shape[2])
    for row in range(new):
        position = k.shape[0] - new + row
        first = 0 if window is None else max(0, position - window)
        for head in range(heads):
            keys = k[first : position + 1, head // group]
            weights = torch.softmax(keys @ q[row, head] * scale, dim=0)
            out[row, head] = weights @ v[first : position + 1, head // group]
    return out


def make(new, cached, heads, kv_heads, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    total = new + cached
    return normal(new, heads, dim), normal(total, kv_heads, dim), normal(total, kv_heads, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize(("new", "cached"), [(1, 0), (19, 0), (1, 99), (19, 99), (99, 1), (99, 19)])
def test_extend_equals_reference(new, cached, heads, kv_heads, dtype):
    q, k, v = make(new, cached, heads, kv_heads, dtype=dtype)
    got = extend_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(got.float(), reference(q, k, v, scale=0.25), **TOLERANCE[dtype])
    assert got.dtype == dtype


@pytest.mark.parametrize("window", [0, 1, 18, 99, 1000])
@pytest.mark.parametrize(("new", "cached"), [(1, 40), (19, 0), (19, 99), (99, 19)])
def test_extend_with_sliding_window_equals_reference(new, cached, window):
    q, k, v = make(new, cached, 6, 2)
    got = extend_attention(q, k, v, scale=0.3, window=window)
    want = reference(q, k, v, scale=0.3, window=window)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("new", [255, 256, 257, 600])
@pytest.mark.parametrize("window", [None, 70])
def test_extend_is_the_same_across_block_borders(new, window):
    q, k, v = make(new, 33, 2, 1, dim=8)
    got = extend_attention(q, k, v, scale=0.3, window=window)
    want = reference(q, k, v, scale=0.3, window=window)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


def test_extend_takes_values_of_another_width():
    q, k, _ = make(19, 5, 4, 2)
    v = torch.randn(24, 2, 7, generator=torch.Generator().manual_seed(1))
    got = extend_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(got, reference(q, k, v, scale=0.3), **TOLERANCE[torch.float32])


def test_extend_never_looks_ahead():
    q, k, v = make(19, 7, 4, 2)
    before = extend_attention(q, k, v, scale=0.3)
    k[20:], v[20:] = 50.0, -50.0
    after = extend_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(after[:13], before[:13], rtol=0, atol=0)
    assert not torch.allclose(after[13:], before[13:])


@pytest.mark.parametrize("lengths", [[1], [19, 19], [99, 1, 19]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_decode_batch_equals_each_request_alone(lengths, dtype):
    longest = max(lengths)
    parts = [make(1, n - 1, 9, 3, dtype=dtype, seed=n) for n in lengths]
    q = torch.cat([part[0] for part in parts])
    # Padding is filled with large numbers: a mask that leaks would show.
    k = torch.full((len(lengths), longest, 3, 16), 30.0, dtype=dtype)
    v = torch.full((len(lengths), longest, 3, 16), 30.0, dtype=dtype)
    mask = torch.zeros(len(lengths), longest, dtype=dtype)
    for row, (length, (_, key, value)) in enumerate(zip(lengths, parts, strict=True)):
        k[row, :length], v[row, :length] = key, value
        mask[row, length:] = -math.inf
    got = packed_decode_attention(q, k, v, scale=0.25, mask_BN=mask)
    want = torch.cat([reference(*part, scale=0.25) for part in parts])
    torch.testing.assert_close(got.float(), want, **TOLERANCE[dtype])


def test_mask_shows_the_past_and_hides_the_future():
    mask = causal_mask(torch.tensor([3, 5]), 2, 7, window=2, dtype=torch.float32)
    hidden = torch.isinf(mask)
    # keys at positions 2..6; query at 3 sees 1..3, query at 5 sees 3..5
    assert hidden.tolist() == [
        [False, False, True, True, True],
        [True, False, False, False, True],
    ]


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (6, 1)])
@pytest.mark.parametrize("length", [1, 19, 99, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_of_one_length_has_the_bits_of_one_call_a_request(length, heads, kv_heads, dtype):
    parts = [make(1, length - 1, heads, kv_heads, dtype=dtype, seed=n) for n in range(3)]
    q, k, v = (torch.stack([part[index] for part in parts]) for index in range(3))
    got = decode_attention(q[:, 0], k, v, scale=0.25)
    alone = [
        torch.nn.functional.scaled_dot_product_attention(
            part[0].movedim(0, 1)[None],
            part[1].movedim(0, 1)[None],
            part[2].movedim(0, 1)[None],
            scale=0.25,
            enable_gqa=True,
        )[0, :, 0]
        for part in parts
    ]
    torch.testing.assert_close(got, torch.stack(alone), rtol=0, atol=0)
    want = torch.cat([reference(*part, scale=0.25) for part in parts])
    torch.testing.assert_close(got.float(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 18])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("new", "cached"), [(1, 40), (19, 0), (300, 19)])
def test_written_out_attention_has_window_cap_and_sinks(new, cached, window, cap, has_sinks):
    q, k, v = make(new, cached, 6, 2)
    sinks = torch.linspace(-2, 3, 6) if has_sinks else None
    got = written_out_attention(q, k, v, scale=0.9, window=window, logit_cap=cap, sinks=sinks)
    logits = torch.einsum("thd,nhd->htn", q, k.repeat_interleave(3, 1)) * 0.9
    if cap:
        logits = cap * torch.tanh(logits / cap)
    at, rows = torch.arange(new + cached), torch.arange(cached, new + cached)[:, None]
    hidden = (at > rows) | (at < rows - (10**9 if window is None else window))
    weights = logits.masked_fill(hidden, -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if has_sinks:
        total = total + sinks.exp()[:, None, None]
    want = torch.einsum("htn,nhe->the", weights / total, v.repeat_interleave(3, 1))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_cap_on_output_logits_is_that_of_the_kernel_it_takes_the_place_of():
    logits = torch.linspace(-200, 200, 12).view(3, 4)
    want, whole = 30 * torch.tanh(logits / 30), torch.empty(3, 4)
    half = logits.bfloat16()
    assert softcap_logits(half, None, whole) is whole
    assert torch.equal(whole, half.float())
    assert softcap_logits(logits, 30.0) is logits
    torch.testing.assert_close(logits, want)

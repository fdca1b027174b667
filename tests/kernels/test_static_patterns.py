"""PowerAttention and the static patterns that it is compared with: the rules, what they reach, what they cost."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tolerances import TOLERANCE

from rag_kernels import (
    AttentionCall,
    MethodsOfPass,
    create_attention_method,
    plan_position_causal,
    position_causal_attention,
)

HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}


# -- the rules, token by token ------------------------------------------------------------------


def power(i, j, block, window=5, sink=1):
    distance = i // block - j // block
    is_power = distance > 0 and math.log2(distance).is_integer()
    return j <= i and (distance < window or is_power or j < sink * block)


def streaming(i, j, block, window=9, sink=1):
    return j <= i and (i // block - j // block < window or j < sink * block)


def strided(i, j, block, window=6, sink=1, stride=32):
    distance = i // block - j // block
    return j <= i and (distance < window or distance % stride == 0 or j < sink * block)


def dilated(i, j, block, window=20, sink=0, gap=1):
    distance = i // block - j // block
    near = distance < window and distance % (gap + 1) == 0
    return j <= i and (near or j < sink * block)


def longnet(i, j, block, segment=8, levels=5):
    row, key = i // block, j // block
    pairs = [(segment * 2**level, 2**level) for level in range(levels)]
    return j <= i and any(row // w == key // w and row % r == key % r for w, r in pairs)


RULES = {
    "power": (power, {"window": 3, "sink": 2}),
    "streaming": (streaming, {"window": 4, "sink": 2}),
    "strided": (strided, {"window": 2, "sink": 1, "stride": 5}),
    "dilated": (dilated, {"window": 7, "sink": 1, "gap": 2}),
    "longnet": (longnet, {"segment": 3, "levels": 4}),
}


def made(name, block, **options):
    words = "+".join(f"{key}={value}" for key, value in {"block": block, **options}.items())
    return create_attention_method(f"{name}:{words}")


def mask_of(method, plan, layer=0):
    call = AttentionCall(
        q_RNH=torch.zeros(plan.num_rows, 4, 16),
        k_pool=torch.zeros(1, 2, 16),
        v_pool=torch.zeros(1, 2, 16),
        plan=plan,
        scale=1.0,
    )
    return MethodsOfPass(plan, [method] * len(plan.slots)).mask(layer, call)


def read_keys(blocks, positions, length):
    """What rows read by a mask, causality on top: bool ``[rows, length]``."""
    key = torch.arange(length)
    by_block = blocks.rows(positions)[0]
    return by_block[:, key // blocks.key_block] & (key[None] <= positions[:, None])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("defaults", [True, False])
@pytest.mark.parametrize("length", [1, 8, 99, 331])
def test_a_pattern_is_its_rule_token_by_token(name, defaults, length):
    rule, options = RULES[name]
    options = {} if defaults else options
    positions = torch.arange(length)
    plan = plan_position_causal([positions], [positions], **HEADS)
    blocks = mask_of(made(name, 8, **options), plan).requests[0]
    want = torch.tensor([[rule(i, j, 8, **options) for j in range(length)] for i in range(length)])
    assert torch.equal(read_keys(blocks, positions, length), want)


@pytest.mark.parametrize("name", RULES)
def test_scattered_rows_pieces_and_decoded_tokens_read_what_the_whole_prompt_reads(name):
    rule, options = RULES[name]
    method, length = made(name, 8, **options), 400
    scattered = torch.randperm(length)[:50]
    piece = torch.arange(237, 330)
    plan = plan_position_causal(
        [scattered, torch.arange(0), piece],
        [torch.arange(length)] * 2 + [torch.arange(330)],
        **HEADS,
    )
    mask = mask_of(method, plan)
    assert mask.requests[1] is None
    assert mask.requests[2].first_query_block == 237 // 8
    for request, rows in ((0, scattered), (2, piece)):
        got = read_keys(mask.requests[request], rows, length if request == 0 else 330)
        for row, position in zip(got, rows.tolist(), strict=True):
            assert row.tolist() == [rule(position, j, 8, **options) for j in range(len(row))]
    for position in (0, 7, 8, 237, 399):
        kept = method.decode_blocks(position).tolist()
        assert kept == [b for b in range(position // 8 + 1) if rule(position, b * 8, 8, **options)]


@pytest.mark.parametrize(
    ("text", "dense"),
    [
        ("power", []),
        ("power:dense_layers=2", [0, 1, 7, 8, 14]),
        ("power:dense_layers=2+dense_offset=6", [0, 6, 7, 13, 14]),
        ("streaming:dense_layers=1+dense_period=5+dense_offset=3", [3, 8, 13]),
        ("longnet:dense_layers=7", list(range(15))),
    ],
)
def test_dense_layers_are_those_of_each_period(text, dense):
    method = create_attention_method(text)
    rows = torch.arange(9)
    plan = plan_position_causal([rows], [rows], **HEADS)
    assert [n for n in range(15) if method.reads_all(n)] == dense
    assert [n for n in range(15) if mask_of(method, plan, n) is None] == dense


def test_methods_with_other_options_have_another_identity():
    texts = ["power", "power:block=64", "power:window=4", "power:sink=0", "power:dense_layers=2"]
    texts += ["power:dense_period=8", "power:dense_offset=1", "streaming:window=5", "strided"]
    texts += ["strided:stride=16", "dilated", "dilated:gap=2", "longnet", "longnet:segment=4"]
    assert len({create_attention_method(text).identity for text in texts}) == len(texts)
    same = create_attention_method("power:block=256+window=5+sink=1")
    assert same.identity == create_attention_method("power").identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("power:block=4", "block is 4 tokens; it must be between 8 and"),
        ("power:window=0", "window is 0 blocks; it must be at least 1"),
        ("power:sink=-1", "sink is -1 blocks; it must be at least 0"),
        ("power:dense_layers=8", "dense_layers is 8 of a dense_period of 7"),
        ("power:dense_offset=7", "dense_offset is 7; it must be 0 to dense_period - 1, 6"),
        ("strided:stride=0", "stride is 0 blocks; it must be at least 1"),
        ("dilated:gap=-1", "gap is -1 blocks; it must be at least 0"),
        ("longnet:segment=0", "segment is 0 blocks; it must be at least 1"),
        ("longnet:levels=0", "levels is 0; it must be between 1 and 20"),
    ],
)
def test_options_that_name_no_pattern_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        create_attention_method(text)


# -- what a pattern reaches ---------------------------------------------------------------------


def hops(text, blocks):
    """Least number of layers after which each block has seen each other one; -1 where that is never."""
    read = create_attention_method(text).allowed(0, blocks - 1)
    seen, least = torch.eye(blocks).bool(), torch.full((blocks, blocks), -1)
    least[seen] = 0
    for layer in range(1, blocks + 1):
        found = (seen.float() @ read.float()) > 0
        if torch.equal(found, seen):
            break
        least[found & ~seen] = layer
        seen = found
    return least


def test_powers_alone_reach_a_distance_in_as_many_layers_as_it_has_bits():
    least = hops("power:window=1+sink=0", 512)
    for distance in range(512):
        assert least.diagonal(-distance).unique().tolist() == [distance.bit_count()]


@pytest.mark.parametrize(
    ("text", "reach"),
    [
        # blocks in a row that L = 1, 2, .. layers have seen, the own one counted
        ("power:window=1+sink=0", [3, 7, 15, 31, 63, 127, 255]),
        ("power:window=5+sink=0", [5, 13, 29, 61, 125, 253]),
        ("streaming:window=9+sink=0", [9, 17, 25, 33, 41, 49]),
    ],
)
def test_blocks_in_a_row_that_so_many_layers_have_seen(text, reach):
    least = hops(text, 300)[-1].flip(0)
    for layers, wanted in enumerate(reach, 1):
        is_seen = (least <= layers) & (least >= 0)
        assert int((~is_seen).nonzero()[0]) == wanted


def test_a_prompt_of_32k_is_seen_whole_in_6_layers_and_by_a_window_of_equal_blocks_in_16():
    assert int(hops("power:window=5+sink=0", 128)[-1].max()) == 6
    assert int(hops("power:window=1+sink=0", 128)[-1].max()) == 7
    assert int(hops("streaming:window=9+sink=0", 128)[-1].max()) == math.ceil(127 / 8)


def test_a_dilated_window_never_sees_odd_distances_and_segments_miss_blocks():
    least = hops("dilated", 128)
    assert all((least.diagonal(-distance) == -1).all() for distance in range(1, 128, 2))
    assert all((least.diagonal(-distance) > 0).all() for distance in range(2, 128, 2))
    least = hops("longnet", 128)
    assert least[64, 63] == -1  # the next block, across a border


# -- what a pattern costs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("power", {8: 8, 16: 9, 32: 10, 64: 11, 128: 12}),
        ("streaming", {8: 10, 16: 10, 32: 10, 64: 10, 128: 10}),
        ("strided", {32: 10, 64: 14, 128: 22}),
        ("dilated", {8: 10, 32: 10, 128: 10}),
    ],
)
def test_blocks_that_a_decoded_token_reads(text, lengths):
    method = create_attention_method(text)
    got = {kib: method.decode_blocks(kib * 1024 - 1).numel() for kib in lengths}
    assert got == lengths


def test_blocks_per_row_are_the_window_the_powers_beyond_it_and_the_sink():
    method = create_attention_method("power")
    for own in range(200):
        window = min(5, own + 1)
        powers = [2**k for k in range(3, 8) if 2**k < own]  # at `own` it is the sink itself
        is_sink_apart = own >= 5
        assert method.decode_blocks(own * 256).numel() == window + len(powers) + is_sink_apart


# -- the kernels --------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["power", "longnet"])
def test_prefill_whole_and_in_pieces_is_dense_attention_with_the_mask(kernel, dtype, name):
    rule, options = RULES[name]
    method, length = made(name, 8, **options), 301
    slots, scale = torch.randperm(400)[:length], 0.3
    k, v = torch.randn(2, 400, 2, 16).to(dtype)
    q = torch.randn(length, 4, 16).to(dtype)
    hidden = torch.tensor(
        [[not rule(i, j, 8, **options) for j in range(length)] for i in range(length)]
    )
    kk, vv = (t[slots].float().repeat_interleave(2, dim=1) for t in (k, v))
    logits = torch.einsum("rhd,khd->hrk", q.float() * scale, kk).masked_fill(hidden, -math.inf)
    want = torch.einsum("hrk,khd->rhd", logits.softmax(-1), vv)
    for edges in ([0, length], [0, 100, 101, 250, length]):
        parts = []
        for start, stop in itertools.pairwise(edges):
            plan = plan_position_causal(
                [torch.arange(start, stop)], [slots[:stop]], **HEADS, kernel=kernel
            )
            parts.append(
                position_causal_attention(
                    q[start:stop], k, v, plan, scale, mask=mask_of(method, plan)
                )
            )
        torch.testing.assert_close(torch.cat(parts).float(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["power", "streaming", "strided"])
def test_a_prompt_within_the_window_is_full_attention_to_the_bit(name):
    length = 5 * 16
    k, v = torch.randn(2, length, 2, 16)
    q, rows = torch.randn(length, 4, 16), torch.arange(length)
    plan = plan_position_causal([rows], [rows], **HEADS)
    mask = mask_of(made(name, 16, window=5), plan)
    got = position_causal_attention(q, k, v, plan, 0.3, mask=mask)
    assert torch.equal(got, position_causal_attention(q, k, v, plan, 0.3))

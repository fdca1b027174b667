"""Methods that choose blocks by scores: block top-k, vertical-slash, XAttention, each against its definition in loops."""

from __future__ import annotations

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

SCALE, BLOCK = 0.35, 8


class Prompt:
    """A request's keys, and rows of it, in a shuffled pool; 4 query heads share 2 key heads."""

    def __init__(self, length, rows=None, seed=0):
        torch.manual_seed(seed)
        self.length = length
        self.rows = torch.arange(length) if rows is None else rows
        self.slots = torch.randperm(length + 9)[:length]
        # Some keys that every query likes, and rows that like their neighbours.
        trend = torch.randn(length, 1, 16).cumsum(0) * 0.5
        k = torch.randn(length, 2, 16) + trend
        k[length // 3] *= 4
        self.k_pool = torch.zeros(length + 9, 2, 16)
        self.v_pool = torch.randn(length + 9, 2, 16)
        self.k_pool[self.slots] = k
        self.k = k
        self.q = torch.randn(len(self.rows), 4, 16) + trend[self.rows] * 0.5
        self.plan = plan_position_causal(
            [self.rows], [self.slots], num_q_heads=4, num_kv_heads=2, head_dim=16
        )

    def call(self, mask=None):
        return AttentionCall(
            q_RNH=self.q,
            k_pool=self.k_pool,
            v_pool=self.v_pool,
            plan=self.plan,
            scale=SCALE,
            mask=mask,
        )

    def mask(self, text, layer=0):
        return MethodsOfPass(self.plan, [create_attention_method(text)]).mask(layer, self.call())

    def read(self, text):
        """Blocks that each row reads, by row in the order of the queries: bool ``[4, R, K]``."""
        rows = self.mask(text).requests[0].rows(self.rows)
        return rows.expand(4, -1, -1)

    def weights(self, head, row):
        """Attention of one row over all keys before it."""
        position = int(self.rows[row])
        logits = self.k[: position + 1, head // 2] @ self.q[row, head] * SCALE
        return logits.softmax(0)

    def attend(self, mask):
        return position_causal_attention(
            self.q, self.k_pool, self.v_pool, self.plan, SCALE, mask=mask
        )


def prompts():
    return [
        Prompt(100),
        Prompt(64, seed=1),
        Prompt(131, rows=torch.randperm(131)[:40], seed=2),
        Prompt(120, rows=torch.arange(77, 120), seed=3),
        Prompt(50, rows=torch.tensor([49]), seed=4),
    ]


METHODS = ["block_topk", "vertical_slash", "xattention"]


def highest(values, count):
    order = sorted(range(len(values)), key=lambda at: (-values[at], at))
    return set(order[:count])


@pytest.mark.parametrize("prompt", prompts())
@pytest.mark.parametrize(("blocks", "share", "sink"), [(4, 0.0, 1), (1, 0.4, 0), (3, 0.0, 2)])
def test_block_top_k_takes_the_highest_products_of_means(prompt, blocks, share, sink):
    read = prompt.read(f"block_topk:block={BLOCK}+blocks={blocks}+share={share}+sink={sink}")
    for row, position in enumerate(prompt.rows.tolist()):
        own = position // BLOCK
        mates = prompt.rows // BLOCK == own
        count = max(blocks, math.ceil((own + 1) * share - 1e-6), sink + 1)
        for head in range(4):
            query = prompt.q[mates, head].mean(0)
            scores = [
                math.inf
                if block < sink
                else float(prompt.k[block * BLOCK : (block + 1) * BLOCK, head // 2].mean(0) @ query)
                for block in range(own)
            ]
            want = highest(scores, count - 1) | {own}
            assert set(read[head, row].nonzero().flatten().tolist()) == want


@pytest.mark.parametrize("prompt", prompts())
@pytest.mark.parametrize(("vertical", "slash", "last"), [(2, 3, 16), (4, 2, 64), (1, 1, 1)])
def test_vertical_slash_takes_what_the_last_rows_look_at(prompt, vertical, slash, last):
    read = prompt.read(
        f"vertical_slash:block={BLOCK}+vertical={vertical}+slash={slash}+last={last}"
    )
    order = prompt.rows.argsort()
    newest = int(prompt.rows.max()) // BLOCK
    for head in range(4):
        columns, diagonals = [0.0] * (newest + 1), [0.0] * (newest + 1)
        for row in order[-last:].tolist():
            own = int(prompt.rows[row]) // BLOCK
            for key, weight in enumerate(prompt.weights(head, row).tolist()):
                columns[key // BLOCK] += weight
                diagonals[own - key // BLOCK] += weight
        columns[0] = diagonals[0] = math.inf
        if newest:
            diagonals[1] = math.inf
        kept, away = highest(columns, vertical), highest(diagonals, slash)
        for row, position in enumerate(prompt.rows.tolist()):
            own = position // BLOCK
            want = {b for b in range(own) if b in kept or own - b in away} | {own}
            assert set(read[head, row].nonzero().flatten().tolist()) == want


def antidiagonals(prompt, head, stride):
    """Mass of each pair of blocks by the definition, for a prompt whose rows are all of it from a block's start on."""
    first = int(prompt.rows[0])
    groups = range(first // stride, -(-prompt.length // stride))
    mass = torch.zeros(-(-prompt.length // BLOCK), -(-prompt.length // BLOCK))
    for group in groups:
        logits = []
        ends = min((group + 1) * stride, prompt.length) - 1
        for keys in range(ends // stride + 1):
            total = 0.0
            for offset in range(stride):
                row, key = group * stride + offset, keys * stride + stride - 1 - offset
                if row < prompt.length and key < prompt.length:
                    total += float(prompt.q[row - first, head] @ prompt.k[key, head // 2])
            logits.append(total * SCALE / stride)
        weights = torch.tensor(logits).softmax(0)
        for keys, weight in enumerate(weights):
            mass[group * stride // BLOCK, keys * stride // BLOCK] += weight
    return mass


@pytest.mark.parametrize(
    "prompt", [Prompt(100), Prompt(64, seed=1), Prompt(96, torch.arange(40, 96))]
)
@pytest.mark.parametrize("stride", [2, 8])
def test_xattention_holds_the_share_of_the_antidiagonals_with_the_fewest_blocks(prompt, stride):
    threshold = 0.8
    read = prompt.read(f"xattention:block={BLOCK}+stride={stride}+threshold={threshold}+sink=1")
    few = prompt.read(f"xattention:block={BLOCK}+stride={stride}+blocks=4")
    for head in range(4):
        mass = antidiagonals(prompt, head, stride)
        for row, position in enumerate(prompt.rows.tolist()):
            own = position // BLOCK
            line = mass[own, : own + 1]
            given = {0, own}
            ranked = sorted(set(range(own)) - given, key=lambda b: -float(line[b]))
            want, held = set(given), float(line[list(given)].sum())
            for block in ranked:
                if held >= threshold * float(line.sum()) - 1e-6:
                    break
                want.add(block)
                held += float(line[block])
            assert set(read[head, row].nonzero().flatten().tolist()) == want
            kept = {
                own,
                *([0, *ranked[:2]] if own else []),
            }  # four: the own one, the sink, the two heaviest
            assert set(few[head, row].nonzero().flatten().tolist()) == kept


@pytest.mark.parametrize("prompt", prompts())
@pytest.mark.parametrize(
    "text",
    [
        "block_topk:block=8+blocks=99",
        "block_topk:block=8+blocks=1+share=1",
        "vertical_slash:block=8+vertical=99",
        "vertical_slash:block=8+slash=99",
        "xattention:block=8+blocks=99",
        "xattention:block=8+threshold=1",
    ],
)
def test_options_that_keep_everything_are_full_attention(prompt, text):
    got = prompt.attend(prompt.mask(text))
    torch.testing.assert_close(got, prompt.attend(None), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", METHODS)
def test_more_blocks_lose_less(name):
    options = {
        "block_topk": ["blocks=2", "blocks=6", "blocks=12"],
        "vertical_slash": ["vertical=1+slash=1", "vertical=3+slash=3", "vertical=6+slash=6"],
        "xattention": ["threshold=0.3", "threshold=0.7", "threshold=0.95"],
    }[name]
    prompt = Prompt(200, seed=5)
    dense = prompt.attend(None)
    lost = [
        float((prompt.attend(prompt.mask(f"{name}:block=8+{words}")) - dense).square().mean())
        for words in options
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 1.5 * lost[-1]


@pytest.mark.parametrize("name", METHODS)
def test_first_layers_are_dense_on_request(name):
    prompt = Prompt(60)
    text = f"{name}:block=8+dense_layers=2"
    assert [prompt.mask(text, layer) is None for layer in range(4)] == [True, True, False, False]
    method = create_attention_method(text)
    assert [method.reads_all(layer) for layer in range(3)] == [True, True, False]
    assert not method.acts_on_decode
    with pytest.raises(NotImplementedError, match=f"{name!r} does not act on decoding"):
        method.decode_blocks(5)


@pytest.mark.parametrize("name", METHODS)
def test_requests_of_a_pass_choose_for_themselves(name):
    one, other = Prompt(90, rows=torch.arange(30, 90), seed=6), Prompt(70, seed=7)
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    plan = plan_position_causal(
        [one.rows, torch.arange(0), other.rows],
        [one.slots, torch.arange(5), other.slots + 99],
        **heads,
    )
    pools = [torch.cat([a, b]) for a, b in ((one.k_pool, other.k_pool), (one.v_pool, other.v_pool))]
    call = AttentionCall(
        q_RNH=torch.cat([one.q, other.q]), k_pool=pools[0], v_pool=pools[1], plan=plan, scale=SCALE
    )
    method = create_attention_method(f"{name}:block=8")
    mask = MethodsOfPass(plan, [method] * 3).mask(0, call)
    assert mask.requests[1] is None
    for request, prompt in ((0, one), (2, other)):
        alone = prompt.mask(f"{name}:block=8").requests[0]
        assert torch.equal(mask.requests[request].rows(prompt.rows), alone.rows(prompt.rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block_topk:blocks=0", "blocks is 0; it must be at least 1"),
        ("block_topk:share=1.5", "share is 1.5; it must be between 0 and 1"),
        ("block_topk:sink=-1", "sink is -1 blocks"),
        ("block_topk:block=1", "block is 1 tokens"),
        ("block_topk:dense_layers=-1", "dense_layers is -1"),
        ("vertical_slash:vertical=0", "vertical is 0; it must be at least 1"),
        ("vertical_slash:last=0", "last is 0; it must be at least 1"),
        ("xattention:stride=3", "stride is 3; it must divide block, 128"),
        ("xattention:threshold=0", "threshold is 0.0; it must be above 0"),
        ("xattention:blocks=-1", "blocks is -1"),
    ],
)
def test_options_that_name_no_choice_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        create_attention_method(text)

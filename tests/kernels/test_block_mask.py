"""Masks of key blocks against plain fp32 torch, and the methods of a pass that make them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tolerances import TOLERANCE

from rag_kernels import (
    ATTENTION_METHODS,
    AttentionCall,
    AttentionMethod,
    BlockMask,
    MethodsOfPass,
    RequestBlocks,
    create_attention_method,
    plan_position_causal,
    position_causal_attention,
)

LENGTHS, COUNTS = (150, 99, 5, 19), (40, 1, 0, 19)


def batch(q_heads, kv_heads, dim, dtype=torch.float32):
    """Requests with scattered, single, no and all rows over shuffled slots."""
    slots = list(torch.randperm(400)[: sum(LENGTHS)].split(LENGTHS))
    positions = [
        torch.randperm(n)[:count] if count < n else torch.arange(n)
        for n, count in zip(LENGTHS, COUNTS, strict=True)
    ]
    k, v = torch.randn(2, 400, kv_heads, dim).to(dtype)
    q = torch.randn(sum(COUNTS), q_heads, dim).to(dtype)
    return slots, positions, q, k, v


def mask_of(heads, query_block, key_block, share=0.4, lengths=LENGTHS):
    """Random blocks for every request but the second, which is dense."""
    made = [
        RequestBlocks(
            allowed=torch.rand(heads, -(-n // query_block), -(-n // key_block)) < share,
            query_block=query_block,
            key_block=key_block,
        )
        for n in lengths
    ]
    made[1] = None
    return BlockMask(requests=tuple(made))


def reads(blocks, head, position, key):
    """The rule of a mask, one key at a time."""
    if key > position:
        return False
    if blocks is None or key // blocks.key_block == position // blocks.key_block:
        return True
    row = position // blocks.query_block - blocks.first_query_block
    return bool(blocks.allowed[head, row, key // blocks.key_block])


def reference(q, k, v, positions, slots, mask, scale, window=None, cap=None):
    """Row by row and head by head, over the keys that are read and no others."""
    out, row = torch.empty(q.shape), 0
    group = q.shape[1] // k.shape[1]
    for request, blocks in enumerate(mask.requests):
        for position in positions[request].tolist():
            for head in range(q.shape[1]):
                heads = 1 if blocks is None else blocks.allowed.shape[0]
                own = head * heads // q.shape[1]
                keys = [
                    key
                    for key in range(position + 1)
                    if reads(blocks, own, position, key)
                    and (window is None or key > position - window)
                ]
                at = slots[request][keys]
                logits = k[at, head // group].float() @ q[row, head].float() * scale
                if cap:
                    logits = cap * torch.tanh(logits / cap)
                out[row, head] = logits.softmax(0) @ v[at, head // group].float()
            row += 1
    return out


@pytest.mark.parametrize("kernel", ["cpp", "cpu", "reference"])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 2), (3, 1), (9, 3), (2, 2)])
@pytest.mark.parametrize("per", ["all", "key heads", "query heads"])
@pytest.mark.parametrize(("query_block", "key_block"), [(16, 16), (64, 32), (7, 19)])
def test_a_mask_against_plain_torch(kernel, q_heads, kv_heads, per, query_block, key_block):
    slots, positions, q, k, v = batch(q_heads, kv_heads, 16)
    heads = {"all": 1, "key heads": kv_heads, "query heads": q_heads}[per]
    mask = mask_of(heads, query_block, key_block)
    plan = plan_position_causal(
        positions, slots, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=16, kernel=kernel
    )
    got = position_causal_attention(q, k, v, plan, 0.3, mask=mask)
    want = reference(q, k, v, positions, slots, mask, 0.3)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("kernel", ["cpp", "cpu", "reference"])
@pytest.mark.parametrize(
    ("dtype", "window", "cap"),
    [(torch.float32, 20, None), (torch.float32, None, 5.0), (torch.bfloat16, None, None)],
)
def test_a_mask_beside_window_cap_and_type(kernel, dtype, window, cap):
    slots, positions, q, k, v = batch(4, 2, 32, dtype)
    mask = mask_of(2, 16, 8)
    plan = plan_position_causal(
        positions, slots, num_q_heads=4, num_kv_heads=2, head_dim=32, kernel=kernel
    )
    got = position_causal_attention(q, k, v, plan, 0.2, window, cap, mask=mask)
    want = reference(q, k, v, positions, slots, mask, 0.2, window, cap)
    torch.testing.assert_close(got.float(), want, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_triangle", [False, True])
def test_a_mask_that_allows_all_changes_no_bit(dtype, is_triangle):
    slots, positions, q, k, v = batch(4, 2, 32, dtype)
    mask = mask_of(1, 16, 16, share=2.0)
    if is_triangle:  # nothing behind the own block: causality hides that anyway
        for blocks in mask.requests:
            if blocks is not None:
                blocks.allowed.tril_(-1)
    heads = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    auto = plan_position_causal(positions, slots, **heads).kernel
    # The one of tiles reads no masks.
    plan = plan_position_causal(positions, slots, kernel="cpp" if auto == "amx" else auto, **heads)
    got = position_causal_attention(q, k, v, plan, 0.2, mask=mask)
    assert torch.equal(got, position_causal_attention(q, k, v, plan, 0.2))


def test_masked_keys_are_never_touched():
    """NaN in a block that no row reads stays there."""
    slots, key_block = torch.randperm(64), 8
    k, v = torch.randn(2, 64, 1, 16)
    allowed = torch.ones(1, 8, 8, dtype=torch.bool)
    allowed[..., 3] = False
    k[slots[24:32]] = v[slots[24:32]] = float("nan")
    mask = BlockMask(requests=(RequestBlocks(allowed=allowed, query_block=8, key_block=key_block),))
    plan = plan_position_causal(
        [torch.arange(32, 64)], [slots], num_q_heads=2, num_kv_heads=1, head_dim=16
    )
    got = position_causal_attention(torch.randn(32, 2, 16), k, v, plan, 0.2, mask=mask)
    assert got.isfinite().all()


def test_a_piece_with_its_own_blocks_computes_what_the_whole_prompt_computes():
    slots = [torch.randperm(100)]
    k, v = torch.randn(2, 100, 2, 16)
    q, heads = torch.randn(100, 4, 16), {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    allowed = torch.rand(1, 13, 13) < 0.4
    whole = BlockMask(requests=(RequestBlocks(allowed=allowed, query_block=8, key_block=8),))
    tail = BlockMask(
        requests=(
            RequestBlocks(allowed=allowed[:, 7:], query_block=8, key_block=8, first_query_block=7),
        )
    )
    plan = plan_position_causal([torch.arange(100)], slots, **heads)
    piece = plan_position_causal([torch.arange(60, 100)], slots, **heads)
    got = position_causal_attention(q[60:], k, v, piece, 0.2, mask=tail)
    want = position_causal_attention(q, k, v, plan, 0.2, mask=whole)
    torch.testing.assert_close(got, want[60:], **TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"allowed": torch.ones(3, 2, 2, dtype=torch.bool)}, r"3 heads; give one of \(1, 2, 4\)"),
        ({"allowed": torch.ones(1, 2, 2)}, "allowed is torch.float32"),
        ({"allowed": torch.ones(2, 2, dtype=torch.bool)}, "2 dimensions"),
        ({"allowed": torch.ones(1, 1, 2, dtype=torch.bool)}, "query blocks 0..0 for rows"),
        ({"first_query_block": 1}, "query blocks 1..2 for rows in blocks 0..1"),
        ({"allowed": torch.ones(1, 2, 1, dtype=torch.bool)}, "1 key blocks; rows need 2"),
        ({"key_block": 0}, "both must be at least 1"),
        (None, "has 2 requests; the plan was made for 1"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(change, message):
    good = {
        "allowed": torch.ones(1, 2, 2, dtype=torch.bool),
        "query_block": 8,
        "key_block": 8,
    } | (change or {})
    requests = (RequestBlocks(**good),) if change else (RequestBlocks(**good), None)
    pool = torch.zeros(10, 2, 8)
    plan = plan_position_causal(
        [torch.tensor([1, 9])], [torch.arange(10)], num_q_heads=4, num_kv_heads=2, head_dim=8
    )
    with pytest.raises(ValueError, match=message):
        position_causal_attention(
            torch.zeros(2, 4, 8), pool, pool, plan, 1.0, mask=BlockMask(requests=requests)
        )


# -- methods ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NearConfig:
    block: int = 8
    sink: bool = True
    share: float = 0.5
    title: str = "near"


class NearMethod(AttentionMethod):
    """Own block only, with or without the first one."""

    name = "near"
    config_type = NearConfig
    asked: list = []  # noqa: RUF012

    def prepare(self, plan, requests):
        self.asked.append(requests)
        return requests

    def mask(self, layer, call, state):
        if layer == 1:
            return None
        made = [None] * len(call.plan.slots)
        for request in state:
            blocks = -(-call.plan.slots[request].numel() // self.config.block)
            allowed = torch.zeros(1, blocks, blocks, dtype=torch.bool)
            allowed[..., 0] = self.config.sink
            made[request] = RequestBlocks(
                allowed=allowed, query_block=self.config.block, key_block=self.config.block
            )
        return BlockMask(requests=tuple(made))


@pytest.fixture
def near():
    ATTENTION_METHODS.register("near", NearMethod)
    NearMethod.asked.clear()
    yield
    ATTENTION_METHODS.unregister("near")


@pytest.mark.usefixtures("near")
def test_one_mask_from_several_methods():
    slots, positions, q, k, v = batch(4, 2, 16)
    plan = plan_position_causal(positions, slots, num_q_heads=4, num_kv_heads=2, head_dim=16)
    one, same, other = map(create_attention_method, ("near", "near:block=8", "near:block=4"))
    methods = MethodsOfPass(plan, [one, None, other, same])
    assert NearMethod.asked == [(0, 3), (2,)]
    call = AttentionCall(q_RNH=q, k_pool=k, v_pool=v, plan=plan, scale=0.2)
    mask = methods.mask(0, call)
    assert [None if b is None else b.key_block for b in mask.requests] == [8, None, 4, 8]
    assert methods.mask(1, call) is None
    dense = MethodsOfPass(plan, [create_attention_method("dense")] * 4)
    assert dense.mask(0, call) is None
    with pytest.raises(ValueError, match="1 methods for 4 requests"):
        MethodsOfPass(plan, [one])


@pytest.mark.usefixtures("near")
def test_options_behind_a_name():
    method = create_attention_method("near:block=4+sink=false+share=1+title=a b")
    assert method.config == NearConfig(block=4, sink=False, share=1.0, title="a b")
    assert create_attention_method("near").config == NearConfig()


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("far", "'far' is not known; choose one of dense, .*near"),
        ("", "'' is not known"),
        ("near:4", "'4' is not OPTION=VALUE"),
        ("near:block=4+block=5", "each once"),
        ("near:size=4", "no option 'size'; allowed: block, sink, share, title"),
        ("dense:block=4", "no option 'block'; allowed: none"),
        ("near:block=four", "option block is 'four'; expected int"),
        ("near:sink=1", "option sink is '1'; expected true or false"),
        ("near:share=", "option share is ''; expected float"),
    ],
)
def test_a_bad_method_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        create_attention_method(text)


@pytest.mark.parametrize(
    "text",
    [
        "power:block=8",
        "block_topk:block=8",
        "xattention:block=8",
        "vertical_slash:block=8",
        "sale:block_q=8+block_k=8+segment=8",
    ],
)
def test_small_blocks_of_a_long_prompt_are_refused_before_they_take_the_memory(text):
    """A client names the options: what they cost must be its request's speed, never the process."""
    rows, slots = torch.tensor([0, 199_999]), torch.arange(200_000) % 1_000
    plan = plan_position_causal([rows], [slots], num_q_heads=8, num_kv_heads=1, head_dim=16)
    pool = torch.zeros(1_000, 1, 16)
    call = AttentionCall(
        q_RNH=torch.zeros(2, 8, 16), k_pool=pool, v_pool=pool, plan=plan, scale=0.25
    )
    method = create_attention_method(text)
    with pytest.raises(ValueError, match="ask for larger blocks"):
        method.mask(0, call, method.prepare(plan, (0,)))

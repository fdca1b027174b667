"""What a method says of prefixes: rows in front of a multiple of its unit read the same keys whatever follows."""

from __future__ import annotations

import pytest
import torch

from rag_kernels import (
    ATTENTION_METHODS,
    AttentionCall,
    create_attention_method,
    plan_position_causal,
)

TOKENS, HEADS, KV_HEADS, DIM = 320, 4, 2, 16
SALE = "block_q=16+block_k=8+local_window=32+segment=32+min_tokens=64+thresholds=0.02"
UNITS = {
    "power:block=8+window=2": 1,
    "streaming:block=8+window=3": 1,
    "strided:block=8+window=2+stride=4": 1,
    "dilated:block=8+window=6": 1,
    "longnet:block=8": 1,
    "block_topk:block=16+blocks=4": 16,
    "block_topk:block=16+share=0.3": 16,
    "xattention:block=16+stride=4+threshold=0.6": 16,
    "xattention:block=16+stride=4+blocks=4": 16,
    f"sale:{SALE}": 16,
    f"sale:{SALE}+granularity=thread_group": 16,
    "vertical_slash:block=16+vertical=3+slash=2+last=4": 0,
    "dense": 0,
}


def kept(method, start, end):
    """Keys that each row of a piece reads, bool ``[HEADS, end - start, TOKENS]``."""
    torch.manual_seed(5)
    keys = torch.randn(TOKENS, KV_HEADS, DIM)
    keys += torch.randn(TOKENS, 1, DIM).cumsum(0) * 0.3
    q = torch.randn(TOKENS, HEADS, DIM) * 2 + keys.repeat_interleave(2, 1) * 0.5
    rows = torch.arange(start, end)
    plan = plan_position_causal(
        [rows], [torch.arange(end)], num_q_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM
    )
    call = AttentionCall(q_RNH=q[rows], k_pool=keys, v_pool=keys, plan=plan, scale=DIM**-0.5)
    mask = method.mask(0, call, method.prepare(plan, (0,)))
    causal = torch.arange(TOKENS)[None] <= rows[:, None]
    found = torch.zeros(HEADS, len(rows), TOKENS, dtype=torch.bool)
    if mask is None or mask.requests[0] is None:
        return found | causal
    blocks = mask.requests[0]
    at = torch.arange(TOKENS) // blocks.key_block
    allowed = blocks.rows(rows)
    wide = torch.nn.functional.pad(allowed, (0, int(at[-1]) + 1 - allowed.shape[-1]))
    return (found | wide[..., at]) & causal


def test_every_method_is_asked():
    assert {text.partition(":")[0] for text in UNITS} == set(ATTENTION_METHODS.names())


@pytest.mark.parametrize("text", UNITS)
def test_the_unit_is_the_one_that_is_known(text):
    assert create_attention_method(text).prefix_unit == UNITS[text]


@pytest.mark.parametrize("text", [text for text, unit in UNITS.items() if unit])
def test_rows_of_a_prefix_read_the_same_keys_whatever_follows(text):
    method = create_attention_method(text)
    whole = kept(method, 0, TOKENS)
    assert not whole[:, -1].all(), "the method leaves nothing out of this prompt"
    cuts = [cut for cut in (112, 176, 208, 291) if not cut % method.prefix_unit]
    assert len(cuts) >= 3
    for cut in cuts:
        assert torch.equal(kept(method, 0, cut), whole[:, :cut])
        assert torch.equal(kept(method, cut, TOKENS), whole[:, cut:])


def test_a_method_that_looks_at_the_last_rows_has_no_prefix_of_its_own():
    method = create_attention_method("vertical_slash:block=16+vertical=3+slash=2+last=4")
    whole = kept(method, 0, TOKENS)
    assert any(not torch.equal(kept(method, 0, cut), whole[:, :cut]) for cut in (112, 176, 208))


def test_a_cut_within_a_unit_changes_what_rows_read():
    """Why a unit is no single token where rows choose together."""
    method = create_attention_method(f"sale:{SALE}")
    whole = kept(method, 0, TOKENS)
    assert any(
        not torch.equal(kept(method, 0, cut), whole[:, :cut])
        or not torch.equal(kept(method, cut, TOKENS), whole[:, cut:])
        for cut in (121, 197, 203, 213, 299)
    )


@pytest.mark.parametrize("text", [text for text, unit in UNITS.items() if unit])
def test_a_prompt_that_ends_within_a_unit_reads_the_same_keys_behind_a_prefix(text):
    method = create_attention_method(text)
    for end in (299, 307, 318):
        whole = kept(method, 0, end)
        for cut in (208, end // 16 * 16):
            assert torch.equal(kept(method, cut, end), whole[:, cut:])


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "torch"])
def test_rows_of_a_short_block_choose_alone_as_beside_longer_ones(is_native, monkeypatch):
    """Queries are smoothed by the mean of their block's own rows: where it is off, 4 bits hold other numbers."""
    if not is_native:
        monkeypatch.setattr("rag_kernels.native.estimate.load_library", lambda: None)
    for tau in torch.logspace(-3, -0.5, 24).tolist():
        method = create_attention_method(f"sale:{SALE.replace('0.02', str(tau))}")
        for end in (305, 307, 311):
            assert torch.equal(kept(method, 304, end), kept(method, 288, end)[:, 16:])

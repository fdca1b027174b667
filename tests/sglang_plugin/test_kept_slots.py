"""Slots of a decode batch whose tokens read chosen positions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rag_kernels import create_attention_method
from rag_kernels.attention.torch_sdpa import packed_decode_attention
from rag_pipeline.sglang_plugin.cpu.decode_reads import DECODE_READS_KEY, DecodeReads, find_reads
from rag_pipeline.sglang_plugin.cpu.slot_plan import plan_kept_slots
from rag_pipeline.sglang_plugin.fusion.forward.sparse_decode import kept_positions


def batch(lengths):
    """A decode batch whose requests stand in rows 3, 2, 1 .. of the table."""
    rows = torch.arange(len(lengths), 0, -1)
    return SimpleNamespace(req_pool_indices=rows, seq_lens=torch.tensor(lengths))


@pytest.mark.parametrize("padding", [1.0, 1.25, 4.0])
def test_each_token_gets_the_slots_of_its_positions(padding):
    table = torch.randperm(4 * 50).view(4, 50).int()
    kept = (torch.tensor([0, 1, 40]), None, torch.tensor([2, 19]))
    plan = plan_kept_slots(batch([41, 7, 20]), table, kept, padding=padding)
    assert plan.keys_read == 3 + 7 + 2
    found = {}
    for bucket in plan.buckets:
        assert bucket.slots.shape == (len(bucket.lengths), bucket.lengths[0])
        for row, slots, length in zip(
            bucket.rows.tolist(), bucket.slots, bucket.lengths, strict=True
        ):
            found[row] = slots[:length].tolist()
            assert set(slots[length:].tolist()) <= {int(slots[0])}  # padding is written memory
    assert found == {
        0: table[3, [0, 1, 40]].tolist(),
        1: table[2, :7].tolist(),
        2: table[1, [2, 19]].tolist(),
    }


@pytest.mark.parametrize(("length", "most"), [(8192, 0.25), (16384, 0.15), (131072, 0.024)])
def test_a_decoded_token_reads_a_small_share_of_a_long_prompt(length, most):
    method = create_attention_method("power")
    table = torch.arange(2 * length).view(2, length)
    kept = kept_positions(method, length - 1)
    plan = plan_kept_slots(batch([length]), table, (kept,), padding=1.0)
    assert plan.keys_read <= most * length
    window = create_attention_method("streaming")
    assert plan.keys_read <= 1.2 * kept_positions(window, length - 1).numel()


def test_positions_end_with_the_tokens_own():
    method = create_attention_method("power:block=8+window=2+sink=1")
    assert kept_positions(method, 42).tolist() == [*range(16), *range(24, 43)]
    assert kept_positions(method, 0).tolist() == [0]


def test_reads_by_layer():
    kept = torch.tensor([1, 2])
    reads = DecodeReads(
        positions=(kept, None, kept), dense_layers=(frozenset({1}), frozenset(), frozenset())
    )
    assert [p is None for p in reads.of_layer(0)] == [False, True, False]
    assert [p is None for p in reads.of_layer(1)] == [True, True, False]
    assert find_reads(SimpleNamespace(model_specific_states={DECODE_READS_KEY: reads})) is reads
    assert find_reads(SimpleNamespace(model_specific_states={DECODE_READS_KEY: 1})) is None
    assert find_reads(SimpleNamespace(model_specific_states=None)) is None


@pytest.mark.parametrize("padding", [1.0, 2.0])
def test_padded_or_alone_a_token_gets_the_attention_of_its_positions(padding):
    """What the backend makes of a plan, against softmax over the kept keys alone; unused slots hold NaN."""
    table = torch.randperm(3 * 64).view(3, 64)
    kept = (torch.tensor([0, 5, 6, 60]), torch.arange(30), torch.tensor([8, 9, 20]))
    keys, values = torch.full((2, 192, 2, 16), float("nan"))
    used = torch.cat(
        [table[row, positions] for row, positions in zip((2, 1, 0), kept, strict=True)]
    )
    keys[used], values[used] = torch.randn(2, used.numel(), 2, 16)
    requests = SimpleNamespace(
        req_pool_indices=torch.tensor([2, 1, 0]), seq_lens=torch.tensor([61, 30, 21])
    )
    plan = plan_kept_slots(requests, table, kept, padding=padding)
    q = torch.randn(3, 4, 16)
    for bucket in plan.buckets:
        at = torch.arange(bucket.lengths[0])[None] >= torch.tensor(bucket.lengths)[:, None]
        got = packed_decode_attention(
            q[bucket.rows],
            keys[bucket.slots],
            values[bucket.slots],
            scale=0.3,
            mask_BN=torch.zeros(at.shape).masked_fill_(at, float("-inf")),
        )
        for row, own in zip(bucket.rows.tolist(), got, strict=True):
            slots = table[2 - row, kept[row]]
            k, v = (t[slots].repeat_interleave(2, dim=1) for t in (keys, values))
            weights = torch.einsum("hd,nhd->hn", q[row] * 0.3, k).softmax(-1)
            want = torch.einsum("hn,nhd->hd", weights, v)
            torch.testing.assert_close(own, want, rtol=1e-5, atol=1e-6)

"""Records: shapes that fit, nothing with a gradient, and damage that shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chunk_cache import ChunkCacheError, ChunkKey, ChunkKV, LayerKV, layout_of_pool
from rag_kernels import RotarySpec, plan_span_load, rerotate_keys

Make = Callable[..., ChunkKV]


def test_a_layer_is_a_contiguous_view_of_the_shared_tensors(make_record: Make):
    record = make_record(range(10), layers=3, heads=2, dim=4)
    layer = record.layer(1, 2, 7)
    assert layer.k.shape == (5, 2, 4)
    assert layer.k.is_contiguous()
    assert layer.v.is_contiguous()
    assert layer.k.data_ptr() == record.k[1, 2].data_ptr()
    assert torch.equal(record.layer(2).v, record.v[2])


def test_what_is_handed_out_carries_no_gradient(make_record: Make):
    record = make_record(range(4), dtype=torch.float32)
    leaf = torch.ones_like(record.k, requires_grad=True)
    again = dataclasses.replace(record, k=leaf * 2, v=leaf)
    assert not again.k.requires_grad
    assert not again.layer(0).v.requires_grad


def test_keys_and_values_may_differ_in_head_size_only(make_record: Make):
    record = make_record(range(4))
    dataclasses.replace(record, v=record.v[..., :3].contiguous())
    with pytest.raises(ChunkCacheError, match="head size"):
        dataclasses.replace(record, v=record.v[:, :, :1].contiguous())
    with pytest.raises(ChunkCacheError, match="head size"):
        dataclasses.replace(record, v=record.v.float())


def test_tensors_that_do_not_fit_the_ids_are_refused(make_record: Make):
    record = make_record(range(4))
    for k in (record.k[:, :3].contiguous(), record.k[0], record.k.transpose(0, 2), record.k.int()):
        with pytest.raises(ChunkCacheError):
            dataclasses.replace(record, k=k)
    with pytest.raises(ChunkCacheError, match="base_position"):
        dataclasses.replace(record, base_position=-1)


def test_a_key_of_other_ids_or_another_namespace_is_refused(make_record: Make):
    record = make_record(range(4))
    with pytest.raises(ChunkCacheError, match="does not belong"):
        dataclasses.replace(record, key=ChunkKey.of(record.key.namespace, [9, 9, 9, 9]))
    with pytest.raises(ChunkCacheError, match="does not belong"):
        dataclasses.replace(record, key=dataclasses.replace(record.key, namespace="0" * 32))


def test_a_layout_that_nobody_brings_is_refused(make_record: Make):
    with pytest.raises(ChunkCacheError, match="'sharded' is not implemented"):
        dataclasses.replace(make_record(range(4)), layout="sharded")


def test_a_latent_is_one_for_all_heads(make_record: Make):
    record = make_record(range(4))
    with pytest.raises(ChunkCacheError, match="2 heads: a latent is one for all of them"):
        dataclasses.replace(record, layout="latent")
    k, v = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 32)
    one = dataclasses.replace(record, layout="latent", k=k, v=v)
    assert (one.k.shape[-1], one.v.shape[-1]) == (8, 32)


def latent_pool(**other: Any) -> Any:
    class MLATokenToKVPool(SimpleNamespace):
        def get_key_buffer(self, layer: int) -> torch.Tensor:
            return self.rows[layer]

        def get_value_buffer(self, layer: int) -> torch.Tensor:
            return self.rows[layer][..., : self.kv_lora_rank]

    fields = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "kv_cache_dim": 40, "use_dsa": False}
    rows = torch.randn(3, 20, 1, 40)
    return MLATokenToKVPool(rows=rows, **(fields | other))


def test_latents_are_copied_and_only_position_parts_are_turned():
    pool, slots = latent_pool(), torch.tensor([3, 9, 4, 17])
    layout = layout_of_pool(pool)
    assert layout.name == "latent"
    k, v = layout.gather(pool, 3, slots)
    assert torch.equal(k, pool.rows[:, slots][..., 32:])
    assert torch.equal(v, pool.rows[:, slots][..., :32])
    assert torch.equal(layout.keys(k[1], v[1]), pool.rows[1, slots])
    spec = RotarySpec.from_inv_freq(10000.0 ** (-torch.arange(0, 8, 2) / 8), 8, False)
    to, before = torch.tensor([0, 1, 2, 5]), pool.rows.clone()
    plan = plan_span_load([to], [7], spec)
    layout.load_inplace(*layout.pool_layer(pool, 1), [LayerKV(k[1], v[1])], plan)
    assert torch.equal(pool.rows[1, to][..., :32], v[1])
    assert torch.equal(pool.rows[1, to][..., 32:], rerotate_keys(k[1], 7, spec))
    others = torch.tensor([slot for slot in range(20) if slot not in to.tolist()])
    assert torch.equal(pool.rows[1, others], before[1, others])
    assert torch.equal(pool.rows[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("other", [{"use_dsa": True}, {"kv_cache_dim": 656}])
def test_sparse_and_packed_latents_are_refused(other: dict[str, Any]):
    with pytest.raises(ChunkCacheError, match="sparse or packed latents are refused"):
        layout_of_pool(latent_pool(**other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_changed_element_fails_the_checksum(make_record: Make, dtype: torch.dtype):
    record = make_record(range(19), dtype=dtype).sealed()
    assert record.verify()
    for tensor in (record.k, record.v):
        before = tensor[1, 18, 1, 7].clone()
        tensor[1, 18, 1, 7] += 1
        assert not record.verify()
        tensor[1, 18, 1, 7] = before
        assert record.verify()


def test_the_checksum_covers_position_and_shape_too(make_record: Make):
    record = make_record(range(8)).sealed()
    moved = dataclasses.replace(record, base_position=record.base_position + 1)
    assert not moved.verify()
    reshaped = dataclasses.replace(
        record, k=record.k.reshape(2, 8, 1, 16), v=record.v.reshape(2, 8, 1, 16)
    )
    assert not reshaped.verify()


def test_verifying_without_a_checksum_says_what_to_do(make_record: Make):
    with pytest.raises(ChunkCacheError, match="checksums=True"):
        make_record(range(4)).verify()


def test_bytes_are_those_of_the_tensors_and_a_little(make_record: Make):
    record = make_record(range(100), layers=2, heads=2, dim=8)
    tensors = 2 * (2 * 100 * 2 * 8) * 2
    assert tensors + 400 < record.num_bytes < tensors + 400 + 2048

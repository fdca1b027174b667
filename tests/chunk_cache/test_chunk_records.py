"""Records: shapes that fit, nothing with a gradient, and damage that shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from chunk_cache import ChunkCacheError, ChunkKey, ChunkKV

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


def test_latents_are_refused_until_they_are_implemented(make_record: Make):
    with pytest.raises(ChunkCacheError, match="'latent' is not implemented"):
        dataclasses.replace(make_record(range(4)), layout="latent")


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

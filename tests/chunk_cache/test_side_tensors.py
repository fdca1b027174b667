"""Side tensors of a record: they go where the record goes, damage in them is found, and most records have none."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chunk_cache import ChunkCacheError, ChunkKey, ChunkKV, KVContext, MemoryStore, StoreFolder
from chunk_cache.side_tensors import SEEN_IDS
from chunk_cache.store.builds import Build
from chunk_cache.tiers.encoding import decode_record, encode_record, read_header

Make = Callable[..., ChunkKV]

GOLDEN_BYTES = "93597b1e882454ae8f8a85963b03b5a69968807e3d0231203cc22a2b4214257c"
GOLDEN_SEAL = "2dbac0e164f12a888093f849351102f0"
"""As they were before a record could have side tensors."""


def with_side(record: ChunkKV, **more: torch.Tensor) -> ChunkKV:
    shape = (record.num_layers, record.k.shape[2], record.num_tokens)
    side = {
        "positions": torch.arange(int(np.prod(shape)), dtype=torch.int32).view(shape),
        "scores": torch.rand(shape).half(),
        SEEN_IDS: torch.tensor([9, 8, 7, *record.token_ids.tolist()], dtype=torch.int32),
    }
    return dataclasses.replace(record, side=side | more)


def is_same_side(one: Any, other: Any) -> bool:
    return dict(one).keys() == dict(other).keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def whole(record: ChunkKV, codec: str = "plain") -> bytes:
    return b"".join(encode_record(record, codec).parts)


def test_a_record_without_them_is_written_and_sealed_as_before_there_were_any(
    context: KVContext,
) -> None:
    ids = np.arange(4, dtype=np.int32)
    kv = torch.arange(2 * 4 * 2 * 8, dtype=torch.float32).reshape(2, 4, 2, 8)
    record = ChunkKV(key=ChunkKey.of(context, ids), token_ids=ids, base_position=5, k=kv, v=-kv)
    assert hashlib.sha256(whole(record)).hexdigest() == GOLDEN_BYTES
    assert record.compute_checksum() == GOLDEN_SEAL
    assert record.num_bytes == 2064
    assert record.seen_ids is record.token_ids


def test_they_come_back_with_the_record_and_with_its_header(make_record: Make) -> None:
    record = with_side(make_record(range(19)))
    data = whole(record)
    header = read_header(record.key, data)
    assert header is not None
    assert is_same_side(header.side, record.side)
    back = decode_record(record.key, data)
    assert back is not None
    assert is_same_side(back.side, record.side)
    assert back.seen_ids.tolist() == [9, 8, 7, *range(19)]
    assert back.num_bytes == record.num_bytes > make_record(range(19)).num_bytes + 19 * 4 * 6


def test_no_bit_of_them_may_change_unseen(make_record: Make) -> None:
    record = with_side(make_record(range(3), layers=1, heads=1, dim=4))
    data = whole(record)
    start = data.index(b'"side":')
    end = data.index(b"}", start)
    for at in range(start, end):
        damaged = bytearray(data)
        damaged[at] ^= 1
        assert decode_record(record.key, damaged) is None


def test_a_seal_covers_them(make_record: Make) -> None:
    record = with_side(make_record(range(5))).sealed()
    assert record.verify()
    record.side["scores"][0, 0, 0] += 1
    assert not record.verify()


@pytest.mark.parametrize("codec", ["fp8", "kivi4"])
def test_a_record_that_has_some_is_written_lossless_whatever_the_codec(
    make_record: Make, codec: str
) -> None:
    record = with_side(make_record(range(40)))
    back = decode_record(record.key, whole(record, codec))
    assert back is not None
    assert torch.equal(back.k, record.k)
    plain = decode_record(record.key, whole(make_record(range(40)), codec))
    assert plain is not None
    assert not plain.is_lossless


def test_memory_and_folder_keep_them(
    make_record: Make, make_store: Callable[..., MemoryStore], tmp_path: Path
) -> None:
    record = with_side(make_record(range(19)))
    store = make_store(1 << 20)
    build = store.begin_build(record.key, record.token_ids)
    assert isinstance(build, Build)
    assert build.commit(record)
    with store.borrow(record.key) as found:
        assert found is not None
        assert is_same_side(found.side, record.side)
    folder = StoreFolder(tmp_path / "store", create=True)
    assert folder.put(record)
    reader = folder.open(record.key, record.token_ids)
    assert reader is not None
    assert is_same_side(reader.side, record.side)
    read = folder.read(record.key)
    assert read is not None
    assert is_same_side(read.side, record.side)
    seen = folder.seen_ids(record.key)
    assert seen is not None
    assert seen.tolist() == [9, 8, 7, *range(19)]
    ids = folder.token_ids(record.key)
    assert ids is not None
    assert ids.tolist() == list(range(19))


@pytest.mark.parametrize(
    ("side", "words"),
    [
        ({"a b": torch.zeros(2)}, "an identifier"),
        ({"a": torch.zeros(2, dtype=torch.bfloat16)}, "give int32"),
        ({"a": torch.zeros(2, 3).T}, "not contiguous"),
    ],
)
def test_what_a_header_cannot_hold_is_refused(
    make_record: Make, side: dict[str, torch.Tensor], words: str
) -> None:
    with pytest.raises(ChunkCacheError, match=words):
        dataclasses.replace(make_record(range(3)), side=side)

"""The store folder: what goes out comes back bit-equal, and damage of any kind is a counted miss."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunk_cache import (
    ChunkCacheError,
    ChunkKey,
    ChunkKV,
    KVContext,
    MemoryStore,
    StoreFolder,
    Tier,
    export_store,
    load_store,
    tenant_mark,
)

Make = Callable[..., ChunkKV]
MakeStore = Callable[..., MemoryStore]


def files_of(folder: StoreFolder) -> list[Path]:
    return sorted(folder.path.rglob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_record_comes_back_bit_equal(tmp_path: Path, make_record: Make, dtype: torch.dtype):
    folder = StoreFolder(tmp_path / "kv", create=True)
    assert isinstance(folder, Tier)
    record = make_record(range(19), dtype=dtype)
    assert folder.get(record.key, record.token_ids) is None
    assert folder.put(record)
    back = StoreFolder(tmp_path / "kv").get(record.key, record.token_ids)
    assert back is not None
    assert torch.equal(back.k, record.k)
    assert torch.equal(back.v, record.v)
    assert back.k.dtype == dtype
    assert (back.key, back.base_position) == (record.key, record.base_position)
    assert list(folder.keys()) == [record.key]
    assert folder.remove(record.key)
    assert not folder.remove(record.key)
    assert folder.corrupt_files == 0


def test_a_store_goes_out_and_comes_back(
    tmp_path: Path, make_store: MakeStore, make_record: Make, context: KVContext
):
    store = make_store()
    other = dataclasses.replace(context, tenant="secret salt")
    records = [make_record(range(n, n + 70)) for n in range(0, 500, 100)]
    records.append(make_record(range(70), in_context=other))
    for record in records:
        store.put(record)
    folder = StoreFolder(tmp_path / "kv", create=True)
    seen: list[int] = []
    assert export_store(folder, store, contexts=[context, other], progress=seen.append) == 6
    assert seen == [1, 2, 3, 4, 5, 6]
    assert export_store(folder, store) == 0
    described = folder.describe(context.namespace)
    assert described is not None
    assert described["model_fingerprint"] == "tiny-1"
    everything = b"".join(p.read_bytes() for p in (tmp_path / "kv").rglob("*.json"))
    assert b"secret salt" not in everything

    mine = make_store()
    report = load_store(folder, mine, namespaces={context.namespace}, pin=True)
    assert report.to_json() == {
        "loaded": 5,
        "already_there": 0,
        "no_room": 0,
        "corrupt": 0,
        "foreign": 1,
    }
    assert set(mine.keys()) == {record.key for record in records[:5]}
    assert mine.stats().pinned_bytes_now == sum(record.num_bytes for record in records[:5])
    assert [m.key for m in mine.match(range(300, 370), context)] == [records[3].key]
    assert load_store(folder, mine).to_json() == {
        "loaded": 1,
        "already_there": 5,
        "no_room": 0,
        "corrupt": 0,
        "foreign": 0,
    }
    # What was a tenant's share before is its share again.
    share = records[-1].num_bytes
    assert mine._ledger.bytes_of == {"": 5 * share, tenant_mark("secret salt"): share}


def test_an_import_evicts_nothing(tmp_path: Path, make_store: MakeStore, make_record: Make):
    records = [make_record(range(n, n + 70)) for n in range(0, 500, 100)]
    folder = StoreFolder(tmp_path / "kv", create=True)
    for record in records[1:]:
        folder.put(record)
    store = make_store(3 * records[0].num_bytes)
    store.put(records[0])
    report = load_store(folder, store)
    assert (report.loaded + 1, report.no_room) == (len(store.keys()), 4 - report.loaded)
    assert report.no_room > 0
    assert records[0].key in store.keys()  # noqa: SIM118 - a list, not a mapping


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_to_a_file_is_a_miss(tmp_path: Path, make_record: Make, data: st.DataObject):
    folder = StoreFolder(tmp_path / "kv", create=True)
    record = make_record(range(19))
    folder.put(record)
    (file,) = files_of(folder)
    good = file.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "empty"]))
    at = data.draw(st.integers(0, len(good) - 1))
    bad = {
        "flip": good[:at]
        + bytes([good[at] ^ (1 << data.draw(st.integers(0, 7)))])
        + good[at + 1 :],
        "cut": good[:at],
        "grow": good + b"\0",
        "empty": b"",
    }[kind]
    file.write_bytes(bad)
    assert (
        folder.token_ids(record.key) is None or at >= len(good) - record.k.nbytes - record.v.nbytes
    )
    assert folder.verify() == [record.key]
    assert folder.corrupt_files == 0
    assert folder.get(record.key, record.token_ids) is None
    assert folder.corrupt_files == 1
    assert files_of(folder) == []


def test_a_damaged_file_is_counted_at_import(
    tmp_path: Path, make_store: MakeStore, make_record: Make
):
    folder = StoreFolder(tmp_path / "kv", create=True)
    records = [make_record(range(n, n + 70)) for n in (0, 100)]
    for record in records:
        folder.put(record)
    file = next(p for p in files_of(folder) if records[0].key.digest in p.name)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store = make_store()
    assert load_store(folder, store).to_json() == {
        "loaded": 1,
        "already_there": 0,
        "no_room": 0,
        "corrupt": 1,
        "foreign": 0,
    }
    assert store.keys() == [records[1].key]
    assert store.stats().corrupt == 1


def test_a_file_under_another_chunks_name_is_a_miss(tmp_path: Path, make_record: Make):
    folder = StoreFolder(tmp_path / "kv", create=True)
    one, two = make_record(range(19)), make_record(range(5, 24))
    folder.put(one)
    folder.put(two)
    by_digest = {p.name[:64]: p for p in files_of(folder)}
    by_digest[one.key.digest].write_bytes(by_digest[two.key.digest].read_bytes())
    assert folder.verify() == [one.key]
    assert folder.get(one.key, one.token_ids) is None
    assert set(folder.keys()) == {two.key}


def test_other_tokens_under_a_key_are_a_miss(tmp_path: Path, make_record: Make):
    folder = StoreFolder(tmp_path / "kv", create=True)
    record = make_record(range(19))
    folder.put(record)
    assert folder.get(record.key, make_record(range(1, 20)).token_ids) is None
    absent = ChunkKey.of(record.key.namespace, [1])
    assert folder.get(absent, record.token_ids[:1]) is None


def test_a_write_that_breaks_off_leaves_nothing_behind(
    tmp_path: Path, make_record: Make, monkeypatch: pytest.MonkeyPatch
):
    folder = StoreFolder(tmp_path / "kv", create=True)
    record = make_record(range(19))

    def refuse(self: Path, target: Path) -> Path:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        folder.put(record)
    monkeypatch.undo()
    assert {p.name for p in folder.path.rglob("*") if p.is_file()} == {"store.json", "usage"}


def test_folders_that_are_no_stores_are_refused_in_one_line(tmp_path: Path):
    with pytest.raises(ChunkCacheError, match="not a chunk store"):
        StoreFolder(tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    with pytest.raises(ChunkCacheError, match="neither empty nor a chunk store"):
        StoreFolder(tmp_path / "notes", create=True)
    StoreFolder(tmp_path / "kv", create=True)
    StoreFolder(tmp_path / "kv", create=True)
    manifest = tmp_path / "kv" / "store.json"
    manifest.write_text(json.dumps({"format": "rag-chunk-store", "version": 99}))
    with pytest.raises(ChunkCacheError, match="version 99"):
        StoreFolder(tmp_path / "kv")
    manifest.write_text("{")
    with pytest.raises(ChunkCacheError, match="cannot be read"):
        StoreFolder(tmp_path / "kv")

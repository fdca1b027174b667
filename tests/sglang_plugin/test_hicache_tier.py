"""SGLang's own storage backends as tiers: ``file``, and Mooncake over TCP where its library loads."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from valkey_server import free_port

from chunk_cache import ChunkCacheError, ChunkKey, ChunkKV, KVContext
from chunk_cache.tiers.guard import GuardedTier
from chunk_cache.tiers.remote.connect import connect_remote

CONTEXT = KVContext(
    model_fingerprint="tiny-1",
    dtype="bfloat16",
    kv_dtype="bfloat16",
    rope='{"base":10000.0}',
    prefix_digest="none",
)
BUDGET = 1 << 30


def record_of(first: int, tokens: int = 30, *, layers: int = 5) -> ChunkKV:
    ids = np.arange(first, first + tokens, dtype=np.int32)
    generator = torch.Generator().manual_seed(first)
    shape = (layers, tokens, 3, 16)
    return ChunkKV(
        key=ChunkKey.of(CONTEXT, ids),
        token_ids=ids,
        base_position=7,
        k=torch.randn(shape, generator=generator).to(torch.bfloat16),
        v=torch.randn(shape, generator=generator).to(torch.bfloat16),
    )


def same(found: ChunkKV | None, record: ChunkKV) -> bool:
    return found is not None and found.k.equal(record.k) and found.v.equal(record.v)


def on_disk(folder: Path, options: str = "?page_kib=2") -> GuardedTier:
    return connect_remote(f"hicache+file://{folder}{options}", byte_budget=BUDGET, model="m")


def test_records_in_files_are_read_by_another_server(tmp_path: Path) -> None:
    writer, reader, record = on_disk(tmp_path / "kv"), on_disk(tmp_path / "kv"), record_of(5)
    assert reader.open(record.key, record.token_ids) is None
    assert writer.put(record, context=CONTEXT, tenant="somebody")
    opened: Any = reader.open(record.key, record.token_ids)
    assert (opened.layout, opened.num_layers, opened.base_position) == ("heads", 5, 7)
    for index in range(5):
        layer, wanted = opened.layer(index, 4, 20), record.layer(index, 4, 20)
        assert layer.k.equal(wanted.k)
        assert layer.v.equal(wanted.v)
    assert same(reader.read(record.key), record)
    assert reader.open(record.key, record.token_ids + 1) is None
    assert list(reader.keys()) == reader.keys_by_use() == [record.key]
    assert reader.tenant_of(CONTEXT.namespace) == "somebody"
    assert reader.namespaces({"dtype": "bfloat16"}) == {CONTEXT.namespace}
    assert (tmp_path / "kv").stat().st_mode & 0o077 == 0, "for its owner alone"


@pytest.mark.parametrize("page_kib", [0.5, 1, 3, 256])
@pytest.mark.parametrize("tokens", [1, 19, 99])
def test_layers_lie_on_pages_of_any_size(tmp_path: Path, page_kib: float, tokens: int) -> None:
    tier, record = on_disk(tmp_path, f"?page_kib={page_kib}"), record_of(5, tokens, layers=7)
    assert tier.put(record)
    assert same(tier.read(record.key), record)


def test_an_erased_record_is_gone_and_its_pages_too(tmp_path: Path) -> None:
    tier, record, kept = on_disk(tmp_path), record_of(5), record_of(100)
    tier.put(record)
    mine = set(tmp_path.glob("*.bin"))
    tier.put(kept)
    assert mine
    assert tier.remove(record.key)
    tier.sync()
    assert not tier.remove(record.key)
    assert not any(page.exists() for page in mine)
    other = on_disk(tmp_path)
    assert other.open(record.key, record.token_ids) is None
    assert list(other.keys()) == [kept.key]
    assert same(other.read(kept.key), kept)


def test_an_erased_record_does_not_come_back_from_a_backend_that_cannot_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rag_pipeline.sglang_plugin.hicache import backend

    monkeypatch.delitem(backend._DELETE, "file")
    tier, record = on_disk(tmp_path), record_of(5)
    tier.put(record)
    pages = set(tmp_path.glob("*.bin"))
    assert tier.remove(record.key)
    assert pages == set(tmp_path.glob("*.bin")), "the backend still has them"
    assert on_disk(tmp_path).open(record.key, record.token_ids) is None
    assert list(tier.keys()) == []
    assert tier.put(record)
    assert len(set(tmp_path.glob("*.bin"))) == 2 * len(pages), "written anew, under other names"
    assert same(tier.read(record.key), record)


@pytest.mark.parametrize("harm", ["flip", "cut", "unlink"])
def test_a_damaged_page_is_a_miss_and_is_written_anew(tmp_path: Path, harm: str) -> None:
    tier, record = on_disk(tmp_path), record_of(5)
    tier.put(record)
    page = sorted(tmp_path.glob("*-3_*.bin"))[0]
    if harm == "flip":
        data = bytearray(page.read_bytes())
        data[100] ^= 1
        page.write_bytes(data)
    elif harm == "cut":
        os.truncate(page, 100)
    else:
        page.unlink()
    reader = tier.open(record.key, record.token_ids)
    assert reader is not None

    def read_all() -> None:
        for index in range(5):
            reader.layer(index)

    with pytest.raises(ChunkCacheError, match=r"is damaged|went while"):
        read_all()
    assert tier.stats()["state"] == "closed"
    until = time.monotonic() + 10
    while tier.contains(record.key):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert tier.put(record)
    assert same(tier.read(record.key), record)


def test_servers_with_other_pages_leave_each_others_records_alone(tmp_path: Path) -> None:
    small, large, record = on_disk(tmp_path), on_disk(tmp_path, "?page_kib=4"), record_of(5)
    small.put(record)
    assert large.open(record.key, record.token_ids) is None
    assert same(small.read(record.key), record)


def test_a_damaged_header_is_a_miss(tmp_path: Path) -> None:
    tier, record = on_disk(tmp_path), record_of(5)
    tier.put(record)
    (file,) = (tmp_path / "catalog").rglob("*.header")
    file.write_bytes(file.read_bytes()[:-60])
    assert tier.open(record.key, record.token_ids) is None
    assert tier.put(record)
    assert same(tier.read(record.key), record)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hicache+floppy://", "has no storage backend 'floppy'; choose one of .*file.*mooncake"),
        ("hicache+file://", "give hicache.file:///folder"),
        ("hicache+file:///tmp?page_kib=none", "give seconds above 0|page_kib"),
    ],
)
def test_an_address_of_no_backend_is_one_line(url: str, words: str) -> None:
    with pytest.raises(ChunkCacheError, match=words):
        connect_remote(url, byte_budget=BUDGET, model="m")


@pytest.fixture
def mooncake_url(tmp_path: Path) -> Iterator[str]:
    """Address of a Mooncake master of this test."""
    try:
        import mooncake.store
    except ImportError as error:
        pytest.skip(f"Mooncake cannot be loaded: {error}")
    port, metrics = free_port(), free_port()
    binary = Path(str(mooncake.store.__file__)).parent / "mooncake_master"
    words = ("--rpc_address=127.0.0.1", f"--port={port}", f"--metrics_port={metrics}")
    with (tmp_path / "master.log").open("wb") as log:
        master = subprocess.Popen([str(binary), *words], stdout=log, stderr=log, cwd=tmp_path)
    yield (
        f"hicache+mooncake://127.0.0.1:{port}?local_hostname=127.0.0.1&global_segment_size=67108864"
        f"&page_kib=16&catalog={tmp_path}/catalog&timeout=60"
    )
    master.terminate()
    master.wait(20)


@pytest.mark.slow
def test_records_in_mooncake_over_tcp(mooncake_url: str) -> None:
    tier = connect_remote(mooncake_url, byte_budget=BUDGET, model="m")
    record, kept = record_of(5, 99), record_of(500, 99)
    for one in (record, kept):
        assert tier.put(one, context=CONTEXT, tenant="somebody")
        assert same(tier.read(one.key), one)
    opened = tier.open(record.key, record.token_ids)
    assert opened is not None
    assert opened.layer(4, 3, 50).v.equal(record.v[4, 3:50])
    entry = tier.tier.catalog.find(record.key)  # type: ignore[attr-defined]
    store = tier.tier._store  # type: ignore[attr-defined]
    assert store.get([f"{entry.label}-0"]) != [None]
    assert tier.remove(record.key)
    assert store.get([f"{entry.label}-0"]) == [None], "the object itself is deleted"
    assert tier.open(record.key, record.token_ids) is None
    assert list(tier.keys()) == [kept.key]
    assert same(tier.read(kept.key), kept)

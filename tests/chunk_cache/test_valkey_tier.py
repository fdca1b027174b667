"""The remote tier against a real Valkey server: records, two clients, and erasing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from valkey_server import Server
from valkey_tier import Make, client_of, comes_back, name_of, same, tier_of

from chunk_cache import ChunkCacheError, KVContext
from chunk_cache.tiers.guard import GuardedTier
from chunk_cache.tiers.remote.connect import connect_remote


def test_what_is_put_is_read_by_another_client(
    server: Server, make_record: Make, context: KVContext
) -> None:
    record = make_record(range(40), layers=7)
    writer, reader = tier_of(server), tier_of(server)
    assert not reader.contains(record.key)
    assert reader.open(record.key, record.token_ids) is None
    assert writer.put(record, context=context, tenant="somebody")
    assert writer.put(record, context=context, tenant="somebody"), "it is there already"
    assert reader.contains(record.key)
    opened: Any = reader.open(record.key, record.token_ids)
    assert (opened.layout, opened.num_layers, opened.num_tokens) == ("heads", 7, 40)
    assert opened.base_position == record.base_position
    for index in range(7):
        layer, wanted = opened.layer(index, 3, 30), record.layer(index, 3, 30)
        assert layer.k.equal(wanted.k)
        assert layer.v.equal(wanted.v)
    whole: Any = reader.open(record.key, record.token_ids)
    assert same(whole.record(), record)
    assert same(reader.read(record.key), record)
    assert same(reader.get(record.key, record.token_ids), record)
    assert reader.open(record.key, record.token_ids + 1) is None
    assert reader.size_of(record.key) > record.k.nbytes + record.v.nbytes
    assert list(reader.keys()) == reader.keys_by_use() == [record.key]
    assert reader.tenant_of(context.namespace) == "somebody"
    assert (reader.describe(context.namespace) or {})["model"] == "m"
    assert reader.namespaces({"dtype": "bfloat16"}) == {context.namespace}
    assert not reader.namespaces({"dtype": "float16"})
    assert not client_of(server).keys("ragkv:2:w:*"), "nothing half-written is left"


def test_what_has_the_name_of_a_record_and_no_header_is_written_over(
    server: Server, make_record: Make
) -> None:
    """Nobody can read it, and as long as it stays nobody could write the record."""
    record, tier = make_record(range(8)), tier_of(server)
    client_of(server).hset(name_of(record), "0", b"something")
    assert tier.open(record.key, record.token_ids) is None
    assert tier.put(record)
    assert same(tier.get(record.key, record.token_ids), record)
    assert not client_of(server).keys("ragkv:2:w:*")


def test_an_erased_record_is_gone_for_everybody(server: Server, make_record: Make) -> None:
    record, other = make_record(range(8)), make_record(range(50, 60))
    one, two = tier_of(server), tier_of(server)
    assert one.put(record)
    assert one.put(other)
    assert two.remove(record.key)
    assert not two.remove(record.key)
    two.sync()
    assert one.open(record.key, record.token_ids) is None
    assert list(one.keys()) == [other.key]


@pytest.mark.parametrize("keeping", [("--appendonly", "yes"), ("--save", "3600 1")])
def test_an_erased_record_does_not_come_back_with_the_server(
    keeping: tuple[str, ...], tmp_path: Path, make_record: Make
) -> None:
    server = Server(tmp_path, *keeping)
    try:
        tier = tier_of(server, "?timeout=5")
        gone, kept = make_record(range(8)), make_record(range(50, 60))
        tier.put(gone)
        tier.put(kept)
        if keeping[0] == "--save":
            client_of(server).save()
            # A snapshot of some seconds: it counts only when it has ended.
            client_of(server).config_set("rdb-key-save-delay", 500_000)
        tier.remove(gone.key)
        tier.sync()
        server.kill()
        server.start()
        assert comes_back(tier, kept)
        assert list(tier.keys()) == [kept.key]
    finally:
        server.kill()


def test_a_snapshot_that_another_has_just_begun_is_waited_for(
    tmp_path: Path, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, "--save", "3600 1")
    try:
        tier, other = tier_of(server, "?timeout=5"), client_of(server)
        record = make_record(range(8))
        tier.put(record)
        other.config_set("rdb-key-save-delay", 200_000)
        tier.remove(record.key)
        client, begun = tier.tier._durability._client, []
        real = client.info

        def info(*sections: str) -> Any:
            state = real(*sections)
            if not begun:
                begun.append(other.bgsave())
            return state

        monkeypatch.setattr(client, "info", info)
        saves = other.info("persistence")["rdb_saves"]
        tier.sync()
        assert begun
        assert other.info("persistence")["rdb_saves"] == saves + 2
    finally:
        server.kill()


def test_a_server_that_does_not_sync_its_log_says_so(tmp_path: Path, make_record: Make) -> None:
    server = Server(tmp_path, "--appendonly", "yes", "--appendfsync", "no")
    try:
        tier, record = tier_of(server, "?timeout=5"), make_record(range(8))
        tier.put(record)
        tier.remove(record.key)
        with pytest.raises(ChunkCacheError, match="give it appendfsync"):
            tier.sync()
        assert tier.stats()["state"] == "closed", "it answers"
    finally:
        server.kill()


def test_a_namespace_is_described_by_its_records_too(
    server: Server, make_record: Make, context: KVContext
) -> None:
    """A server that evicts may drop the small entry and keep the records."""
    tier = tier_of(server)
    tier.put(make_record(range(8)), context=context, tenant="somebody")
    client_of(server).delete(f"ragkv:2:n:{context.namespace}")
    assert tier.tenant_of(context.namespace) == "somebody"


def test_no_salt_reaches_the_server(server: Server, make_record: Make, context: KVContext) -> None:
    import dataclasses

    salted = dataclasses.replace(context, tenant="very-secret-salt")
    record = make_record(range(8), in_context=salted)
    tier_of(server).put(record, context=salted)
    client = client_of(server)
    stored = [client.get(f"ragkv:2:n:{salted.namespace}"), *client.hvals(name_of(record))]
    assert not any(b"very-secret-salt" in data for data in stored)


def test_a_time_to_live_begins_anew_with_each_use(server: Server, make_record: Make) -> None:
    record, client = make_record(range(8)), client_of(server)
    tier = tier_of(server, "?ttl=1000")
    tier.put(record)
    assert 0 < client.ttl(name_of(record)) <= 1000
    client.expire(name_of(record), 5)
    tier.used([record.key])
    assert client.ttl(name_of(record)) > 5
    tier_of(server).put(record)
    assert client.ttl(name_of(record)) == -1, "without one it stays"


def test_a_full_server_declines(tmp_path: Path, make_record: Make) -> None:
    server = Server(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    try:
        tier = tier_of(server)
        records = [make_record(range(i, i + 300), layers=8, dim=64) for i in range(8)]
        stored = [tier.put(record) for record in records]
        assert stored[0]
        assert not all(stored)
        assert tier.breaker.state == "closed"
        assert [tier.read(r.key) is not None for r in records] == stored
    finally:
        server.kill()


def test_a_record_beyond_the_budget_is_declined(server: Server, make_record: Make) -> None:
    tier = connect_remote(server.url, byte_budget=1000, model="")
    assert not tier.put(make_record(range(40), layers=4))
    assert list(tier.keys()) == []


def test_a_record_that_is_evicted_before_it_has_its_name_is_not_stored(
    server: Server, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, record = tier_of(server), make_record(range(8))
    client = tier.tier._client
    real = client.renamenx

    def renamenx(temporary: str, name: str) -> Any:
        assert client_of(server).unlink(temporary) == 1  # as a full server does
        return real(temporary, name)

    monkeypatch.setattr(client, "renamenx", renamenx)
    assert not tier.put(record)
    assert tier.read(record.key) is None
    monkeypatch.undo()
    assert tier.put(record)
    assert tier.stats()["state"] == "closed"


def test_writers_of_one_key_and_a_reader_beside_a_server_that_evicts(
    tmp_path: Path, make_record: Make
) -> None:
    """A reader gets the record, or nothing: never another one's bytes and never half of it."""
    from concurrent.futures import ThreadPoolExecutor

    server = Server(tmp_path, "--maxmemory", "6mb", "--maxmemory-policy", "allkeys-lru")
    records = [make_record(range(i, i + 200), layers=8, dim=64) for i in range(12)]
    try:
        tiers = [tier_of(server, "?timeout=5") for _ in range(4)]

        def write(tier: GuardedTier) -> int:
            return sum(tier.put(record) for _ in range(4) for record in records)

        def read(tier: GuardedTier) -> list[bool]:
            found = [tier.read(record.key) for _ in range(6) for record in records]
            return [
                same(one, record)
                for one, record in zip(found, records * 6, strict=True)
                if one is not None
            ]

        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(write, tier) for tier in tiers[:2]]
            readers = [pool.submit(read, tier) for tier in tiers[2:]]
            assert all(writer.result() for writer in writers)
            hits = [hit for reader in readers for hit in reader.result()]
        assert hits
        assert all(hits)
        assert not client_of(server).keys("ragkv:2:w:*")
    finally:
        server.kill()

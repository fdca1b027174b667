"""The remote tier against a real Valkey server: records, two clients, erasing, and everything that goes wrong."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from valkey_server import Server, free_port

from chunk_cache import BackgroundWriter, ChunkCacheError, ChunkKV, KVContext
from chunk_cache.tiers.guard import GuardedTier
from chunk_cache.tiers.remote.connect import connect_remote
from chunk_cache.tiers.remote.valkey import ValkeyTier

Make = Callable[..., ChunkKV]
BUDGET = 1 << 30


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


def tier_of(server: Server, options: str = "?timeout=0.5", **settings: Any) -> GuardedTier:
    return connect_remote(server.url + options, byte_budget=BUDGET, model="m", **settings)


def client_of(server: Server) -> Any:
    import valkey

    return valkey.Valkey(port=server.port)


def name_of(record: ChunkKV) -> str:
    return f"ragkv:2:r:{record.key.namespace}:{record.key.digest}:{record.key.num_tokens}"


def same(found: ChunkKV | None, record: ChunkKV) -> bool:
    return (
        found is not None
        and found.k.equal(record.k)
        and found.v.equal(record.v)
        and found.base_position == record.base_position
        and found.tokens_equal(record.token_ids)
    )


def comes_back(tier: GuardedTier, record: ChunkKV) -> bool:
    until = time.monotonic() + 20
    while tier.open(record.key, record.token_ids) is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


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
    assert same(opened.record(), record)
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
        tier.remove(gone.key)
        tier.sync()
        server.kill()
        server.start()
        assert comes_back(tier, kept)
        assert list(tier.keys()) == [kept.key]
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


# -- garbage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda client, name: client.hset(name, "h", b"\x00" * 4000),
        lambda client, name: client.hset(name, "h", b""),
        lambda client, name: client.hset(name, "h", client.hget(name, "h")[:-1] + b"\xff"),
        lambda client, name: client.hdel(name, "h"),
        lambda client, name: (client.delete(name), client.set(name, b"a text")),
        lambda client, name: (client.delete(name), client.rpush(name, b"a list")),
    ],
)
def test_garbage_instead_of_a_header_is_a_miss(
    spoil: Callable[[Any, str], Any], server: Server, make_record: Make
) -> None:
    record, tier = make_record(range(8)), tier_of(server)
    tier.put(record)
    spoil(client_of(server), name_of(record))
    assert tier.open(record.key, record.token_ids) is None
    assert tier.read(record.key) is None
    assert tier.breaker.state == "closed", "the server answers"
    assert tier.put(record)


@pytest.mark.parametrize("data", [b"", b"garbage", None])
def test_garbage_instead_of_a_layer_ends_the_pass_and_is_written_anew(
    data: bytes | None, server: Server, make_record: Make
) -> None:
    record, tier, client = make_record(range(8), layers=4), tier_of(server), client_of(server)
    tier.put(record)
    if data is None:
        client.hdel(name_of(record), "2")
    else:
        client.hset(name_of(record), "2", data)
    reader = tier.open(record.key, record.token_ids)
    assert reader is not None
    assert reader.layer(1).k.equal(record.k[1])
    for _ in range(2):
        with pytest.raises(ChunkCacheError, match="layer 2 is"):
            reader.layer(2)
    assert tier.counts["damaged"] == 2
    assert tier.breaker.state == "closed"
    until = time.monotonic() + 10
    while tier.contains(record.key):
        assert time.monotonic() < until, "what is damaged is dropped"
        time.sleep(0.01)
    assert tier.put(record)
    assert same(tier.read(record.key), record)


def test_names_of_others_are_left_alone(server: Server, make_record: Make) -> None:
    record, client, tier = make_record(range(8)), client_of(server), tier_of(server)
    for name in ("ragkv:2:r:short:x:1", "ragkv:2:r:" + ":".join("a" * 32), "other", b"\xff\xfe"):
        client.set(name, b"x")
    tier.put(record)
    assert list(tier.keys()) == [record.key]


def test_a_server_that_speaks_something_else_is_down(make_record: Make) -> None:
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"valkey://127.0.0.1:{listener.getsockname()[1]}?timeout=0.5"

        def talk() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    peer.close()

        threading.Thread(target=talk, daemon=True).start()
        tier = connect_remote(url, byte_budget=BUDGET, model="")
        record = make_record(range(8))
        assert tier.open(record.key, record.token_ids) is None
        assert tier.stats()["state"] != "closed"


# -- servers that are dead or slow -------------------------------------------------------------


def test_a_server_that_dies_ends_the_pass_and_comes_back(server: Server, make_record: Make) -> None:
    record = make_record(range(200), layers=30, heads=8, dim=64)
    tier = tier_of(server)
    assert tier.put(record)
    reader = tier.open(record.key, record.token_ids)
    assert reader is not None
    server.kill()

    def read_all() -> None:
        for index in range(30):
            reader.layer(index)
        # Where everything had arrived before, the next one finds nobody.
        tier.demand(tier.tier.check)  # type: ignore[attr-defined]

    with pytest.raises(OSError):
        read_all()
    assert tier.open(record.key, record.token_ids) is None
    assert tier.stats()["state"] != "closed"
    server.start()
    until = time.monotonic() + 20
    while not tier.contains(record.key):
        assert time.monotonic() < until
        with contextlib.suppress(OSError):
            tier.put(record)
        time.sleep(0.05)
    assert same(tier.read(record.key), record)


def test_a_paused_server_is_waited_for_once(server: Server, make_record: Make) -> None:
    record = make_record(range(8))
    tier = tier_of(server)
    tier.put(record)
    reader = tier.open(record.key, record.token_ids)
    assert reader is not None
    server.pause()
    try:
        began = time.monotonic()
        assert tier.open(record.key, record.token_ids) is None
        waited = time.monotonic() - began
        assert tier.counts["timeouts"] == 1
        for _ in range(50):
            assert tier.open(record.key, record.token_ids) is None
            with pytest.raises(OSError):
                tier.put(record)
            with pytest.raises(OSError):
                reader.layer(0)
        assert tier.counts["timeouts"] <= 2, "at most one try more"
        assert waited < 30, "not for ever"
    finally:
        server.resume()
    assert comes_back(tier, record)


def test_a_server_that_stops_in_mid_record_ends_the_pass(server: Server, make_record: Make) -> None:
    record = make_record(range(400), layers=30, heads=8, dim=64)
    tier = tier_of(server)
    tier.put(record)
    gate = tier.tier._gate  # type: ignore[attr-defined]
    held = 0
    while gate.acquire(blocking=False):
        held += 1
    reader = tier.open(record.key, record.token_ids)
    assert reader is not None
    server.pause()
    try:
        gate.release(held)
        with pytest.raises(TimeoutError):
            reader.layer(0)
        assert tier.breaker.state != "closed"
    finally:
        server.resume()


def test_a_server_that_is_down_at_the_start_is_used_when_it_comes(
    tmp_path: Path, make_record: Make, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path)
    try:
        server.kill()
        with caplog.at_level(logging.INFO):
            tier = tier_of(server)
        (told,) = [line.getMessage() for line in caplog.records]
        assert told.startswith(f"valkey://127.0.0.1:{server.port} does not answer (")
        record = make_record(range(8))
        assert tier.open(record.key, record.token_ids) is None
        server.start()
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                if tier.put(record):
                    break
            assert time.monotonic() < until
            time.sleep(0.05)
        assert same(tier.read(record.key), record)
    finally:
        server.kill()


def test_a_wrong_password_is_told_once_and_shown_nowhere(
    tmp_path: Path, make_record: Make, context: KVContext, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path, "--requirepass", "right-word")
    try:
        url = f"valkey://:wrong-word@127.0.0.1:{server.port}"
        with caplog.at_level(logging.DEBUG):
            tier = connect_remote(url, byte_budget=BUDGET, model="")
            record = make_record(range(8))
            assert tier.open(record.key, record.token_ids) is None
            failed: list[OSError] = []
            writer = BackgroundWriter(tier, count=lambda kind: None, failed=failed.append)
            writer.put(record, context, "")
            assert writer.close(10)
        assert failed
        told = " ".join([caplog.text, *map(str, failed), repr(tier.tier.url), str(tier.stats())])  # type: ignore[attr-defined]
        assert "WRONGPASS" in told or "invalid" in told
        assert "wrong-word" not in told
        right = connect_remote(
            f"valkey://:right-word@127.0.0.1:{server.port}", byte_budget=BUDGET, model=""
        )
        assert right.put(record)
    finally:
        server.kill()


def test_nothing_is_asked_of_a_server_before_the_first_call() -> None:
    tier = ValkeyTier.connect(f"valkey://127.0.0.1:{free_port()}", byte_budget=1, model="")
    with pytest.raises(OSError, match="valkey://127"):
        tier.check()


def test_the_rights_that_the_page_names_are_enough(tmp_path: Path, make_record: Make) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tiers.md").read_text("utf-8")
    rights = page.partition("needs `")[2].partition("`")[0].split()
    server = Server(tmp_path, "--save", "3600 1")
    try:
        words = ["ACL", "SETUSER", "kv", "on", ">word", "~ragkv:2:*", *rights]
        client_of(server).execute_command(*words)
        url = f"valkey://kv:word@127.0.0.1:{server.port}?timeout=5&ttl=100"
        tier = connect_remote(url, byte_budget=BUDGET, model="")
        record = make_record(range(8))
        assert tier.put(record)
        assert same(tier.read(record.key), record)
        assert tier.keys_by_use() == [record.key]
        assert tier.remove(record.key)
        tier.sync()
        assert tier.stats()["state"] == "closed"
    finally:
        server.kill()


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

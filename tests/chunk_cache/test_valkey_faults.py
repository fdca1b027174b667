"""The Valkey tier where the server is dead, slow, or returns garbage: a miss, and one wait."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from valkey_server import Server
from valkey_tier import BUDGET, Make, client_of, comes_back, name_of, same, tier_of

from chunk_cache import ChunkCacheError
from chunk_cache.tiers.remote.connect import connect_remote

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
    with contextlib.ExitStack() as turns:
        for _ in range(2):
            turns.enter_context(gate.call())
        reader = tier.open(record.key, record.token_ids)
        assert reader is not None
        server.pause()
    try:
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

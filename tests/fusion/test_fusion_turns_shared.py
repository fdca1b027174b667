"""Turns of conversations in a store that several servers share and nobody lists: found by the conversation's own list."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from turn_lives import ACME, EACH, GLOBEX, PREFIX, TURN, Life
from valkey_server import Server, free_port

from chunk_cache import TextMarks, tenant_mark
from chunk_cache.tiers.remote.valkey import ValkeyTier
from rag_pipeline.notices import Notice, Reach
from rag_pipeline.sglang_plugin.fusion.admission import fetching
from rag_pipeline.sglang_plugin.fusion.builds import notices_in_force
from rag_pipeline.sglang_plugin.fusion.conversations.shared_turns import SharedTurns
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace

Begin = Callable[..., Life]


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("valkey"))
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how fast this machine answers."""
    monkeypatch.setattr(fetching, "HEADER_WAIT_S", 60.0)


@pytest.fixture(params=["valkey", "hicache"])
def begin(request: pytest.FixtureRequest, valkey: Server, tmp_path: Path) -> Iterator[Begin]:
    """A life of an engine whose only tier is a remote one, empty at first."""
    if request.param == "valkey":
        client_of(valkey).flushall()
        url = f"{valkey.url}?timeout=30"
    else:
        url = f"hicache+file://{tmp_path}/pages?timeout=30"
    begun = []

    def make(**options: Any) -> Life:
        begun.append(Life(**{"remote": url, **options}))
        return begun[-1]

    yield make
    for life in begun:
        life.runtime.fetcher.close(60)
        life.runtime.tiers.close(60)


def client_of(server: Server) -> Any:
    import valkey

    return valkey.Valkey(port=server.port)


def test_a_conversation_goes_on_in_another_life_and_in_another_server(begin: Begin) -> None:
    one = begin()
    for turns in (1, 2, 3):
        one.ask(turns)
    one.end()
    assert one.counts()["remote.written"] == 3
    two = begin()
    assert two.counts().get("turns.restored", 0) == 0  # nothing is listed at the start
    state = two.ask(4, radix_len=PREFIX)
    assert two.loaded == EACH[:3]
    assert state.approximate_from is None
    assert two.counts()["turns.restored"] == 3
    assert two.runtime.tiers.drain(60)
    # A third server that is up beside it hears of each new turn when the next request comes.
    three = begin()
    three.ask(5)
    assert three.loaded == EACH[:4]
    assert three.runtime.tiers.drain(60)
    two.ask(6)
    assert [end for _, end, _ in two.loaded][-1] == PREFIX + 5 * TURN
    assert two.counts()["turns.restored"] == 4


def test_a_queue_that_says_when_to_fetch_changes_nothing_of_it(begin: Begin) -> None:
    one = begin()
    for turns in (1, 2):
        one.ask(turns)
    one.end()
    two = begin(eviction="lookahead")
    two.ask(3)
    assert two.loaded == EACH[:2]


def test_fused_turns_are_a_chain_there_too(begin: Begin) -> None:
    one = begin()
    one.ask(1, fused=True)
    one.ask(2, radix_len=PREFIX)
    one.end()
    two = begin()
    two.ask(3, radix_len=PREFIX)
    assert two.loaded == [(*run[:2], False) for run in EACH[:2]]


def test_other_tenants_policies_and_weights_find_nothing(begin: Begin) -> None:
    one = begin()
    for turns in (1, 2):
        one.ask(turns)
    one.end()
    two = begin()
    for tenant, fusion in (
        (GLOBEX, {}),
        (RadixNamespace(None, None), {}),
        (RadixNamespace("acme", None), {}),
        (ACME, {"passage": False}),
    ):
        assert two.admitted(3, tenant=tenant, radix_len=0, **fusion).spans == ()
    assert two.counts().get("turns.restored", 0) == 0
    other = begin(weights="others")
    other.ask(3)
    assert other.loaded == []


def test_what_a_tenant_erases_is_never_listed_again(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = begin()
    for tenant in (ACME, GLOBEX):
        one.ask(1, tenant=tenant)
    one.end()
    reach = Reach(tenant=tenant_mark("acme"), spared=frozenset({tenant_mark("globex")}))
    notice = Notice(name="n", marks=TextMarks({}, everything=True), folders=(), reach=reach)
    two = begin()
    monkeypatch.setattr(notices_in_force, "notices", lambda seen, **_: iter([notice]))
    two.runtime.erased.look()
    two.ask(2)
    assert two.loaded == []
    two.ask(2, tenant=GLOBEX)
    assert two.loaded == EACH[:1]
    table = two.runtime.conversations.table
    assert two.counts()["turns.restored"] == 1
    held = [turn.start for tenant, _, turns in table._spaces.items() for turn in turns]
    assert held.count(PREFIX) <= 2  # one that each of them has just kept


def test_what_is_erased_while_it_is_being_told_of_does_not_stay(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = begin()
    one.ask(1)
    one.end()
    two = begin()
    table = two.runtime.conversations.table
    add = table.add

    def then_erased(turn: Any, *, tenant: str = "") -> None:
        add(turn, tenant=tenant)
        two.runtime.erased._condemned[turn.key] = ""

    monkeypatch.setattr(table, "add", then_erased)
    two.admitted(2, tenant=ACME, radix_len=0).drop()
    assert [turns for *_, turns in table._spaces.items() if turns] == []


# ---- faults ---------------------------------------------------------------------------------------


def test_a_store_that_is_down_costs_nothing_but_the_turns(valkey: Server) -> None:
    life = Life(remote=f"valkey://127.0.0.1:{free_port()}?timeout=30")
    life.ask(1)
    life.ask(2)  # what it kept itself
    assert life.loaded == EACH[:1]
    assert life.runtime.fetcher.close(60)
    life.runtime.tiers.close(60)


def test_a_list_that_comes_too_late_serves_the_next_request(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_of(valkey).flushall()
    url = f"{valkey.url}?timeout=30"
    one = Life(remote=url)
    one.ask(1)
    one.end()
    two = Life(remote=url)
    members, may_go = ValkeyTier.members, threading.Event()
    monkeypatch.setattr(ValkeyTier, "members", lambda *given: may_go.wait(60) and members(*given))
    monkeypatch.setattr(fetching, "HEADER_WAIT_S", 0.0)
    late = two.admitted(2, tenant=ACME, radix_len=0)
    assert late.spans == ()
    late.drop()
    may_go.set()
    monkeypatch.setattr(fetching, "HEADER_WAIT_S", 60.0)
    two.ask(2)
    assert two.loaded == EACH[:1]
    two.end()


def test_garbage_in_the_store_is_no_turn(valkey: Server) -> None:
    client = client_of(valkey)
    client.flushall()
    url = f"{valkey.url}?timeout=30"
    one = Life(remote=url)
    for turns in (1, 2, 3):
        one.ask(turns)
    one.end()
    (name,) = client.keys("ragkv:2:t:*")
    first, second, third = client.zrange(name, 0, -1)
    absent = "ragkv:2:r:" + 32 * "0" + ":" + 64 * "0" + ":7"
    for garbage in (b"garbage", b"ragkv:2:r:x:y:z", first[:-1], b"\xff" * 200, absent):
        client.zadd(name, {garbage: 0})
    client.delete(first)
    client.hset(second, "h", b"garbage")
    two = Life(remote=url)
    two.ask(4)
    assert two.loaded == EACH[2:3]
    two.end()
    # One turn that says it were another's: the key says otherwise.
    other = third.split(b":")[3].decode()
    told = client.get(f"ragkv:2:n:{other}")
    client.set(f"ragkv:2:n:{other}", told.replace(b"%d" % EACH[2][0], b"%d" % EACH[1][0]))
    three = Life(remote=url)
    three.ask(3)
    assert all(start != EACH[2][0] for start, *_ in three.loaded)
    three.end()
    client.delete(name)
    client.set(name, "no list")
    four = Life(remote=url)
    four.ask(4)
    assert four.loaded == []
    four.end()


def test_a_list_keeps_the_newest_and_lives_as_long_as_its_records(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chunk_cache import ChunkKey
    from chunk_cache.tiers.remote import valkey_groups
    from chunk_cache.tiers.remote.url import parse_remote_url

    client = client_of(valkey)
    client.flushall()
    monkeypatch.setattr(valkey_groups, "MOST_MEMBERS", 3)
    url = parse_remote_url(f"{valkey.url}?timeout=30&ttl=900")
    tier = ValkeyTier(url, byte_budget=1 << 20)
    keys = [ChunkKey(32 * "a", f"{number:064x}", 5) for number in range(5)]
    for key in (*keys, keys[3]):
        tier.note_member(32 * "b", key)
    (name,) = client.keys("ragkv:2:t:*")
    listed = [one.decode().split(":")[4] for one in client.zrange(name, 0, -1)]
    assert listed == [f"{number:064x}" for number in (2, 4, 3)]
    assert 0 < client.ttl(name) <= 900
    assert tier.members(32 * "b") == []  # no record is there
    # A server without room refuses the list, as it refuses records.
    client.config_set("maxmemory", 1)
    try:
        tier.note_member(32 * "c", keys[0])
    finally:
        client.config_set("maxmemory", 0)
    assert len(client.keys("ragkv:2:t:*")) == 1


def test_a_remote_tier_without_lists_is_said_once(
    valkey: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="rag_pipeline")
    monkeypatch.setattr(ValkeyTier, "has_groups", False)
    life = Life(remote=f"{valkey.url}?timeout=30")
    for turns in (1, 2):
        life.ask(turns)
    said = [one for one in caplog.messages if "keeps no lists of conversations" in one]
    assert len(said) == 1
    assert life.runtime.conversations._shared._thread is None
    life.end()


def test_conversations_that_nobody_waits_for_any_more_are_not_piled_up(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rag_pipeline.sglang_plugin.fusion.conversations import shared_turns

    monkeypatch.setattr(shared_turns, "_MAX_WAITING", 2)
    monkeypatch.setattr(SharedTurns, "_run", lambda self: None)
    life = Life(remote=f"{valkey.url}?timeout=30")
    shared, context = (
        life.runtime.conversations._shared,
        life.runtime.facts.context(prefix_digest="-", tenant=""),
    )
    first = shared.ask(context, "a", "")
    assert shared.ask(context, "a", "") is first
    assert shared.ask(context, "b", "") is not None
    assert shared.ask(context, "c", "") is None
    assert life.counts()["turns.not_looked_up"] == 1
    life.runtime.fetcher.close(60)
    life.runtime.tiers.close(60)

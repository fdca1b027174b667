"""Text that one server erases goes from the others that share its store: two machines, one real Valkey or folder."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from erasing import CONTEXT, OTHER, SECRET
from valkey_server import Server

from chunk_cache import ChunkKV, KVContext, StoreFolder, TextMarks, Tier, TierChain, tenant_mark
from chunk_cache.tiers.remote.connect import connect_board, connect_remote
from chunk_cache.tiers.remote.notices import NoticeBoard, Posted
from chunk_cache.tiers.remote.valkey_notices import BODIES, NAMES
from rag_pipeline.erasure import make_eraser, post
from rag_pipeline.notices import Notice, Reach
from rag_pipeline.sglang_plugin.fusion.builds.erased import ErasedText
from rag_pipeline.sglang_plugin.fusion.builds.notice_exchange import NoticeExchange, open_exchange
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime
from retrievers import delete_documents

Record = Callable[..., ChunkKV]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.kill()


def boards_of(server: Server) -> tuple[Any, NoticeBoard, NoticeBoard]:
    """A plain client of a server, and the boards of two machines."""
    import valkey

    boards = connect_board(server.url), connect_board(server.url)
    assert boards[0] is not None
    assert boards[1] is not None
    return valkey.Valkey(port=server.port), boards[0], boards[1]


class Machine:
    """An engine with its memory, its folder and its own project folder, without a scheduler."""

    def __init__(
        self, name: str, url: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.home, self.model, self.url = tmp_path / name, model, url
        self._monkeypatch = monkeypatch
        self.folder = StoreFolder(self.home / "kv", create=True, model=str(model))
        self.counts: Counter[tuple[str, str]] = Counter()
        self.start()

    def start(self) -> None:
        """Start the engine; its memory is empty."""
        self.here()
        config = FusionConfig(store_dir=str(self.home / "kv"), remote=self.url)
        self.runtime = FusionRuntime(config, None)
        self.watch = ErasedText(self.runtime, str(self.model), open_exchange(config))
        self.remote: Tier = connect_remote(self.url, byte_budget=1 << 30, model=str(self.model))
        self.runtime.tiers = TierChain(
            {"disk": self.folder, "remote": self.remote},
            count=lambda tier, kind: self.counts.update([(tier, kind)]),
            is_erased=self.watch.is_in_written,
        )

    def here(self) -> None:
        """Be on this machine: notices of another one's project folder are not seen."""
        self._monkeypatch.setattr("rag_pipeline.erasure.board", lambda: self.home / "erased")

    def look(self) -> int:
        self.here()
        return self.watch.look()

    def keep(self, record: ChunkKV, context: KVContext = CONTEXT) -> None:
        """Have it in memory and in both tiers."""
        self.runtime.store.put(record, tenant=tenant_mark(context.tenant))
        self.folder.put(record, context=context)
        self.remote.put(record, context=context)

    def held(self) -> tuple[set[Any], set[Any]]:
        """Keys in memory and in the folder."""
        return set(self.runtime.store.keys()), set(self.folder.keys())


@pytest.fixture
def machine(
    home: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], Machine]:
    return lambda name, url: Machine(name, url, home, smollm2_path, monkeypatch)


@pytest.fixture(params=["valkey", "hicache"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "hicache":
        return f"hicache+file://{tmp_path / 'shared'}"
    return str(request.getfixturevalue("server").url) + "?timeout=5"


def test_what_one_machine_erases_goes_from_the_other_too(
    url: str, machine: Callable[[str, str], Machine], index: Path, record: Record
) -> None:
    one, two = machine("one", url), machine("two", url)
    secret, other = record(SECRET), record(OTHER)
    for server in (one, two):
        for text in (secret, other):
            server.keep(text)
    one.here()
    delete_documents(index, ["a"], erase=make_eraser(one.home / "kv"))
    assert one.look() == 1
    assert list(one.remote.keys()) == [other.key]
    assert secret.key in two.folder.keys()  # noqa: SIM118 - nobody on that machine was told
    # The other machine writes it back before its next look: it reads the notices first.
    two.here()
    assert two.runtime.tiers is not None
    assert two.runtime.tiers.put(secret, context=CONTEXT)
    assert two.runtime.tiers.drain(60)
    assert two.counts["remote", "erased"] == two.counts["disk", "erased"] == 1
    assert list(two.remote.keys()) == [other.key]
    assert two.look() == 1
    assert two.held() == one.held() == ({other.key}, {other.key})
    assert two.look() == one.look() == 0


def test_a_server_that_was_off_hears_of_it_at_its_start_and_only_once(
    url: str, machine: Callable[[str, str], Machine], index: Path, record: Record
) -> None:
    one, two = machine("one", url), machine("two", url)
    secret, other = record(SECRET), record(OTHER)
    for text in (secret, other):
        two.keep(text)
    one.here()
    # Nothing runs there: whoever deletes tells the store.
    delete_documents(index, ["a"], erase=make_eraser(one.home / "kv", remote=url))
    two.start()
    two.runtime.store.put(secret)  # as it is read from the folder
    two.watch.begin()
    assert two.runtime.store.keys() == []
    assert two.watch.is_in(secret, "")
    two.look()
    assert set(two.folder.keys()) == set(two.remote.keys()) == {other.key}
    # The text may come again: a later start does not erase it anew.
    two.start()
    two.folder.put(secret, context=CONTEXT)
    two.watch.begin()
    two.look()
    assert set(two.folder.keys()) == {other.key, secret.key}


def test_a_writer_in_the_midst_of_its_write_removes_it_behind_the_one_who_erases(
    server: Server,
    machine: Callable[[str, str], Machine],
    index: Path,
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = server.url + "?timeout=5"
    one, two = machine("one", url), machine("two", url)
    secret = record(SECRET)
    writes, goes_on = threading.Event(), threading.Event()
    put = two.remote.put

    def slow(*given: Any, **options: Any) -> bool:
        writes.set()
        assert goes_on.wait(60)
        return put(*given, **options)

    monkeypatch.setattr(two.remote, "put", slow)
    assert two.runtime.tiers is not None
    assert two.runtime.tiers.put(secret, context=CONTEXT)
    assert writes.wait(60)
    one.here()
    delete_documents(index, ["a"], erase=make_eraser(one.home / "kv"))
    one.look()
    two.here()
    goes_on.set()
    assert two.runtime.tiers.drain(60)
    assert two.counts["remote", "erased"] == 1
    assert list(one.remote.keys()) == []


def test_a_store_that_is_down_is_told_when_it_comes_back(
    server: Server,
    machine: Callable[[str, str], Machine],
    index: Path,
    record: Record,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = machine("one", server.url), machine("two", server.url)
    secret = record(SECRET)
    two.folder.put(secret, context=CONTEXT)
    server.kill()
    one.here()
    delete_documents(index, ["a"], erase=make_eraser(one.home / "kv"))
    with pytest.raises(OSError, match="valkey://"):
        one.look()
    server.start()
    for one_again in (one.watch.notices.exchange, two.watch.notices.exchange):
        assert one_again is not None
        monkeypatch.setattr(one_again._board.breaker, "enter", lambda: 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(one.remote.breaker, "enter", lambda: 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(two.remote.breaker, "enter", lambda: 0)  # type: ignore[attr-defined]
    one.look()
    two.look()
    assert list(two.folder.keys()) == []


def test_what_a_tenant_erases_spares_the_tenants_that_only_another_server_knows(
    server: Server, machine: Callable[[str, str], Machine], record: Record
) -> None:
    url = server.url + "?timeout=5"
    one, two = machine("one", url), machine("two", url)
    owners = {
        name: KVContext(**{**CONTEXT.to_json(), "tenant": name})  # type: ignore[arg-type]
        for name in ("", "acme", "initech")
    }
    held = {name: record("e", context) for name, context in owners.items()}
    for name, one_of in held.items():
        two.keep(one_of, owners[name])
    one.here()
    post(TextMarks.of([("e", [])]), (), Reach(tenant=tenant_mark("acme")))
    one.look()
    two.look()
    left = {held["initech"].key}
    assert two.held() == (left, left)
    assert set(two.remote.keys()) == left


def test_a_notice_that_the_store_has_lost_means_everything(
    server: Server, machine: Callable[[str, str], Machine], record: Record
) -> None:
    import valkey

    one, two = machine("one", server.url), machine("two", server.url)
    two.keep(record(OTHER))
    one.here()
    post(TextMarks.of([(SECRET, [])]), ())
    one.look()
    client = valkey.Valkey(port=server.port)
    assert client.ttl(NAMES) == client.ttl(BODIES) == -1, "no volatile policy evicts them"
    assert b"vault" not in b"".join(client.hvals(BODIES))
    client.delete(BODIES)
    two.look()
    assert two.held() == (set(), set())


def test_old_notices_go_and_a_board_that_begins_anew_is_read_from_its_beginning(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, writer, reader = boards_of(server)
    client.xadd(NAMES, {"stranger": "x"}, id="1-0")
    client.xadd(NAMES, {"name": "old"}, id="1-1")
    client.hset(BODIES, "old", b"x")
    assert [one.name for one in reader.new()] == ["1-0", "old"]
    writer.post("new", b"body")
    assert [(one.name, one.body) for one in reader.new()] == [("new", b"body")]
    assert reader.new() == []
    assert client.hkeys(BODIES) == [b"new"]
    client.flushall()
    client.xadd(NAMES, {"name": "again"}, id="5-1")  # its clock went back
    assert [(one.name, one.body) for one in reader.new()] == [("again", None)]


def test_a_place_that_is_ahead_of_the_clock_makes_no_notice_old(server: Server) -> None:
    client, writer, off = boards_of(server)
    writer.post("first", b"1")
    in_90_days = round(1000 * (time.time() + 90 * 24 * 3600))
    client.xadd(NAMES, {"name": "ahead"}, id=f"{in_90_days}-0")  # the server's clock was wrong once
    writer.post("second", b"2")
    assert [one.name for one in off.new()] == ["first", "ahead", "second"]


def test_garbage_among_the_names_keeps_no_notice_from_being_posted(server: Server) -> None:
    client, writer, reader = boards_of(server)
    client.xadd(NAMES, {"garbage": "x"}, id="1-1")
    assert [one.body for one in reader.new()] == [None]
    writer.post("new", b"body")
    assert [(one.name, one.body) for one in reader.new()] == [("new", b"body")]
    assert client.xlen(NAMES) == 1


def test_a_notice_of_garbage_hides_no_other_one(
    server: Server, machine: Callable[[str, str], Machine], index: Path, record: Record
) -> None:
    one, two = machine("one", server.url), machine("two", server.url)
    two.keep(record(SECRET))
    board = connect_board(server.url)
    assert board is not None
    board.post("0-garbage", b"[" * 200_000 + b"\n")
    one.here()
    delete_documents(index, ["a"], erase=make_eraser(one.home / "kv", remote=server.url))
    assert two.look() == 1
    assert [n.marks.everything for _, n in two.watch.notices.in_force] == [True, False]
    assert two.held() == (set(), set())
    assert list(two.remote.keys()) == []


def test_a_store_without_notices_says_so_once(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "chunk_cache.tiers.remote.valkey.ValkeyTier.connect_board", None, raising=True
    )
    caplog.set_level("WARNING", logger=open_exchange.__module__)  # an engine may have set another
    assert open_exchange(FusionConfig(remote="valkey://:hunter22@127.0.0.1:1")) is None
    (line,) = [one.getMessage() for one in caplog.records]
    assert line.startswith("valkey://127.0.0.1:1 keeps no notices")
    assert "erase there too" in line
    caplog.clear()
    monkeypatch.undo()
    monkeypatch.setenv("RAG_PIPELINE_HOME", str(home / "home"))
    assert open_exchange(FusionConfig(remote="hicache+mooncake://127.0.0.1:1")) is not None
    (line,) = [one.getMessage() for one in caplog.records]
    assert "?catalog=FOLDER" in line


def test_the_body_of_a_notice_lives_as_long_as_the_last_of_its_copies(server: Server) -> None:
    """Ranks and machines post the same one, and the first copy is old earlier."""
    client, writer, reader = boards_of(server)
    client.xadd(NAMES, {"name": "twice"}, id="1-0")
    writer.post("twice", b"body")
    assert [(one.name, one.body) for one in reader.new()] == [("twice", b"body")]


def test_two_threads_that_pass_on_one_notice_are_no_fault(tmp_path: Path) -> None:
    """The thread that watches, and one that writes to a tier, both read the notices of this machine."""
    both = threading.Barrier(2)

    class Board(NoticeBoard):
        def post(self, name: str, body: bytes) -> None:
            both.wait(60)

        def new(self) -> list[Posted]:
            return []

    exchange = NoticeExchange(Board(), tmp_path / "done")
    notice = Notice(name="n", marks=TextMarks({}, everything=True), folders=(), reach=Reach())
    with ThreadPoolExecutor(2) as pool:
        for passed in [pool.submit(exchange.pass_on, [notice]) for _ in range(2)]:
            passed.result(60)
    assert exchange._waiting == {}

"""Orders to the chunk cache of a scheduler process: real stores and folders, no engine."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from chunk_cache import ChunkKey, ChunkKV, Fetcher, KVContext, RecordForm, StoreFolder, TierChain
from rag_pipeline.protocol.cache_order import (
    CACHE_KEY,
    CacheOrder,
    CacheOrderError,
    read_answer,
)
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.management.desk import CacheDesk
from rag_pipeline.sglang_plugin.fusion.runtime.rank_group import RankGroup
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

LAYERS, HEADS, DIM = 2, 2, 8
IDS = [np.arange(n, n + 70, dtype=np.int32) for n in (0, 100, 200)]


def context(rank: int = 0, size: int = 1) -> KVContext:
    return KVContext(
        model_fingerprint=f"weights {rank}",
        dtype="float32",
        kv_dtype="float32",
        rope="{}",
        prefix_digest="d",
        tp_rank=rank,
        tp_size=size,
    )


def record(number: int, of: KVContext) -> ChunkKV:
    return ChunkKV(
        key=ChunkKey.of(of, IDS[number]),
        token_ids=IDS[number],
        base_position=4,
        k=torch.randn(LAYERS, 70, HEADS, DIM),
        v=torch.randn(LAYERS, 70, HEADS, DIM),
    )


class Process:
    """What a scheduler process has of all this."""

    def __init__(self, folder: Path, group: RankGroup | None = None) -> None:
        group = group or RankGroup()
        self.context = context(group.rank, group.size)
        self.runtime = FusionRuntime(FusionConfig(store_dir=str(folder)), None, group=group)
        # Weights differ from rank to rank, and so do their fingerprints.
        fields = {"model_fingerprint": self.context.model_fingerprint, "tp_rank": group.rank}
        self.runtime.facts = SimpleNamespace(context_fields=fields)  # type: ignore[assignment]
        self.folder = StoreFolder(folder, create=True)
        self.runtime.tiers = TierChain({"disk": self.folder})
        empty = torch.zeros(LAYERS, 0, HEADS, DIM)
        self.runtime.fetcher = Fetcher(
            self.runtime.tiers, self.runtime.store, RecordForm("heads", empty, empty)
        )
        self.desk = CacheDesk(self.runtime)
        self.records = [record(number, self.context) for number in range(len(IDS))]
        self.digests = [one.key.digest for one in self.records]
        for one in self.records:
            self.runtime.store.put(one)
            self.folder.put(one, context=self.context)

    def close(self) -> None:
        assert self.runtime.fetcher is not None
        assert self.runtime.tiers is not None
        assert self.runtime.fetcher.close(30)
        assert self.runtime.tiers.close(30)
        self.runtime.store.check_integrity(expect_idle=True)

    def ask(self, action: str, **fields: Any) -> dict[str, Any]:
        """As the HTTP process does: until the answer is there."""
        order = CacheOrder(action=action, ticket=f"{action}-{time.monotonic_ns()}", **fields)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            sent = CacheOrder.decode(order.encode())
            assert sent == order
            answer = read_answer([{CACHE_KEY: self.desk.take(sent)}], order.ticket)
            if answer is not None:
                return answer
            time.sleep(0.01)
        raise AssertionError("no answer")


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path / "kv")
    yield made
    made.close()


def test_a_pin_ends_everywhere_and_an_eviction_spares_it_until_then(process: Process) -> None:
    one, two, three = process.digests
    assert process.ask("pin", keys=(one[:9], two), ttl_s=0.5) == {
        "pinned": [one, two],
        "not_pinned": [],
        "ttl_s": 0.5,
    }
    kept = process.ask("evict", keys=(one, three))
    assert (kept["evicted"], kept["pinned_kept"]) == ([three], [one])
    assert {key.digest for key in process.folder.keys()} == {one, two}  # noqa: SIM118
    time.sleep(0.6)
    assert [row["pinned"] for row in process.ask("ls")["entries"]] == [False, False]
    assert process.ask("evict", keys=(one,))["evicted"] == [one]
    assert process.ask("unpin", keys=(two,)) == {"unpinned": []}
    process.ask("pin", keys=(two,))
    assert set(process.folder.pins().values()) == {math.inf}
    assert process.ask("unpin", keys=(two,)) == {"unpinned": [two]}


def test_what_is_in_use_stays_whole(process: Process) -> None:
    one = process.records[0]
    lease = process.runtime.store.acquire(one.key, one.token_ids)
    assert lease is not None
    assert process.ask("evict", keys=(one.key.digest,))["in_use_kept"] == [one.key.digest]
    assert process.folder.contains(one.key)
    lease.release()


def test_figures_and_rows_agree(process: Process) -> None:
    process.ask("evict", keys=(process.digests[0],), tier="memory")
    memory, disk = process.ask("stats")["tiers"]
    assert (memory["chunks"], disk["chunks"]) == (2, 3)
    rows = process.ask("ls")["entries"]
    assert sum(row["bytes"].get("memory", 0) for row in rows) == memory["bytes"]
    assert sum(row["bytes"]["disk"] for row in rows) == disk["bytes"]
    assert len(process.ask("ls", tier="memory")["entries"]) == 2
    page = process.ask("ls", offset=1, limit=1)
    assert page["total"] == 3
    assert [row["key"] for row in page["entries"]] == [rows[1]["key"]]
    # A tenant is told of its own, which is nothing here.
    nothing = process.ask("stats", tenant="somebody")
    assert nothing == {
        "tiers": [
            {"name": "memory", "chunks": 0, "bytes": 0, "hits": 0},
            {"name": "disk", "chunks": 0, "bytes": 0},
        ]
    }


def test_verify_looks_at_every_tier(tmp_path: Path) -> None:
    process = Process(tmp_path / "kv")
    store = process.runtime.store
    assert process.ask("verify")["memory_without_checksum"] == 3
    sealed = process.records[0].sealed()
    store.evict(sealed.key)
    store.put(sealed)
    sealed.k[0, 0, 0, 0] += 1
    with store.borrow(sealed.key) as held:
        assert held is not None
        held.k[0, 0, 0, 0] += 1  # a copy, where the store keeps a slab
    (file,) = process.folder.path.rglob(f"{process.digests[1]}*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert process.ask("verify")["damaged_removed"] == {
        "memory": [process.digests[0]],
        "disk": [process.digests[1]],
    }
    assert process.ask("verify")["damaged_removed"] == {"memory": [], "disk": []}
    process.close()


def test_what_is_trimmed_is_told_by_the_tier_that_it_left(process: Process) -> None:
    one, two, three = process.digests
    process.ask("pin", keys=(one,))
    told = process.ask("evict", max_bytes=0, keys=(two,))
    assert told["evicted"] == [two]
    assert told["trimmed"] == {"disk": [three]}
    assert {info.key.digest for info in process.runtime.store.ls()} == {one, three}


def test_a_tier_that_cannot_be_listed_is_refused_not_shown_empty(
    process: Process, tmp_path: Path
) -> None:
    shared = StoreFolder(tmp_path / "shared", create=True)
    shared.is_shared = True
    process.runtime.tiers = TierChain({"disk": process.folder, "remote": shared})
    with pytest.raises(CacheOrderError, match=r"'remote' .* cannot be listed .* memory, disk"):
        process.ask("ls", tier="remote")


@pytest.mark.parametrize(
    ("action", "fields", "status", "line"),
    [
        ("pin", {"keys": ("00",)}, 404, "begins with '00'"),
        ("pin", {"keys": ("",)}, 404, "begins with ''"),
        ("dance", {}, 400, "allowed: stats, ls"),
        ("ls", {"tier": "tape"}, 400, "allowed: memory, disk"),
        ("evict", {"max_bytes": 0, "tier": "memory"}, 400, "folder on disk"),
    ],
)
def test_an_order_that_cannot_be_carried_out_is_one_line(
    process: Process, action: str, fields: dict[str, Any], status: int, line: str
) -> None:
    with pytest.raises(CacheOrderError, match=line) as refusal:
        process.ask(action, **fields)
    assert refusal.value.status == status
    assert "\n" not in str(refusal.value)
    assert len(process.runtime.store) == len(IDS)


def test_what_is_no_order_is_left_alone() -> None:
    for text in (
        None,
        "",
        "abc",
        "rag-cache:",
        "rag-cache:{}",
        'rag-cache:{"keys": 3}',
        "rag-cache:[]",
    ):
        assert CacheOrder.decode(text) is None
    assert read_answer([], "t") is None
    assert read_answer([{}], "t") is None
    other = {CACHE_KEY: {"ticket": "other", "done": True, "result": {"is": "theirs"}}}
    assert read_answer([other], "t") is None


def test_replicas_answer_together() -> None:
    done = {CACHE_KEY: {"ticket": "t", "done": True, "result": {"pinned": ["a"]}}}
    refused = {CACHE_KEY: {"ticket": "t", "done": True, "error": "no chunk", "status": 404}}
    waiting = {CACHE_KEY: {"ticket": "t", "done": False}}
    assert read_answer([refused, done], "t") == {"pinned": ["a"], "replicas": [{"pinned": ["a"]}]}
    assert read_answer([done, waiting], "t") is None
    with pytest.raises(CacheOrderError, match="no chunk"):
        read_answer([refused, refused], "t")


def test_two_replicas_with_one_folder_answer_as_one_cache(tmp_path: Path) -> None:
    """`--dp-size 2`: every order reaches both, and what they say is added up where it is not the same."""
    replicas = [Process(tmp_path / "kv") for _ in range(2)]

    def ask(action: str, **fields: Any) -> dict[str, Any]:
        order = CacheOrder(action=action, ticket=f"{action}-{time.monotonic_ns()}", **fields)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            states = [{CACHE_KEY: replica.desk.take(order)} for replica in replicas]
            if (answer := read_answer(states, order.ticket)) is not None:
                return answer
            time.sleep(0.01)
        raise AssertionError("no answer")

    one, two, three = replicas[0].digests
    first, second = (replica.runtime.store for replica in replicas)
    assert second.evict(replicas[1].records[2].key)
    size = replicas[0].records[0].num_bytes
    memory, disk = ask("stats")["tiers"]
    assert (memory["chunks"], memory["bytes"]) == (5, 5 * size)
    assert memory["byte_budget"] == first.stats().byte_budget + second.stats().byte_budget
    assert disk["chunks"] == 3, "one folder"
    assert disk["bytes"] == sum(replicas[0].folder.size_of(k.key) for k in replicas[0].records)
    assert ask("pin", keys=(one, three), ttl_s=3600)["pinned"] == [one, three]
    assert [info.pinned for info in (*first.ls(), *second.ls())].count(True) == 3
    listed = ask("ls")
    assert listed["total"] == len(listed["entries"]) == 3
    rows = {row["key"]: row for row in listed["entries"]}
    assert rows[two]["bytes"]["memory"] == 2 * rows[three]["bytes"]["memory"] == 2 * size
    assert [rows[key]["pinned"] for key in (one, two, three)] == [True, False, True]
    lease = second.acquire(replicas[1].records[1].key, IDS[1])
    assert lease is not None
    told = ask("evict", keys=(one, two), tier="memory")
    assert (told["evicted"], told["in_use_kept"], told["pinned_kept"]) == ([two], [two], [one])
    lease.release()
    for replica in replicas:
        replica.runtime.facts.context = lambda **given: context()  # type: ignore[union-attr, method-assign]
    told = ask("prefetch", keys=(two, three))
    assert sorted(told["fetched"]) == sorted([two, three])
    assert (told["already_there"], told["not_fetched"]) == ([], [])
    assert ask("unpin", keys=(one, three))["unpinned"] == [one, three]
    assert ask("evict", keys=(three,))["evicted"] == [three]
    assert ask("verify")["damaged_removed"] == {"memory": [], "disk": []}
    assert [len(store.keys()) for store in (first, second)] == [2, 2]
    assert len(ask("stats")["replicas"]) == 2
    left = {key.digest for one in replicas for key in one.folder.keys()}  # noqa: SIM118
    trimmed = ask("evict", max_bytes=0)["trimmed"]["disk"]
    assert set(trimmed) == left - {key.digest for one in replicas for key in one.folder.pins()}
    for replica in replicas:
        replica.close()


class Rank(RankGroup):
    """One of two ranks; both exchange what they vote."""

    barrier = threading.Barrier(2)
    votes: list[Any] = [None, None]  # noqa: RUF012

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.size, self.rank = 2, rank

    def _exchange(self, vote: Any) -> Any:
        self.votes[self.rank] = vote
        self.barrier.wait(30)
        seen = list(self.votes)
        self.barrier.wait(30)
        return seen


def test_every_rank_does_it_to_its_own_shard_of_the_same_chunks(tmp_path: Path) -> None:
    ranks = [Process(tmp_path / "kv", Rank(number)) for number in range(2)]
    one, two, _ = ranks[0].digests
    assert not set(ranks[0].digests) & set(ranks[1].digests)

    def on_both(action: str, **fields: Any) -> list[dict[str, Any]]:
        order = CacheOrder(action=action, ticket=f"{action}{time.monotonic_ns()}", **fields)

        def ask(process: Process) -> dict[str, Any]:
            deadline = time.monotonic() + 30
            while not (answer := process.desk.take(order))["done"]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return answer

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(ask, ranks))

    answers = on_both("pin", keys=(one, two))
    assert [answer["result"]["pinned"] for answer in answers] == [
        rank.digests[:2] for rank in ranks
    ]
    on_both("evict", keys=(one,), tier="memory")
    on_both("unpin", keys=(one,))
    on_both("evict", keys=(one,))
    for rank in ranks:
        pinned = {info.key.digest: info.pinned for info in rank.runtime.store.ls()}
        assert pinned == {rank.digests[1]: True, rank.digests[2]: False}
    errors = on_both("pin", keys=("00",))
    assert [answer["status"] for answer in errors] == [404, 404]
    for rank in ranks:
        rank.close()


def test_many_orders_at_once_are_refused_and_every_answer_is_kept(process: Process) -> None:
    gate, size_of = threading.Event(), process.folder.size_of

    def slow(key: ChunkKey) -> int:
        gate.wait(30)
        return size_of(key)

    process.folder.size_of = slow  # type: ignore[method-assign]
    orders = [CacheOrder(action="stats", ticket=str(number)) for number in range(20)]
    answers = [process.desk.take(order) for order in orders]
    refused = [answer for answer in answers if answer["done"]]
    assert [answer["status"] for answer in refused] == [503] * 4
    gate.set()
    deadline = time.monotonic() + 60
    while not all(answer["done"] for answer in answers):
        assert time.monotonic() < deadline
        answers = [process.desk.take(order) for order in orders]
    assert sum("result" in answer for answer in answers) == 16


def test_metrics_of_memory_are_counted_once(process: Process) -> None:
    runtime, one = process.runtime, process.records[0]
    for _ in range(2):
        lease = runtime.store.acquire(one.key, one.token_ids)
        assert lease is not None
        lease.release()
        runtime.metrics.show_store(runtime.store.stats())
        runtime.metrics.show_store(runtime.store.stats())
    assert runtime.store.acquire(ChunkKey.of(process.context, [9]), [9]) is None
    runtime.metrics.show_store(runtime.store.stats())
    counts = runtime.metrics.to_json()
    assert (counts["memory.hit"], counts["memory.miss"], counts["memory.stored"]) == (2, 1, 3)
    assert counts["store_chunks"] == 3
    assert counts["store_bytes"] == sum(record.num_bytes for record in process.records)

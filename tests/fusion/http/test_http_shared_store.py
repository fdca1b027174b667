"""Two real servers with one folder and one Valkey server below them; at last one of the two is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from fusion_helpers import PREFIX, PREFIX_IDS, lay_out, tokens
from valkey_server import Server

from chunk_cache import StoreFolder
from chunk_cache.tiers.remote.connect import connect_remote
from rag_pipeline.protocol import FusionRequest, build_requests
from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHUNK = 200
BUDGET = 1 << 28
POLICY = "epic:0.3"
ROUNDING = 1e-3
"""Of fp32 KV and log-probabilities that were computed in batches of other shapes."""


class World(NamedTuple):
    """The servers, and what they share."""

    one: Any
    other: Any
    pid: int
    """Of the first server, whose process leads a group with its children."""
    path: Path
    valkey: Server

    @property
    def servers(self) -> tuple[Any, Any]:
        return self.one, self.other


@pytest.fixture(scope="module")
def world(
    model: Path, sglang_process: Any, client_of: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    place = tmp_path_factory.mktemp("shared-store")
    valkey = Server(place)
    config = FusionConfig(
        background=False, store_dir=str(place / "kv"), store_dir_bytes=BUDGET, remote=valkey.url
    )

    with ExitStack() as stack:
        stack.callback(valkey.kill)

        def start(name: str) -> tuple[str, int]:
            variables = {FUSION_VARIABLE: config.to_env()}
            server = sglang_process(
                model,
                place / f"{name}.txt",
                variables,
                dtype="float32",
                max_total_tokens=4096,
                random_seed=1,
                sleep_on_idle=True,
            )
            found: tuple[str, int] = stack.enter_context(server)
            return found

        with ThreadPoolExecutor(2) as pool:
            (one, pid), (other, _) = pool.map(start, ("one", "other"))
        yield World(client_of({"url": one}), client_of({"url": other}), pid, place / "kv", valkey)


def build(client: Any, chunk: list[int], **fields: Any) -> None:
    for fusion in build_requests(PREFIX, len(chunk)):
        client.generate([*PREFIX_IDS, *chunk], fusion, **fields)


def settle(client: Any) -> dict[str, int]:
    """Wait until nothing waits to be written; the server's counts."""
    deadline = time.monotonic() + 60
    while (state := client.state())["pending"]:
        assert time.monotonic() < deadline, state
        time.sleep(0.05)
    counts: dict[str, int] = state["counts"]
    return counts


def ask(client: Any, chunks: list[list[int]], **fields: Any) -> tuple[Any, dict[str, Any]]:
    """Ask about chunks in another order than that of their making; tokens and log-probabilities, and the report."""
    ids, edges = lay_out([*chunks[1:], chunks[0]], tokens(9, 2))
    spans = tuple(zip(edges[::2], edges[1::2], strict=True))
    client.flush()
    fusion = FusionRequest(spans=spans, prefix_len=PREFIX, policy=POLICY)
    meta = client.generate(ids, fusion, **fields)["meta_info"]
    answer = [(token, value) for value, token, *_ in meta["output_token_logprobs"]]
    return answer, meta["rag_fusion"]


def seen(answer: tuple[Any, dict[str, Any]]) -> tuple[Any, ...]:
    tokens_, report = answer
    kinds = ("reused_tokens", "recomputed_tokens", "fallback")
    return (tokens_, *(report[kind] for kind in kinds))


@pytest.mark.parametrize("tier", ["disk", "remote"])
def test_a_chunk_that_one_computed_is_reused_by_the_other_and_by_no_other_tenant(
    tier: str, world: World
) -> None:
    seed = {"disk": 50, "remote": 60}[tier]
    chunks = [tokens(CHUNK, seed + n) for n in range(3)]
    before, others = settle(world.one), settle(world.other)
    for chunk in chunks:
        build(world.one, chunk)
    counts = settle(world.one)
    for name in ("disk", "remote"):
        written = f"{name}.written"
        assert counts[written] - before.get(written, 0) == 2 * len(chunks)
    if tier == "remote":
        folder = StoreFolder(world.path, byte_budget=BUDGET)
        assert all(folder.remove(key) for key in folder.keys())  # noqa: SIM118
    first = ask(world.one, chunks)
    assert first[1]["reused_tokens"] + first[1]["recomputed_tokens"] == len(chunks) * CHUNK
    # Read as they were written, and used as whoever computed them uses them, bit for bit.
    assert seen(ask(world.other, chunks)) == seen(first)

    def fetched() -> int:
        counts = settle(world.other)
        assert counts.get(f"{tier}.damaged", 0) == 0
        return counts.get(f"{tier}.fetched", 0) - others.get(f"{tier}.fetched", 0)

    assert fetched() == len(chunks)
    # The same text of another tenant is computed anew, whoever asks.
    _, told = ask(world.other, chunks, cache_salt="somebody else")
    assert (told["reused_tokens"], told["fallback"]) == (0, "miss")
    assert fetched() == len(chunks)


def test_writers_of_one_key_leave_one_whole_record(world: World) -> None:
    chunks = [tokens(CHUNK, 70 + n) for n in range(4)]
    clients = world.servers

    def write(client: Any) -> None:
        for chunk in chunks:
            build(client, chunk)

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(write, clients))
    for client in clients:
        counts = settle(client)
        assert not any(n for kind, n in counts.items() if kind.endswith("write_failed"))
    store = StoreFolder(world.path, byte_budget=BUDGET)
    remote = connect_remote(world.valkey.url, byte_budget=BUDGET, model="m")
    assert store.verify() == []
    assert store.unfinished() == (0, 0)
    wanted = {tuple(chunk) for chunk in chunks}
    found = 0
    for key in store.keys():  # noqa: SIM118 - not a mapping
        one = store.read(key)
        assert one is not None
        if tuple(one.token_ids.tolist()) in wanted:
            other = remote.read(key)
            assert other is not None
            # Each is whole, by its checksums. Whose it is decides its rounding.
            torch.testing.assert_close(one.k, other.k, rtol=0, atol=ROUNDING)
            torch.testing.assert_close(one.v, other.v, rtol=0, atol=ROUNDING)
            found += 1
    assert found == 2 * len(chunks)
    answers = [ask(client, chunks) for client in clients]
    for said, report in answers:
        assert report["reused_tokens"] + report["recomputed_tokens"] == len(chunks) * CHUNK
        assert [token for token, _ in said] == [token for token, _ in answers[0][0]]
        values, others = ([value for _, value in one] for one in (said, answers[0][0]))
        assert values == pytest.approx(others, abs=ROUNDING)


def test_a_server_that_is_killed_while_it_writes_takes_nobody_along(world: World) -> None:
    """The last test: it ends the first server."""
    chunks = [tokens(CHUNK, 90 + n) for n in range(30)]
    remote = connect_remote(world.valkey.url, byte_budget=BUDGET, model="m")
    done: list[int] = []

    def written() -> tuple[int, int]:
        return len(list(world.path.rglob("*.safetensors"))), len(list(remote.keys()))

    before = written()

    def write() -> None:
        for number, chunk in enumerate(chunks):
            build(world.one, chunk)
            done.append(number)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        deadline = time.monotonic() + 60
        while any(now < then + 5 for now, then in zip(written(), before, strict=True)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.killpg(world.pid, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            writing.result()
    assert len(done) < len(chunks)
    half = chunks[len(done)]
    # What was stored whole is used; what was not is a miss, and served as usual.
    _, told = ask(world.other, chunks[:3])
    assert told["fallback"] == ""
    assert told["reused_tokens"] > 0
    world.other.generate([*PREFIX_IDS, *half, *tokens(9, 3)], FusionRequest(mode="off"))
    build(world.other, half)
    counts = settle(world.other)
    for tier in ("disk", "remote"):
        assert counts.get(f"{tier}.damaged", 0) == 0
        assert counts.get(f"{tier}.write_failed", 0) == 0
    _, told = ask(world.other, [half, chunks[0]])
    assert told["reused_tokens"] + told["recomputed_tokens"] == 2 * CHUNK
    store = StoreFolder.connect(str(world.path), byte_budget=BUDGET, model="")
    assert store.verify() == []
    assert store.unfinished() == (0, 0)

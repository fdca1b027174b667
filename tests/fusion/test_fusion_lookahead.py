"""The waiting queue of an engine as a hint: what waiting requests need stays in memory, and is fetched ahead."""

from __future__ import annotations

import contextlib

import pytest
from fusion_helpers import CHUNKS, PREFIX, PREFIX_IDS, attribute, lay_out, report, tokens

from chunk_cache import ChunkState, MemoryStore
from chunk_cache.eviction import create_eviction
from tests.fusion.test_fusion_tiers import opened

MORE = [tokens(40, 50 + n) for n in range(8)]
"""Chunks that nobody waits for."""


class Small:
    """An engine whose memory holds a few chunks, with three of them in a folder below."""

    def __init__(self, below):
        self.below, self.local, self.runtime = below, below.local, below.runtime

    def key(self, chunk):
        (key,) = [k for k in self.below.keys if k in self.keys_of(chunk)]
        return key

    def keys_of(self, chunk):
        state = self.waiting(chunk).rag_fusion
        return [candidate.key for row in state.wanted for candidate in row]

    def waiting(self, chunk):
        ids, spans = lay_out([chunk], tokens(9, 3))
        fusion = {"spans": spans, "policy": "epic:0.3", "prefix_len": PREFIX, "passage": False}
        return self.local.submit(ids, 2, fusion=fusion)

    def building(self, chunk):
        fusion = {"mode": "build", "spans": [PREFIX, PREFIX + len(chunk)]}
        return self.local.submit(PREFIX_IDS + chunk, 1, fusion=fusion)

    def states(self):
        return [self.runtime.store.state(key) for key in self.below.keys]


@contextlib.contextmanager
def small_engine(engine, monkeypatch, folder, eviction, room):
    local = engine("llama")
    budget = int(room * 40 * local.runtime.record_form.token_bytes)
    policy = create_eviction(eviction, memory_bytes=budget, disk_bytes=10 * budget)
    monkeypatch.setattr(local.runtime, "store", MemoryStore(budget, eviction=policy))
    with (
        opened(local, monkeypatch, "disk", folder) as below,
        # One request runs at a time.
        attribute(
            local.scheduler, "get_num_allocatable_reqs", lambda running, *_, **__: 1 - running
        ),
    ):
        yield Small(below)


@pytest.mark.parametrize(("eviction", "stays"), [("lru", False), ("lookahead", True)])
def test_what_a_waiting_request_needs_is_not_evicted(
    engine, monkeypatch, tmp_path, eviction, stays
):
    with small_engine(engine, monkeypatch, tmp_path / "kv", eviction, 4.5) as small:
        assert small.states() == [ChunkState.READY] * 3
        builds = [small.building(chunk) for chunk in MORE[:5]]
        reqs = [small.waiting(CHUNKS[0]), small.waiting(CHUNKS[2])]
        small.local.run(*builds)
        there = [small.runtime.store.state(key) is ChunkState.READY for key in small.below.keys]
        assert there[1] is False  # nobody waits for it
        assert (there[0], there[2]) == (stays, stays)
        small.local.run(*reqs)
        assert [report(req)["reused_tokens"] > 20 for req in reqs] == [True, True]
        assert small.below.counts("disk").get("opened", 0) == (0 if stays else 2)
        assert small.runtime.store.stats().evicted >= 4


def test_chunks_of_the_next_requests_are_fetched_ahead_within_the_window(
    engine, monkeypatch, tmp_path
):
    with small_engine(engine, monkeypatch, tmp_path / "kv", "lookahead", 3.5) as small:
        small.runtime.store.clear()
        before = small.below.counts("disk").get("opened", 0)
        first = small.building(MORE[0])
        reqs = [small.waiting(chunk) for chunk in CHUNKS[:3]]
        assert not any(req.rag_fusion.has_begun for req in reqs)
        small.local.step()
        # A job reads 1.5 chunks on average (one of three came before these): memory holds two of them.
        assert [req.rag_fusion.has_begun for req in reqs] == [True, True, False]
        assert small.below.counts("tiers")["fetched_ahead"] == 2
        small.local.run(first, *reqs)
        assert small.runtime.fetcher.drain(60)
        assert [report(req)["reused_tokens"] > 20 for req in reqs] == [True] * 3
        assert small.below.counts("disk")["opened"] >= before + 3


def test_other_policies_are_told_nothing(engine, monkeypatch, tmp_path):
    with small_engine(engine, monkeypatch, tmp_path / "kv", "lru", 4.5) as small:
        monkeypatch.setattr(
            small.runtime.store, "note_waiting", lambda jobs: pytest.fail("not asked for")
        )
        small.local.run(small.waiting(CHUNKS[0]))
        assert "fetched_ahead" not in small.below.counts("tiers")

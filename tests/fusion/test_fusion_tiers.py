"""A request's miss is looked for below memory: fetched while it is computed, from a real folder and from a slow tier."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest
from fusion_helpers import registered, report, tokens
from tier_below import FUSE, PROMPT, opened, outcome

from chunk_cache import TIERS, ChunkState, StoreFolder, Timeline
from rag_eval.slow_reader import SlowReader
from rag_pipeline.sglang_plugin.fusion.admission import fetching

LAYERS = 5


class SlowFolder(StoreFolder):
    """A folder whose records arrive layer by layer, as slowly as a test says."""

    name = "slow"
    header_s = layer_s = 0.0
    opens = threading.Event()

    def open(self, key, token_ids):
        time.sleep(self.header_s)
        record = super().open(key, token_ids)
        return None if record is None else SlowReader(record, self.wait_for_layer)

    def wait_for_layer(self, index):
        assert self.opens.wait(60)
        time.sleep(self.layer_s)


@pytest.fixture
def disk(engine, monkeypatch, tmp_path: Path):
    with opened(engine("llama"), monkeypatch, "disk", tmp_path / "kv") as below:
        yield below


@pytest.fixture
def slow(engine, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(SlowFolder, "opens", threading.Event())
    SlowFolder.opens.set()
    with (
        registered(TIERS, SlowFolder),
        opened(engine("llama"), monkeypatch, "slow", tmp_path / "kv") as below,
    ):
        yield below
        SlowFolder.opens.set()


def test_a_chunk_that_is_not_in_memory_is_used_from_the_folder_bit_for_bit(disk):
    disk.forget()
    req = disk.ask()
    assert outcome(req) == disk.usual
    assert disk.runtime.fetcher.drain(60)
    assert set(disk.runtime.store.keys()) == set(disk.keys)
    counts = disk.counts("disk")
    assert counts["hit"] == counts["opened"] == counts["fetched"] == 3
    assert counts["read_bytes"] > 0
    disk.local.flush()
    assert outcome(disk.ask()) == disk.usual  # from memory again
    assert disk.counts("disk")["fetched"] == 3


@pytest.mark.parametrize(("damaged", "at"), [(1, 40), (1, -5), (3, 40), (3, -5)])
def test_a_damaged_file_is_a_miss(disk, damaged, at):
    """Damage of a header is seen before the chunk is used; of the last layer, perhaps when the pass has begun."""
    disk.local.flush()
    plain = disk.local.ask(PROMPT, 4, fusion={"mode": "off"})
    disk.forget()
    for path in sorted(disk.folder.glob("*/*/*.safetensors"))[:damaged]:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    req = disk.ask()
    told = report(req)
    if damaged == 3 or not told["reused_tokens"]:
        assert damaged == 3 or at < 0
        assert told["reused_tokens"] == 0
        assert list(req.output_ids) == list(plain.output_ids)
        assert list(req.logprob.output_token_logprobs_val) == list(
            plain.logprob.output_token_logprobs_val
        )
    else:
        assert 0 < told["reused_tokens"] < disk.usual[2]
    assert disk.runtime.fetcher.drain(60)
    assert disk.counts("disk").get("fetched", 0) == 3 - damaged


def test_layers_load_while_earlier_ones_are_computed(slow):
    slow.forget()
    slow.runtime.timeline = timeline = Timeline()
    SlowFolder.layer_s = 0.05
    try:
        assert outcome(slow.ask()) == slow.usual
    finally:
        SlowFolder.layer_s = 0.0
    assert slow.runtime.fetcher.drain(60)
    loaded = [
        max(one.ended for one in timeline.intervals("load") if one.layer == layer)
        for layer in range(LAYERS)
    ]
    waits = {one.layer: one for one in timeline.intervals("wait")}
    computed = {one.layer: one for one in timeline.intervals("compute")}
    assert len(timeline.intervals("load")) == 3 * LAYERS
    for layer in range(LAYERS):
        assert waits[layer].ended >= loaded[layer]
    for layer in range(LAYERS - 1):
        # It waited for its own layer only: the last one was not there yet, and came while this one was computed.
        assert waits[layer].ended < loaded[-1]
        assert computed[layer].began < loaded[-1]
    assert timeline.text().count("\n") == LAYERS


@pytest.mark.parametrize("preloaded", [0, 4, 8])
def test_a_request_is_computed_when_so_many_layers_are_there(slow, monkeypatch, preloaded):
    slow.forget()
    config = dataclasses.replace(slow.runtime.config, preload_layers=preloaded)
    monkeypatch.setattr(slow.runtime, "config", config)
    slow.runtime.timeline = timeline = Timeline()
    SlowFolder.layer_s = 0.02
    try:
        assert outcome(slow.ask()) == slow.usual
    finally:
        SlowFolder.layer_s = 0.0
    first = min(one.began for one in timeline.intervals("wait"))
    there = sum(one.ended <= first for one in timeline.intervals("load"))
    assert there >= 3 * min(preloaded, LAYERS)
    if not preloaded:
        assert there < 3 * LAYERS


@pytest.mark.parametrize("late", ["header", "layers"])
def test_a_tier_that_hangs_costs_a_bounded_wait_and_serves_the_next_request(
    slow, monkeypatch, late
):
    plain = slow.local.ask(PROMPT, 4, fusion={"mode": "off"})
    slow.forget()
    monkeypatch.setattr(slow.runtime.fetcher, "_patience_s", 0.05)
    SlowFolder.opens.clear()
    if late == "header":
        monkeypatch.setattr(SlowFolder, "header_s", 3 * fetching.HEADER_WAIT_S)
    for _ in range(10):  # more often than faults that turn fusion off
        slow.local.flush()
        req = slow.ask()
        assert list(req.output_ids) == list(plain.output_ids)
        assert report(req)["reused_tokens"] == 0
        if late == "header":
            break
    assert slow.runtime.is_on
    SlowFolder.opens.set()
    assert slow.runtime.fetcher.drain(60)
    slow.local.flush()
    assert slow.ask() is not None
    assert set(slow.runtime.store.keys()) >= set(slow.keys)
    slow.local.flush()
    # The first of them may have been stored anew from a prefill, whose rounding differs.
    last = slow.ask()
    assert list(last.output_ids) == slow.usual[0]
    assert outcome(last)[2:] == slow.usual[2:]


def test_others_go_first_while_a_request_waits_for_its_layers(slow, monkeypatch):
    slow.forget()
    config = dataclasses.replace(slow.runtime.config, preload_layers=LAYERS)
    monkeypatch.setattr(slow.runtime, "config", config)
    SlowFolder.opens.clear()
    waiting = slow.local.submit(PROMPT, 4, fusion=FUSE)
    other = slow.local.ask(tokens(30, 77), 4)
    assert other.finished()
    assert not waiting.finished()
    assert slow.runtime.store.state(slow.keys[0]) is ChunkState.LOADING
    SlowFolder.opens.set()
    slow.local.run(waiting)
    assert outcome(waiting) == slow.usual


def test_new_weights_end_what_is_on_its_way(slow, monkeypatch):
    slow.forget()
    for name in ("facts", "in_update", "tree_is_old"):  # as they were, for who comes next
        monkeypatch.setattr(slow.runtime, name, getattr(slow.runtime, name))
    SlowFolder.opens.clear()
    req = slow.local.submit(PROMPT, 4, fusion=FUSE)
    assert slow.runtime.fetcher.wait(lambda: any(f.has_header for f in slow_fetches(req)), 60)
    slow.runtime.new_weights(in_update=False, tree_is_old=False)
    SlowFolder.opens.set()
    slow.local.run(req)
    assert slow.runtime.fetcher.drain(60)
    assert report(req)["reused_tokens"] == 0
    assert slow.counts().get("fetched", 0) == 0


def slow_fetches(req):
    return req.rag_fusion.fetches

"""Storage of somebody else's, run by the real engine: a KV layout, and a tier of one process's memory."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from fusion_helpers import registered, report, tokens
from shelf import Shelf
from tier_below import outcome

from chunk_cache import KV_LAYOUTS, TIERS, LayerKV
from chunk_cache.layouts.heads import HeadsLayout
from rag_pipeline.sglang_plugin.fusion.builds import persistence
from rag_pipeline.sglang_plugin.fusion.forward import fused_forward
from rag_pipeline.sglang_plugin.fusion.forward.loader import LoadItem

PREFIX, CHUNKS, QUESTION = tokens(20, 1), [tokens(40, 10 + i) for i in range(2)], tokens(9, 2)
PROMPT = [*PREFIX, *CHUNKS[1], *CHUNKS[0], *QUESTION]
FUSE = {"spans": [20, 60, 60, 100], "policy": "epic:0.3"}


def build(local):
    for chunk in CHUNKS:
        local.build(PREFIX, chunk)
    local.flush()


class SwappedLayout(HeadsLayout):
    """Values first, and the heads of both in reverse: nothing of it can be mistaken for the built-in layout."""

    name = "swapped"

    def gather(self, pool, num_layers, slots):
        keys, values = super().gather(pool, num_layers, slots)
        return values.flip(2), keys.flip(2)

    def unpack(self, source):
        return source.v.flip(1), source.k.flip(1)


def test_a_kv_layout(engine, monkeypatch):
    local = engine("llama")
    local.fresh()
    build(local)
    usual = outcome(local.ask(PROMPT, 4, fusion=FUSE))
    assert usual[2] > 0
    (first, *_) = local.runtime.store.keys()
    with local.runtime.store.borrow(first) as record:
        heads = record
    local.fresh()
    with registered(KV_LAYOUTS, SwappedLayout):
        facts = dataclasses.replace(local.runtime.facts, layout=SwappedLayout())
        monkeypatch.setattr(local.runtime, "facts", facts)
        build(local)
        with local.runtime.store.borrow(first) as record:
            assert record.layout == "swapped"
            assert torch.equal(record.k, heads.v.flip(2))
        assert outcome(local.ask(PROMPT, 4, fusion=FUSE)) == usual
        local.fresh()


class DictTier(Shelf):
    """A shelf that outlives the engine, by location, and keeps what its namespaces stand for."""

    name = "dict"
    places: ClassVar[dict[str, DictTier]] = {}

    def __init__(self):
        super().__init__()
        self.told = {}

    @classmethod
    def connect(cls, location, *, byte_budget, model):
        return cls.places.setdefault(location, cls())

    def put(self, record, *, context=None, tenant=None):
        if context is not None:
            self.told[context.namespace] = dataclasses.asdict(context) | {"tenant": tenant or ""}
        return super().put(record)

    def describe(self, namespace):
        return self.told.get(namespace)


@pytest.fixture
def with_tier(engine, monkeypatch):
    """An engine whose setting names the toy tier; opening it is what a start does."""
    local = engine("llama")
    local.fresh()
    runtime = local.runtime
    for name in ("tiers", "fetcher", "erased"):
        monkeypatch.setattr(runtime, name, getattr(runtime, name))
    monkeypatch.setattr(
        runtime, "epoch", 0
    )  # another test of this engine may have changed the weights
    with registered(TIERS, DictTier):
        chosen = dataclasses.replace(runtime.config, tier="dict", store_dir="memory:test")
        monkeypatch.setattr(runtime, "config", chosen)
        persistence.start_tiers(runtime, "no-model")
        yield local
        runtime.fetcher.close(5)
        runtime.tiers.close(5)
        DictTier.places.clear()
        local.fresh()


def test_a_tier(with_tier):
    local, runtime = with_tier, with_tier.runtime
    build(local)
    assert runtime.tiers.drain(10)
    tier = DictTier.places["memory:test"]
    assert set(tier.keys()) == set(runtime.store.keys())
    assert len(tier.records) == len(CHUNKS)
    usual = outcome(local.ask(PROMPT, 4, fusion=FUSE))
    # As the next engine finds it: nothing in memory, the tier as it was left.
    local.fresh()
    assert not runtime.store.keys()
    runtime.fetcher.close(5)
    runtime.tiers.close(5)
    persistence.start_tiers(runtime, "no-model")
    assert len(runtime.store.keys()) == len(CHUNKS)
    assert outcome(local.ask(PROMPT, 4, fusion=FUSE)) == usual


class SlowReader:
    """A record that arrives layer by layer, and whose connection breaks at one."""

    def __init__(self, record, broken_layer):
        self.record, self.broken_layer, self.read = record, broken_layer, []

    @property
    def layout(self):
        return self.record.layout

    def layer(self, index, start=0, end=None):
        self.read.append(index)
        if index == self.broken_layer:
            raise TimeoutError("the connection broke")
        found = self.record.layer(index, start, end)
        return LayerKV(found.k.clone(), found.v.clone())


@pytest.mark.parametrize("broken_layer", [None, 0, 3])
def test_a_reader_that_fails_costs_only_speed(engine, monkeypatch, broken_layer):
    local = engine("llama")
    local.fresh()
    build(local)
    plain = local.ask(PROMPT, 4, fusion={"mode": "off"})
    local.flush()
    usual = outcome(local.ask(PROMPT, 4, fusion=FUSE))
    local.flush()
    readers = []

    def item(**fields):
        readers.append(SlowReader(fields["record"], broken_layer))
        return LoadItem(**fields | {"record": readers[-1]})

    monkeypatch.setattr(fused_forward, "LoadItem", item)
    req = local.ask(PROMPT, 4, fusion=FUSE)
    assert readers
    if broken_layer is None:
        assert outcome(req) == usual
        assert all(reader.read == list(range(5)) for reader in readers)
    else:
        assert report(req)["fallback"] == "fused_pass_error"
        assert list(req.output_ids) == list(plain.output_ids)
    local.fresh()


def test_a_tier_whose_records_cannot_be_read_at_start_is_used_without_them(with_tier, monkeypatch):
    local, runtime = with_tier, with_tier.runtime
    build(local)
    assert runtime.tiers.drain(10)
    local.fresh()

    def refuse(*args, **kwargs):
        raise RuntimeError("no server")

    with monkeypatch.context() as patch:
        patch.setattr(DictTier, "read", refuse)
        patch.setattr(runtime, "tiers", None)
        persistence.start_tiers(runtime, "no-model")
        assert not len(runtime.store)
        (used,) = runtime.tiers.tiers.values()
        assert used.counts["failures"] > 0
        assert runtime.tiers.close(10)


@pytest.mark.parametrize("broken", ["connect", "keys", "describe"])
def test_a_tier_that_raises_at_start_is_not_used(with_tier, monkeypatch, caplog, broken):
    local, runtime = with_tier, with_tier.runtime
    build(local)
    assert runtime.tiers.drain(10)
    tiers = runtime.tiers
    local.fresh()

    def refuse(*args, **kwargs):
        raise RuntimeError("no server")

    with monkeypatch.context() as patch:
        patch.setattr(DictTier, broken, classmethod(refuse) if broken == "connect" else refuse)
        patch.setattr(runtime, "tiers", None)
        persistence.start_tiers(runtime, "no-model")
        assert runtime.tiers is None
    assert runtime.tiers is tiers
    (line,) = [r.getMessage() for r in caplog.records if "is not used" in r.getMessage()]
    assert "no server" in line
    assert "\n" not in line
    assert runtime.is_on

"""KV that was read back through a lossy codec: approximate everywhere, in the real scheduler."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fusion_helpers import CHUNK, CHUNKS, PREFIX, PREFIX_IDS, agree, report, tokens

from chunk_cache import ChunkKV, Match, codec_named, encode_layers
from rag_pipeline.sglang_plugin.fusion.admission import admit

PROMPT = [*PREFIX_IDS, *CHUNKS[0], *tokens(9, 3)]
SPANS = [PREFIX, PREFIX + CHUNK]


def through(record: ChunkKV, name: str) -> ChunkKV:
    used, encoded = encode_layers(record, name)
    layers = [codec_named(used).decode(parts, record.k.dtype) for parts in encoded]
    k, v = (torch.stack([layer[i] for layer in layers]) for i in range(2))
    return dataclasses.replace(record, k=k, v=v, codec=used)


@pytest.fixture
def stored(engine):
    """Return an engine that has one chunk behind its prefix, and a way to pass that record through a codec."""
    local = engine("llama")
    local.fresh()
    local.build(PREFIX_IDS, CHUNKS[0])
    (key,) = local.runtime.store.keys()

    def pass_through(codec):
        with local.runtime.store.borrow(key) as record:
            changed = through(record, codec)
        assert local.runtime.store.evict(key)
        assert local.runtime.store.put(changed)

    yield local, pass_through
    local.fresh()


def ask(local, policy):
    local.flush()
    return local.ask(PROMPT, 4, fusion={"spans": SPANS, "policy": policy})


def test_in_its_own_place_lossless_kv_is_exact_and_approximate_kv_is_recomputed(stored):
    local, pass_through = stored
    assert report(ask(local, "epic:1.0"))["recomputed_tokens"] == 0
    pass_through("plain")
    assert report(ask(local, "epic:1.0"))["recomputed_tokens"] == 0
    for codec in ("kivi8", "kivi4"):
        pass_through(codec)
        assert report(ask(local, "epic:1.0"))["recomputed_tokens"] == CHUNK


def test_recomputed_whole_it_answers_as_full_prefill_does(stored):
    local, pass_through = stored
    pass_through("kivi4")
    fused = ask(local, "epic:1.0")
    local.flush()
    agree(fused, local.ask(PROMPT, 4, fusion={"mode": "off"}))


def test_the_radix_tree_never_holds_it(stored):
    local, pass_through = stored
    local.flush()
    usual = local.ask(PROMPT, 4, fusion={"mode": "off"})
    pass_through("kivi4")
    fused = ask(local, "reuse")
    assert report(fused)["reused_tokens"] == CHUNK
    after = local.ask(PROMPT, 4, fusion={"mode": "off"})
    assert after.cached_tokens <= PREFIX
    agree(after, usual)


def test_ranks_drop_a_run_that_only_one_of_them_has_exactly(stored):
    local, pass_through = stored

    def offered():
        prompt = torch.tensor(PROMPT).numpy()
        (key,) = local.runtime.store.keys()
        match = Match(PREFIX, PREFIX + CHUNK, key, 0)
        prefix = local.runtime.prefix(prompt, PREFIX, admit.RadixNamespace(None, None))
        (span,) = admit.lease_matches(local.runtime, prompt, prefix, [match])
        span.lease.release()
        return span.is_exact, admit._run_of(span, prefix)

    exact, run = offered()
    assert exact
    pass_through("kivi8")
    approximate, other = offered()
    assert not approximate
    assert run != other

"""Batches that hold a request beside which nothing can be fused, and batches that fusion gave up: both are ordinary."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fusion_helpers import (
    CHUNK,
    CHUNKS,
    PREFIX,
    PREFIX_IDS,
    agree,
    chunk_limit,
    enter_prefix,
    lay_out,
    report,
    store_chunks,
    tokens,
)

ORDER = CHUNKS[::-1]
OTHER = tokens(30, 40)


IDS, SPANS = lay_out(ORDER, tokens(9, 3))


def fused(local, policy="query:0.6", ids=IDS, spans=SPANS):
    return local.submit(ids, 4, fusion={"spans": spans, "policy": policy})


def ready(local):
    """Chunks stored, the prefix in the tree, and what plain prefill answers."""
    store_chunks(local, CHUNKS)
    plain = local.ask(IDS, 4, fusion={"mode": "off"})
    local.flush()
    enter_prefix(local)
    local.runtime.metrics.counts.clear()
    return plain


@pytest.fixture
def row_counts(monkeypatch):
    """Rows of every forward pass of a prompt, probing passes included."""

    def watch(local):
        runner = local.scheduler.tp_worker.model_runner
        original, seen = runner._forward_raw, []

        def noted(batch, *args, **kwargs):
            if batch.forward_mode.is_extend():
                seen.append(int(batch.input_ids.numel()))
            return original(batch, *args, **kwargs)

        monkeypatch.setattr(runner, "_forward_raw", noted)
        return seen

    return watch


ALONE = {
    "lora": {"lora_id": "an adapter"},
    "hidden_states": {"return_hidden_states": True},
    "multi_item_scoring": {"multi_item_delimiter_indices": [3, 9]},
    "routed_experts": {"return_routed_experts": True},
}


@pytest.mark.parametrize("reason", ALONE)
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_batch_with_a_request_that_cannot_stand_beside_fused_ones_is_ordinary(
    engine, reason, first
):
    local = engine("llama")
    plain = ready(local)
    req = fused(local)
    alone = local.submit(OTHER, 4, return_logprob=False)
    for name, value in ALONE[reason].items():
        setattr(alone, name, value)
    if first:
        local.scheduler.waiting_queue.reverse()
    assert local.step().batch_size() == 2
    local.run(req, alone)
    agree(req, plain)
    assert report(req)["fallback"] == f"beside_{reason}"
    assert report(req)["reused_tokens"] == 0
    assert local.runtime.metrics.counts[f"fallbacks.beside_{reason}"] == 1
    local.settle()
    local.runtime.store.check_integrity(expect_idle=True)
    # The next batch is fused again.
    local.flush()
    again = fused(local)
    local.run(again)
    assert report(again)["reused_tokens"] > 0


@pytest.mark.parametrize("guarded", [True, False], ids=["admission", "last moment"])
def test_hidden_states_are_those_of_the_request_that_asked(engine, monkeypatch, guarded):
    from rag_pipeline.sglang_plugin.fusion.admission import prefill_adder as batching

    local = engine("llama")
    ready(local)
    wanted = local.ask(OTHER, 2, return_hidden_states=True).hidden_states
    local.flush()
    if not guarded:
        # Even if such a batch is put together by fused ones.
        monkeypatch.setattr(batching, "refuse_batch", lambda reqs: "")
    req = fused(local)
    asking = local.submit(OTHER, 2, return_hidden_states=True)
    assert local.step().batch_size() == 2
    local.run(req, asking)
    assert report(req)["fallback"] == "beside_hidden_states"
    assert len(asking.hidden_states[0]) == len(OTHER)
    got, right = torch.tensor(asking.hidden_states[0]), torch.tensor(wanted[0])
    torch.testing.assert_close(got, right, rtol=0, atol=5e-4)


def test_no_field_of_a_fused_batch_still_has_the_rows_of_the_whole_batch(engine, monkeypatch):
    from rag_pipeline.sglang_plugin.fusion.forward import fused_forward

    local = engine("llama")
    ready(local)
    original, made = fused_forward.make_view, []

    def noted(batch, rows, *args, **kwargs):
        made.append((batch, original(batch, rows, *args, **kwargs)))
        return made[-1][1]

    monkeypatch.setattr(fused_forward, "make_view", noted)
    reqs = [fused(local), local.submit(OTHER, 4, fusion={"mode": "off"})]
    local.run(*reqs)
    batch, view = made[0]
    whole, few = int(batch.input_ids.numel()), int(view.input_ids.numel())
    assert few < whole

    def size(value):
        if isinstance(value, torch.Tensor):
            return value.shape[0] if value.ndim else int(value)
        return len(value) if isinstance(value, list) else value

    fields = [field.name for field in dataclasses.fields(batch)]
    assert "positions" in [name for name in fields if size(getattr(batch, name)) == whole]
    kept = [name for name in fields if type(size(getattr(view, name))) is int]
    assert [name for name in kept if size(getattr(view, name)) == whole] == []


def test_a_newcomer_that_cannot_stand_beside_fused_pieces_waits_for_the_last_one(engine):
    local = engine("llama")
    plain = ready(local)
    with chunk_limit(local, 48):
        req = fused(local, "epic:0.4")
        assert local.step().reqs == [req]
        alone = local.submit(OTHER, 2, return_hidden_states=True)
        while not req.output_ids:
            batch = local.step()
            assert alone not in batch.reqs or req not in batch.reqs
        local.run(req, alone)
    assert (report(req)["fallback"], report(req)["reused_tokens"] > 0) == ("", True)
    assert len(alone.hidden_states[0]) == len(OTHER)
    assert plain.output_ids


def test_pieces_that_lost_their_batch_to_a_newcomer_are_rewritten(engine, monkeypatch, row_counts):
    from rag_pipeline.sglang_plugin.fusion.admission import prefill_adder as batching

    local = engine("llama")
    plain = ready(local)
    monkeypatch.setattr(batching, "refuse_batch", lambda reqs: "")
    with chunk_limit(local, 64):
        req = fused(local, "epic:0.4")
        local.step()
        alone = local.submit(OTHER, 2, return_hidden_states=True)
        seen = row_counts(local)
        local.run(req, alone)
    agree(req, plain)
    assert report(req)["fallback"] == "beside_hidden_states"
    assert len(alone.hidden_states[0]) == len(OTHER)
    assert max(seen) <= 64


def test_a_newcomer_is_judged_by_the_rows_that_the_batch_then_has(engine, row_counts):
    local = engine("llama")
    ready(local)
    with chunk_limit(local, 64):
        req = fused(local, "reuse")
        alone = local.submit(OTHER, 2, return_hidden_states=True)
        seen = row_counts(local)
        batch = local.step()
        # 170 rows of the one are no room for the other, though the fused pass has less than 20.
        assert batch.reqs == [req]
        local.run(req, alone)
    assert report(req)["reused_tokens"] == 4 * CHUNK
    assert max(seen) <= 64


@pytest.mark.parametrize(
    ("policy", "step"), [("reuse", "ensure"), ("query:0.3", "ensure"), ("epic:0.2", "late")]
)
@pytest.mark.parametrize("settings", [{}, {"page_size": 16}], ids=["page 1", "page 16"])
def test_a_batch_that_fusion_gave_up_keeps_the_chunk_limit(
    engine, monkeypatch, row_counts, policy, step, settings
):
    from rag_pipeline.sglang_plugin.fusion.forward import loader

    local = engine("llama", **settings)
    plain = ready(local)
    original, calls = loader.Loader.ensure, []

    def fails(self, layer_id, *args):
        calls.append(layer_id)
        if step == "ensure" or layer_id == 4:
            raise RuntimeError("injected")
        return original(self, layer_id, *args)

    monkeypatch.setattr(loader.Loader, "ensure", fails)
    limit = 64
    with chunk_limit(local, limit):
        req = fused(local, policy)
        neighbour = local.submit([*IDS[: PREFIX + 10], *OTHER], 4, fusion={"mode": "off"})
        seen = row_counts(local)
        local.run(req, neighbour)
    assert calls
    assert report(req)["fallback"] in ("fused_pass_error", "internal_error")
    assert max(seen) <= limit
    agree(req, plain)
    local.runtime.pass_succeeded()
    local.runtime._said.clear()
    local.flush()
    agree(neighbour, local.ask([*IDS[: PREFIX + 10], *OTHER], 4, fusion={"mode": "off"}))


def test_rows_saved_behind_a_piece_pay_for_none_in_front_of_it(engine, row_counts):
    local = engine("llama")
    ready(local)
    ids, spans = lay_out(ORDER, tokens(9, 3), prefix=PREFIX_IDS + tokens(150, 60))
    with chunk_limit(local, 64):
        req = local.submit(ids, 2, fusion={"spans": spans, "prefix_len": PREFIX, "policy": "reuse"})
        seen = row_counts(local)
        local.run(req)
    assert report(req)["reused_tokens"] == 4 * CHUNK
    assert max(seen) <= 64


@pytest.mark.parametrize(
    ("policy", "where"),
    [
        ("query:0.3", "behind"),
        ("query:0.3", "in front"),
        ("cacheblend:0.3", "in front"),
        ("query:0.15", "between"),
    ],
)
def test_a_cut_prompt_is_fused_only_where_that_costs_no_more_than_prefill(
    engine, row_counts, policy, where
):
    local = engine("llama")
    ready(local)
    fresh = tokens(150, 60)
    if where == "behind":
        ids, spans = lay_out(ORDER[:1], fresh, prefix=PREFIX_IDS + tokens(10, 61))
    elif where == "in front":
        ids, spans = lay_out(ORDER, tokens(9, 3), prefix=PREFIX_IDS + fresh)
    else:
        ids, spans = lay_out(ORDER[:1], fresh[:30], prefix=PREFIX_IDS)
        spans += [len(ids), len(ids) + CHUNK]
        # The question is computed with what it has chosen, in the last piece: once.
        ids = [*ids, *ORDER[1], *fresh[30:110]]
    local.flush()
    plain = local.ask(ids, 2, fusion={"mode": "off"})
    local.flush()
    with chunk_limit(local, 64):
        req = local.submit(ids, 2, fusion={"spans": spans, "prefix_len": PREFIX, "policy": policy})
        seen = row_counts(local)
        local.run(req)
    if where == "behind":
        # All 150 would be computed in pieces, and once more with what the question has chosen.
        assert report(req)["fallback"] == "no_savings"
        assert report(req)["reused_tokens"] + report(req)["recomputed_tokens"] == 0
        assert sum(seen) == len(ids)
        assert max(seen) <= 64
        agree(req, plain)
        local.runtime.store.check_integrity(expect_idle=True)
    else:
        assert report(req)["fallback"] == ""
        assert sum(seen) < len(ids)


def test_any_other_prefix_cache_turns_fusion_off_with_one_line(engine, monkeypatch):
    from sglang.srt.mem_cache.radix_cache import RadixCache
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from rag_pipeline.sglang_plugin.fusion.startup import build_runtime

    class WithAnotherDoor(UnifiedRadixCache):
        pass

    local = engine("llama")
    assert build_runtime(local.scheduler).is_on
    tree = local.scheduler.tree_cache
    for other in (RadixCache.create_simulated(), WithAnotherDoor.__new__(WithAnotherDoor)):
        monkeypatch.setattr(local.scheduler, "tree_cache", other)
        runtime = build_runtime(local.scheduler)
        assert not runtime.is_on
        assert f"prefix cache {type(other).__name__}" in runtime.off_reason
        assert "\n" not in runtime.off_reason
    monkeypatch.setattr(local.scheduler, "tree_cache", tree)

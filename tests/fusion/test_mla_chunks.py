"""Chunk KV of latent attention (MLA): what a record holds, what a load turns, and everything that stands on records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusion_helpers import (
    CHUNK,
    CHUNKS,
    PREFIX,
    PREFIX_IDS,
    agrees_with_oracle,
    enter_prefix,
    lay_out,
    report,
    store_chunks,
    tokens,
)
from latent_answers import YARN, reference
from memory_chats import BLOCKS, BUDGET, HISTORY, PROBES, QUESTION, Chat
from tier_below import opened, outcome

from rag_pipeline.sglang_plugin.fusion.self_check.check import run_self_check

LATENT, POSITION = 32, 8
IDS, SPANS = lay_out(CHUNKS[::-1], tokens(9, 2))
NAME = "deepseek-latents"


@pytest.fixture
def local(engine: Any, tiny_model: Any) -> Any:
    """Latents of queries, YaRN and experts at once."""
    tiny_model("deepseek_v2", NAME, q_lora_rank=24, rope_parameters=YARN)
    made = engine(NAME)
    assert made.runtime.is_on, made.runtime.off_reason
    return made


@pytest.fixture
def model(tiny_model: Any) -> Any:
    """The same by transformers, which caches latents and rotated position parts too."""
    folder = tiny_model("deepseek_v2", NAME, q_lora_rank=24, rope_parameters=YARN)
    return reference(folder)


def cached(model: Any, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Latent and position part of each layer by plain prefill, ``[tokens, size]``."""
    with torch.inference_mode():
        found = model(torch.tensor([ids]), use_cache=True).past_key_values
    return [(layer.keys[0, 0], layer.values[0, 0]) for layer in found.layers]


def turned(model: Any, parts: torch.Tensor, by: int) -> torch.Tensor:
    """Position parts, each neighbouring pair of numbers as one complex number, at other positions."""
    angles = by * model.model.rotary_emb.inv_freq.double()
    pairs = torch.view_as_complex(parts.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_the_self_check_passes(local: Any) -> None:
    assert max(run_self_check(local.runtime, local.scheduler).values()) < 1e-3


def test_a_record_holds_what_transformers_caches(local: Any, model: Any) -> None:
    local.build(PREFIX_IDS, CHUNKS[0])
    (key,) = local.runtime.store.keys()
    wanted = cached(model, [*PREFIX_IDS, *CHUNKS[0]])
    with local.runtime.store.borrow(key) as record:
        assert record.layout == "latent"
        assert tuple(record.k.shape) == (5, CHUNK, 1, POSITION)
        assert tuple(record.v.shape) == (5, CHUNK, 1, LATENT)
        for layer, (latents, parts) in enumerate(wanted):
            near = {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(record.k[layer, :, 0], parts[PREFIX:], **near)
            torch.testing.assert_close(record.v[layer, :, 0], latents[PREFIX:], **near)


def test_reused_latents_answer_as_transformers_does_over_them(local: Any, model: Any) -> None:
    """Latents as they are, position parts turned by the distance; the question is computed behind them."""
    from transformers import DynamicCache

    store_chunks(local, CHUNKS)
    req = local.ask(IDS, 1, fusion={"spans": SPANS, "policy": "reuse"}, top=20)
    assert report(req)["reused_tokens"] == 4 * CHUNK
    alone = [cached(model, [*PREFIX_IDS, *chunk]) for chunk in CHUNKS[::-1]]
    cache = DynamicCache()
    for layer in range(5):
        latents = [alone[0][layer][0][:PREFIX]]
        parts = [alone[0][layer][1][:PREFIX]]
        for place, chunk in enumerate(alone):
            latents.append(chunk[layer][0][PREFIX:])
            parts.append(turned(model, chunk[layer][1][PREFIX:], place * CHUNK).float())
        cache.update(torch.cat(latents)[None, None], torch.cat(parts)[None, None], layer)
    question = torch.tensor([IDS[SPANS[-1] :]])
    with torch.inference_mode():
        logits = model(question, past_key_values=cache).logits[0, -1]
        usual = model(torch.tensor([IDS])).logits[0, -1]
    agrees_with_oracle(req, logits.double().log_softmax(-1), 5e-4)
    # The test can tell: full prefill says something else.
    assert float((logits.log_softmax(-1) - usual.log_softmax(-1)).abs().max()) > 1e-2


def test_in_its_own_place_a_chunk_is_loaded_bit_for_bit(local: Any) -> None:
    ids = [*PREFIX_IDS, *CHUNKS[0], *tokens(9, 2)]
    pool = local.scheduler.tp_worker.model_runner.token_to_kv_pool

    def rows(**fusion: Any) -> torch.Tensor:
        req = local.submit(ids, 8, fusion=fusion)
        while not req.output_ids:
            local.step()
        runner = local.scheduler.tp_worker.model_runner
        slots = runner.req_to_token_pool.req_to_token[req.kv.req_pool_idx][: PREFIX + CHUNK].long()
        found = torch.stack([pool.get_key_buffer(layer)[slots] for layer in range(5)])
        local.run(req)
        return found

    local.build(PREFIX_IDS, CHUNKS[0])
    (key,) = local.runtime.store.keys()
    local.flush()
    loaded = rows(spans=[PREFIX, PREFIX + CHUNK], policy="query:0.15")
    with local.runtime.store.borrow(key) as record:
        assert torch.equal(loaded[:, PREFIX:, :, :LATENT], record.v)
        assert torch.equal(loaded[:, PREFIX:, :, LATENT:], record.k)


@pytest.mark.parametrize("policy", ["epic:0.3", "query:0.3", "cacheblend:0.6"])
def test_every_policy_recomputes_some_rows(local: Any, policy: str) -> None:
    store_chunks(local, CHUNKS)
    told = report(local.ask(IDS, fusion={"spans": SPANS, "policy": policy}))
    assert told["fallback"] == ""
    assert 0 < told["recomputed_tokens"] < 3 * CHUNK
    assert told["fresh_tokens"] >= 9


def test_latents_come_back_from_a_folder_bit_for_bit(
    local: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with opened(local, monkeypatch, "disk", tmp_path / "kv") as below:
        below.forget()
        assert outcome(below.ask()) == below.usual


def test_a_memory_above_the_history_gives_the_logits_of_full_prefill(local: Any) -> None:
    chat = Chat(local, budget=500)
    for block in BLOCKS:
        assert chat.step(block, PROBES[0])["stored"]
    told = chat.answer(QUESTION)
    assert report(told)["memory"]["loaded"] == len(HISTORY)
    local.flush()
    full = local.ask([*PREFIX_IDS, *HISTORY, *QUESTION], 4, fusion={"mode": "off"}, top=20)
    assert list(told.output_ids) == list(full.output_ids)
    for got, wanted in zip(
        told.logprob.output_top_logprobs_val, full.logprob.output_top_logprobs_val, strict=True
    ):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rule", ["epicache", "keydiff", "snapkv:window=8+kernel=3", "kvzip"])
def test_every_rule_makes_memories_of_latents(local: Any, rule: str) -> None:
    """All heads read one latent, so each layer keeps one set of tokens."""
    chat = Chat(local, rule=rule)
    for block in BLOCKS[:3]:
        assert chat.step(block, PROBES[0])["stored"]
    record = chat.record()
    assert record.layout == "latent"
    assert tuple(record.side["positions"].shape) == (5, 1, BUDGET)
    assert len({tuple(row.flatten().tolist()) for row in record.side["positions"]}) > 1
    assert report(chat.answer(QUESTION))["memory"]["missed"] == 0


def test_a_question_that_spans_two_memories_loads_the_best_of_both(local: Any) -> None:
    chats = []
    for probe in (tokens(11, 50), tokens(11, 51)):
        chat = Chat(local)
        for block in BLOCKS[:2]:
            assert chat.step(block, probe)["stored"]
        chats.append(chat)
    one, two = chats
    req = one.ask([*one.begin(), *QUESTION], {"load": one.load() + two.load()})
    assert report(req)["memory"] == {"loaded": BUDGET, "missed": 0, "stored": False}


def test_the_radix_tree_holds_none_of_it(local: Any) -> None:
    store_chunks(local, CHUNKS)
    enter_prefix(local)
    local.ask(IDS, fusion={"spans": SPANS, "policy": "query:0.15"})
    assert local.ask(IDS, fusion={"mode": "off"}).cached_tokens <= PREFIX + CHUNK

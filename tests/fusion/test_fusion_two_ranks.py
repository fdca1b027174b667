"""Tensor parallelism over two processes: the same rows on both, each with its own head shard."""

from __future__ import annotations

import pytest
from fusion_helpers import CHUNK, PREFIX, tokens
from memory_chats import QUESTION, Chat
from rank_programs import run_ranks


@pytest.mark.slow
def test_two_ranks_agree_with_each_other_and_with_one(engine, tiny_model, tmp_path, warm_start):
    prefix, question = tokens(PREFIX, 1), tokens(9, 2)
    chunks = [tokens(CHUNK, 10 + i) for i in range(3)]
    ids, spans = list(prefix), []
    for chunk in chunks[::-1]:
        spans += [len(ids), len(ids) + len(chunk)]
        ids += chunk
    ids += question
    policies = [{"mode": "off"}] + [
        {"spans": spans, "policy": policy}
        for policy in ("reuse", "full", "epic:0.3", "query:0.6", "cacheblend:0.9")
    ]
    case = {
        "model": str(tiny_model("llama")),
        "prefix": prefix,
        "chunks": chunks,
        "ids": ids,
        "policies": policies,
        "store_dir": str(tmp_path / "kv"),
    }
    seen = run_ranks("two_ranks.py", case, tmp_path, warm_start)
    assert seen[0]["on"]
    assert seen[1]["on"]
    assert seen[0]["shard"][2] == 1  # one of two KV heads each
    for one, two in zip(seen[0]["runs"], seen[1]["runs"], strict=True):
        assert one == two
    local = engine("llama")
    for chunk in chunks:
        local.build(prefix, chunk)
    for fusion, run in zip(policies, seen[0]["runs"], strict=False):
        local.flush()
        req = local.ask(ids, 4, fusion=fusion)
        mine = (req.customized_info or {}).get("rag_fusion", [None])[0]
        if mine is not None:
            # SGLang pads the MLP for the ranks, which changes the share of QKV in a layer's work a little.
            share = mine.pop("computed_fraction")
            assert run["report"].pop("computed_fraction") == pytest.approx(share, abs=0.01)
        assert run["report"] == mine
        assert run["ids"] == list(req.output_ids)
        pairs = zip(run["logprobs"], req.logprob.output_token_logprobs_val, strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-3
    first, second, without, *faulty = seen[0]["runs"][len(policies) : -1]
    assert first["report"]["conversation_tokens"] == 0
    assert second["report"]["conversation_tokens"] == len(ids) + 3 - PREFIX
    # EPIC chooses alike with the turn and without it, and without it for rank 1 because rank 0 had lost it.
    assert without["report"]["conversation_tokens"] == 0
    assert without["ids"] == second["ids"]
    plain = seen[0]["runs"][0]
    reasons = ["fused_pass_error", "internal_error", "internal_error"]
    for run, reason in zip(faulty, reasons, strict=True):
        assert run["report"]["fallback"] == reason
        assert (run["ids"], run["logprobs"]) == (plain["ids"], plain["logprobs"])
    # The chunk that rank 1 had lost was missing on both.
    assert seen[0]["runs"][-1]["report"]["reused_tokens"] == 2 * CHUNK
    # A memory: each rank keeps what the whole model keeps in its heads, and what one lost is missing on both.
    mine, theirs = (one["memory"] for one in seen)
    assert mine["runs"] == theirs["runs"]
    local.fresh()
    chat = Chat(local)
    assert [step["stored"] for step in chat.build(3)] == mine["stored"] == theirs["stored"]
    kept = chat.record().side["positions"].tolist()
    for layer, heads in enumerate(kept):
        assert heads == [*mine["positions"][layer], *theirs["positions"][layer]]
    req = chat.answer(QUESTION)
    answer, window = mine["runs"]
    assert answer["report"]["memory"]["loaded"] == chat.slots
    assert answer["ids"] == list(req.output_ids)
    pairs = zip(answer["logprobs"], req.logprob.output_token_logprobs_val, strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-3
    assert (window["report"]["memory"]["loaded"], window["report"]["memory"]["missed"]) == (0, 1)
    # Each rank finds its own shards again: in memory after a restart, and in the folder for a request.
    built, after, fetched = seen[0]["tiers"]
    assert seen[1]["tiers"] == seen[0]["tiers"]
    assert len(list((tmp_path / "kv").rglob("*.safetensors"))) == 2 * len(chunks)
    assert (built["loaded"], after["loaded"], fetched["loaded"]) == (0, len(chunks), 0)
    assert (built["fetched"], after["fetched"], fetched["fetched"]) == (0, 0, len(chunks))
    for run in (built, after, fetched):
        assert run["report"]["reused_tokens"] == len(chunks) * CHUNK
        assert (run["ids"], run["logprobs"]) == (built["ids"], built["logprobs"])
    assert built["ids"] == seen[0]["runs"][1]["ids"]

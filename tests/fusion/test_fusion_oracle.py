"""Fused outputs against an independent forward pass written out in torch: no SGLang, no rag_kernels.

The oracle computes chunks behind the prefix, rotates their keys with its own table, overwrites the chosen rows layer
by layer with an explicit position mask, and adds the mean shift by its definition.
"""

from __future__ import annotations

import pytest
import torch
from fp64_oracle import Oracle
from fusion_helpers import (
    PREFIX,
    PREFIX_IDS,
    agrees_with_oracle,
    enter_prefix,
    lay_out,
    report,
    store_chunks,
    tokens,
)

from chunk_cache.policies import create_policy

UNEVEN = [tokens(30 + 3 * i, 10 + i) for i in range(4)]
"""Chunks of different lengths."""


def shifted(oracle, keys, values, rows, spans, strength):
    """The mean shift by its definition: un-rotated mean difference, damped, added to the other tokens."""

    def before(layer, k, v):
        if layer == 0:
            return
        for start, end in spans:
            inside = (rows >= start) & (rows < end)
            count = int(inside.sum())
            if count < 2:
                continue
            probes = rows[inside]
            weight = strength * count / (count + 4)
            dk = oracle.rope(k[inside] - keys[layer][probes], -probes).mean(0) * weight
            dv = (v[inside] - values[layer][probes]).mean(0) * weight
            others = torch.tensor([p for p in range(start, end) if p not in set(probes.tolist())])
            keys[layer][others] += oracle.rope(dk.expand(len(others), -1, -1), others)
            values[layer][others] += dv

    return before


def expect(oracle, policy, prefix, chunks, question):
    """Log-probabilities of the first token and the rows that the policy recomputed."""
    from chunk_cache.policies import AttentionSignal, DeviationSignal, ReuseLayout, ScoredPolicy

    ids = [*prefix, *(t for chunk in chunks for t in chunk), *question]
    spans, at = [], len(prefix)
    for chunk in chunks:
        spans.append((at, at + len(chunk)))
        at += len(chunk)
    keys, values = oracle.fused_kv(prefix, chunks, ids)
    behind = tuple(spans[1:])  # the first chunk stands in its own place: exact
    layout = ReuseLayout(
        num_layers=oracle.layers,
        prompt_len=len(ids),
        exact_len=spans[0][1],
        spans=behind,
        probes_restart=True,
        qkv_share=(4 + 2 * 2) * 16 / ((4 + 2 * 2) * 16 + 64 + 3 * 128),
    )
    asking = torch.arange(len(prefix) + sum(map(len, chunks)), len(ids))
    candidates = layout.reused_positions()
    signal = policy.signal(layout) if isinstance(policy, ScoredPolicy) else None
    if isinstance(signal, AttentionSignal):
        layers, mass = signal.layers, torch.zeros(len(ids)).double()

        def seen(layer, weights):
            if layer in layers:
                mass.add_(weights.mean((0, 1)))

        k, v = [t.clone() for t in keys], [t.clone() for t in values]
        drafted = signal.draft_tokens
        h = oracle.run(ids, asking, k, v, stop=None if drafted else layers.stop, seen=seen)
        if drafted:
            # The likeliest first token, and what stands behind its most attended occurrence in the chunks.
            first, inside = int(oracle.log_probs(h).argmax()), range(spans[0][0], spans[-1][1])
            near = {p: float(mass[max(0, p - 6) : p + 6].sum()) for p in inside if ids[p] == first}
            at = max(near, key=near.get, default=spans[-1][1])
            guess = [first, *ids[at + 1 : min(at + drafted, spans[-1][1])]]
            k = [torch.cat([t, more]) for t, more in zip(k, oracle.empty(len(guess)), strict=True)]
            v = [torch.cat([t, more]) for t, more in zip(v, oracle.empty(len(guess)), strict=True)]

            extra = torch.zeros(len(ids)).double()

            def look(layer, weights):
                if layer in layers:
                    extra.add_(weights.mean((0, 1))[: len(ids)])

            behind_prompt = torch.arange(len(ids), len(ids) + len(guess))
            oracle.run([*ids, *guess], behind_prompt, k, v, seen=look)
            scores = torch.stack([mass[candidates].float(), extra[candidates].float()])
        else:
            scores = mass[candidates].float()
        chosen = policy.choose(layout, scores, candidates)
    elif isinstance(signal, DeviationSignal):
        chosen = candidates
        for stage, layer in enumerate(signal.check_layers):
            current = torch.cat([chosen, asking])
            scores = {}

            def before(at_layer, k, v, layer=layer, current=current, chosen=chosen, scores=scores):
                if at_layer == layer:
                    keep = torch.isin(current, chosen)
                    dk = k[keep] - keys[layer][current[keep]]
                    dv = v[keep] - values[layer][current[keep]]
                    scores[layer] = (dk.square().sum((1, 2)) if "k" in signal.metric else 0) + (
                        dv.square().sum((1, 2)) if "v" in signal.metric else 0
                    )

            # Layers up to the check are computed for the rows still there; what dropped out stays fresh there.
            oracle.run(ids, current, keys, values, stop=layer + 1, before=before)
            score = scores[layer].float()
            chosen = policy.choose(layout, score, chosen, stage)
    else:
        chosen = policy.select(layout)
    rows = torch.cat([chosen, asking])
    before = (
        shifted(oracle, keys, values, rows, behind, policy.shift_strength(layout))
        if policy.shift_strength(layout)
        else None
    )
    return (
        oracle.log_probs(oracle.run(ids, rows, keys, values, before=before)),
        chosen,
        keys,
        values,
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("reuse", {}),
        ("epic:0.2", {}),
        ("query:0.6", {}),
        ("query:0.6", {"draft_tokens": 0}),
        ("query:0.3", {"draft_tokens": 2, "first_share": 0.0}),
        ("cacheblend:0.6", {}),
        ("adaptive:0.5", {}),
    ],
)
def test_fused_prefill_is_what_the_definition_says(engine, tiny_model, name, options):
    local = engine("llama")
    oracle = Oracle(tiny_model("llama"))
    prefix, chunks, question = PREFIX_IDS, UNEVEN, tokens(6, 2)
    store_chunks(local, chunks)
    policy = create_policy(name, None, **options)
    wanted, chosen, *_ = expect(oracle, policy, prefix, chunks, question)
    ids, spans = lay_out(chunks, question, prefix)
    local.flush()
    enter_prefix(local)  # as in the oracle
    fusion = {"spans": spans, "policy": name} | ({"options": options} if options else {})
    req = local.ask(ids, 1, fusion=fusion, top=20)
    got = report(req)
    assert got["recomputed_tokens"] == chosen.numel()
    assert name == "reuse" or 0 < chosen.numel() < sum(map(len, chunks[1:]))
    assert sum(
        got[k]
        for k in ("exact_prefix_tokens", "reused_tokens", "recomputed_tokens", "fresh_tokens")
    ) == len(ids)
    scored = local.runtime.metrics.counts["drafts.scored"]
    assert scored == (name.startswith("query") and options.get("draft_tokens") != 0)
    agrees_with_oracle(req, wanted)


@pytest.mark.parametrize("name", ["epic:0.2", "query:0.6", "cacheblend:0.6"])
def test_a_following_turn_attends_to_the_fused_kv_of_the_one_before(engine, tiny_model, name):
    local = engine("llama")
    oracle = Oracle(tiny_model("llama"))
    prefix, chunks, question = PREFIX_IDS, UNEVEN, tokens(6, 2)
    store_chunks(local, chunks)
    _, _, keys, values = expect(oracle, create_policy(name), prefix, chunks, question)
    ids, spans = lay_out(chunks, question, prefix)
    local.flush()
    enter_prefix(local)
    fusion = {"spans": spans, "policy": name, "conversation": "c"}
    first = local.ask(ids, 5, fusion=fusion)
    turn = [*ids, *first.output_ids, *tokens(7, 3)]
    # What the definition says: answer and new question computed over the first turn's keys and values.
    for kept, more in zip(keys, oracle.empty(len(turn) - len(ids)), strict=True):
        kept.data = torch.cat([kept, more])
    for kept, more in zip(values, oracle.empty(len(turn) - len(ids)), strict=True):
        kept.data = torch.cat([kept, more])
    rows = torch.arange(len(ids), len(turn))
    wanted = oracle.log_probs(oracle.run(turn, rows, keys, values))
    req = local.ask(turn, 1, fusion=fusion, top=20)
    got = report(req)
    assert got["conversation_tokens"] == len(ids) + 4 - PREFIX
    assert (got["recomputed_tokens"], got["fresh_tokens"]) == (0, 8)
    agrees_with_oracle(req, wanted)

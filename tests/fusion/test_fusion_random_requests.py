"""300 random requests through SGLang's real scheduler: what is called exact is, and nothing is left behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from fp64_oracle import Oracle
from fusion_world.recipes import LONG_DOCUMENTS, draw_request, draw_tenant

from rag_pipeline.sglang_plugin.fusion.runtime.runtime import get_runtime, set_runtime

REQUESTS, TOLERANCE = 300, 2e-3


@pytest.fixture
def local(engine):
    # Prompts of up to 260 tokens come in pieces; the pool holds about seven of them.
    return engine("llama", chunked_prefill_size=96, max_total_tokens=1800, max_running_requests=6)


def plain(oracle, ids):
    """Keys, values and the log-probabilities behind the last token, by plain prefill in fp64."""
    keys, values = oracle.empty(len(ids)), oracle.empty(len(ids))
    last = oracle.run(ids, torch.arange(len(ids)), keys, values)
    return keys, values, oracle.log_probs(last)


def found_in_tree(local, ids, tenant):
    """Slots that the radix tree holds for a prompt."""
    from array import array

    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    tree = local.scheduler.tree_cache
    key = RadixKey(array("q", ids), tenant.extra_key, cache_salt=tenant.cache_salt)
    found = tree.match_prefix(MatchPrefixParams(key=key))
    root = tree.root_node_handle(tenant.extra_key)
    path = tree.tree_core.collect_full_device_indices(found.last_device_node, root)
    return path[: found.device_prefix_len]


def must_be_exact(req, fusion):
    """Whether an answer may not differ from plain prefill: nothing was loaded, or all computed anew."""
    report = (req.customized_info or {}).get("rag_fusion", [None])[0]
    if report is None:
        return True
    parts = ("exact_prefix_tokens", "reused_tokens", "recomputed_tokens", "fresh_tokens")
    assert sum(report[part] for part in parts) == report["prompt_tokens"]
    if report["conversation_tokens"]:
        return False
    loaded = report["reused_tokens"] + report["recomputed_tokens"]
    policy = (fusion or {}).get("policy", "")
    return not loaded or policy in ("full", "query:1.0")


def test_whatever_comes_in_whatever_order_exact_kv_stays_exact(local, tiny_model, monkeypatch):
    from sglang.srt.managers import scheduler as module
    from sglang.srt.managers.io_struct import AbortReq

    oracle, random_ = Oracle(tiny_model("llama")), random.Random(11)
    store, asked, exact, aborted = local.runtime.store, [], 0, set()
    while len(asked) < REQUESTS:
        wave = []
        for _ in range(random_.choice((1, 1, 2, 5, 9))):
            ids, fusion = draw_request(random_.choice, LONG_DOCUMENTS)
            tenant = draw_tenant(random_.choice)
            req = local.submit(
                ids,
                random_.choice((1, 3, 9)),
                fusion=fusion,
                top=20,
                extra_key=tenant.extra_key,
                cache_salt=tenant.cache_salt,
            )
            wave.append((req, ids, fusion, tenant))
        monkeypatch.setattr(module, "TEST_RETRACT", random_.random() < 0.2)
        for _ in range(random_.choice((0, 0, 2, 4))):
            local.step()
        if random_.random() < 0.3:
            gone = random_.choice(wave)[0]
            aborted.add(gone.rid)
            local.scheduler.abort_request(AbortReq(rid=gone.rid))
        local.settle()
        asked += wave
        disturb(local, random_)
        for req, ids, fusion, tenant in wave:
            held = found_in_tree(local, ids, tenant)
            if req.rid in aborted and not held.numel():
                continue
            keys, values, expected = plain(oracle, ids)
            pool = local.scheduler.tp_worker.model_runner.token_to_kv_pool
            for layer in range(oracle.layers):
                for buffer, wanted in (
                    (pool.get_key_buffer(layer), keys[layer]),
                    (pool.get_value_buffer(layer), values[layer]),
                ):
                    torch.testing.assert_close(
                        buffer[held].double(), wanted[: held.numel()], rtol=0, atol=TOLERANCE
                    )
            # A retracted request reports its last prefill; its first token came from the one before.
            if req.rid in aborted or req.retraction_count or not must_be_exact(req, fusion):
                continue
            exact += 1
            got = torch.tensor(req.logprob.output_top_logprobs_val[0]).double()
            at = torch.tensor(req.logprob.output_top_logprobs_idx[0])
            torch.testing.assert_close(got, expected[at], rtol=0, atol=TOLERANCE)
        store.check_integrity(expect_idle=True)
    counts = local.runtime.metrics.counts
    assert counts["requests.fused"] > 40
    assert counts["fallbacks.internal_error"] == counts["fallbacks.fused_pass_error"] == 0
    assert exact > 100
    assert any(req.retraction_count for req, *_ in asked)
    local.flush()  # fails if a slot or a lock were lost
    scheduler = local.scheduler
    assert sum(scheduler.tree_cache.total_size()) == 0
    # A build beside a request makes another batch, which rounds otherwise.
    local.runtime.missing.clear()
    off = [ids for _, ids, fusion, _ in asked if fusion == {"mode": "off"}]
    for ids in off[:20]:
        assert bits(local, ids, {"mode": "off"}) == without_fusion(local, ids)


def disturb(local, random_):
    """Between two waves, chunks and exact prefixes may go."""
    store = local.runtime.store
    if random_.random() < 0.3 and len(store):
        store.evict(random_.choice(sorted(store.keys(), key=lambda key: key.digest)))
    if random_.random() < 0.1:
        local.flush()


def bits(local, ids, fusion):
    """An answer with the bits of its log-probabilities, on an empty cache."""
    local.flush()
    req = local.ask(ids, 4, fusion=fusion, top=20)
    values = np.asarray(req.logprob.output_top_logprobs_val, dtype=np.float64)
    return list(req.output_ids), values.tobytes()


def without_fusion(local, ids):
    """The same with no runtime: as SGLang alone serves it."""
    runtime = get_runtime()
    set_runtime(None)
    try:
        return bits(local, ids, None)
    finally:
        set_runtime(runtime)

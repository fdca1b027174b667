"""What must be exact: ratio 1, a chunk in its own place, layer 0, and every request without spans."""

from __future__ import annotations

import pytest
import torch

VOCAB = 256
PREFIX = 20
CHUNK = 40


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (count,), generator=generator).tolist()


def lay_out(prefix, chunks, question):
    ids, spans = list(prefix), []
    for chunk in chunks:
        spans += [len(ids), len(ids) + len(chunk)]
        ids += chunk
    return ids + question, spans


def logprobs(req):
    return req.logprob.output_token_logprobs_val


def largest_difference(one, two):
    assert list(one.output_ids) == list(two.output_ids)
    return max(abs(a - b) for a, b in zip(logprobs(one), logprobs(two), strict=True))


def report(req):
    return req.customized_info["rag_fusion"][0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_ratio_one_equals_plain_prefill(engine, family):
    local = engine(family)
    assert local.runtime.is_on, local.runtime.off_reason
    prefix, question = tokens(PREFIX, 1), tokens(9, 2)
    chunks = [tokens(CHUNK, 10 + i) for i in range(4)]
    for chunk in chunks:
        local.build(prefix, chunk)
    ids, spans = lay_out(prefix, chunks[::-1], question)
    local.flush()
    plain = local.ask(ids, fusion={"mode": "off"})
    for policy in ("full", "epic:1.0", "query:1.0", "cacheblend:1.0"):
        local.flush()
        fused = local.ask(ids, fusion={"spans": spans, "policy": policy})
        assert report(fused)["recomputed_tokens"] == 4 * CHUNK
        assert largest_difference(plain, fused) < 2e-4

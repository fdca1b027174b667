"""An attention method of somebody else's in the real engine: plain prompts, fused ones, pieces and mixed batches.

The method reads the first block of keys and the last few. What it makes of a prompt is compared with a forward pass
written out in fp64, and nothing of it may be found as exact afterwards.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from fp64_oracle import Oracle
from fusion_helpers import (
    CHUNKS,
    PREFIX_IDS,
    QUESTION,
    SWAPPED,
    SWAPPED_SPANS,
    agrees_with_oracle,
    chunk_limit,
    enter_prefix,
    logprobs,
    report,
    store_chunks,
    tokens,
)

from rag_kernels import ATTENTION_METHODS, AttentionMethod, BlockMask, RequestBlocks
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.protocol.fields import parse_custom_params

BLOCK = 8


REPORTED = {"mode": "fuse"}
SPARSE, ALL = "edges:recent=2", "edges:recent=99"
POWER = "power:block=8+window=1+sink=0"
SALE = "sale:thresholds=inf+block_q=16+block_k=8+local_window=16+segment=16+min_tokens=16"


def may_read(rows, length, recent):
    """The pattern by its definition, bool ``[rows, length]``."""
    keys = torch.arange(length)[None]
    return ((rows[:, None] // BLOCK - keys // BLOCK) < recent) | (keys < BLOCK)


@dataclass(frozen=True, kw_only=True)
class EdgesConfig:
    recent: int = 2
    faulty: bool = False


class Edges(AttentionMethod):
    """Each row reads the first block and the last ones, its own counted."""

    name = "edges"
    config_type = EdgesConfig
    layers: list = []  # noqa: RUF012

    def prepare(self, plan, requests):
        made = [None] * len(plan.slots)
        for request in requests:
            blocks = torch.arange(-(-plan.slots[request].numel() // BLOCK))
            allowed = (blocks[:, None] - blocks[None] < self.config.recent) | (blocks[None] == 0)
            made[request] = RequestBlocks(allowed=allowed[None], query_block=BLOCK, key_block=BLOCK)
        return BlockMask(requests=tuple(made))

    def mask(self, layer, call, state):
        if self.config.faulty and layer == 3:
            raise RuntimeError("a fault of the method's own")
        self.layers.append(layer)
        return state


@pytest.fixture(autouse=True)
def _registered():
    ATTENTION_METHODS.register("edges", Edges)
    Edges.layers.clear()
    yield
    ATTENTION_METHODS.unregister("edges")


def differs(one, other):
    return max(abs(a - b) for a, b in zip(logprobs(one), logprobs(other), strict=True)) > 1e-3


def in_tree(local, ids):
    """Tokens of a prompt that a later request finds as exact."""
    return report(local.ask(ids, 1, fusion=REPORTED))["exact_prefix_tokens"]


# -- plain prompts ------------------------------------------------------------------------------


def test_a_plain_prompt_that_reads_everything_is_the_dense_one(engine):
    local = engine("llama")
    dense = local.ask(SWAPPED, 5, fusion=REPORTED)
    local.flush()
    req = local.ask(SWAPPED, 5, fusion={"attention": ALL})
    assert Edges.layers == [0, 1, 2, 3, 4]  # one pass; decoding is dense
    assert report(req)["attention"] == ALL
    assert "attention" not in report(dense)
    assert req.output_ids == dense.output_ids
    assert logprobs(req) == pytest.approx(logprobs(dense), abs=1e-4)


@pytest.mark.parametrize("piece", [-1, 32])
def test_a_sparse_plain_prompt_is_what_the_definition_says(engine, tiny_model, piece):
    local = engine("llama", chunked_prefill_size=piece)
    oracle = Oracle(tiny_model("llama"))
    rows = torch.arange(len(SWAPPED))
    reads = may_read(rows, len(SWAPPED), 2)
    wanted = oracle.log_probs(
        oracle.run(
            SWAPPED, rows, oracle.empty(len(SWAPPED)), oracle.empty(len(SWAPPED)), reads=reads
        )
    )
    req = local.ask(SWAPPED, 3, fusion={"attention": SPARSE}, top=20)
    agrees_with_oracle(req, wanted)
    assert len(Edges.layers) == 5 * (1 if piece < 0 else 4)
    assert report(req)["fresh_tokens"] == len(SWAPPED)
    assert report(req)["computed_fraction"] == 1.0
    assert in_tree(local, SWAPPED) == 0
    local.flush()
    assert differs(req, local.ask(SWAPPED, 3, fusion=REPORTED))


def test_only_what_was_exact_before_is_exact_afterwards(engine):
    local = engine("llama")
    dense = local.ask(SWAPPED, 3)
    local.flush()
    local.ask(SWAPPED[:64], 1)
    req = local.ask(SWAPPED, 3, fusion={"attention": SPARSE})
    assert report(req)["exact_prefix_tokens"] == 64
    assert differs(req, dense)
    after = local.ask(SWAPPED, 3, fusion=REPORTED)
    assert report(after)["exact_prefix_tokens"] == 64
    assert logprobs(after) == pytest.approx(logprobs(dense), abs=1e-4)
    assert in_tree(local, SWAPPED) == len(SWAPPED) - 1


def test_dense_by_name_is_dense_by_default(engine):
    local = engine("llama")
    default = local.ask(SWAPPED, 3, fusion=REPORTED)
    local.flush()
    named = local.ask(SWAPPED, 3, fusion={"attention": "dense"})
    assert (report(named), logprobs(named)) == (report(default), logprobs(default))
    assert in_tree(local, SWAPPED) == len(SWAPPED) - 1
    assert Edges.layers == []


# -- fused prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["reuse", "query:0.5", "cacheblend:0.5"])
def test_a_fused_prompt_that_reads_everything_is_the_dense_one_to_the_bit(stocked, policy):
    fuse = {"spans": SWAPPED_SPANS, "policy": policy}
    dense = stocked.ask(SWAPPED, 4, fusion=fuse)
    stocked.flush()
    req = stocked.ask(SWAPPED, 4, fusion=fuse | {"attention": ALL})
    assert (req.output_ids, logprobs(req)) == (dense.output_ids, logprobs(dense))
    assert report(req) == report(dense) | {"attention": ALL}
    assert Edges.layers


def test_a_sparse_fused_prompt_is_what_the_definition_says(stocked, tiny_model):
    oracle = Oracle(tiny_model("llama"))
    keys, values = oracle.fused_kv(PREFIX_IDS, [CHUNKS[1], CHUNKS[0]], SWAPPED)
    asking = torch.arange(len(SWAPPED) - len(QUESTION), len(SWAPPED))
    reads = may_read(asking, len(SWAPPED), 2)
    wanted = oracle.log_probs(oracle.run(SWAPPED, asking, keys, values, reads=reads))
    enter_prefix(stocked)
    fuse = {"spans": SWAPPED_SPANS, "policy": "reuse", "attention": SPARSE}
    req = stocked.ask(SWAPPED, 1, fusion=fuse, top=20)
    agrees_with_oracle(req, wanted)
    got = report(req)
    assert (got["reused_tokens"], got["fresh_tokens"]) == (80, 9)
    assert in_tree(stocked, SWAPPED) == len(PREFIX_IDS)


@pytest.mark.parametrize("policy", ["reuse", "epic:0.3", "query:0.3", "cacheblend:0.5"])
def test_a_sparse_fused_prompt_in_pieces_is_that_of_one_piece(stocked, policy):
    ids = [*SWAPPED, *tokens(40, 7)]
    fuse = {"spans": SWAPPED_SPANS, "policy": policy, "attention": SPARSE}
    whole = stocked.ask(ids, 3, fusion=fuse)
    stocked.flush()
    passes = len(Edges.layers)
    with chunk_limit(stocked, 48):
        req = stocked.ask(ids, 3, fusion=fuse)
    assert len(Edges.layers) > 2 * passes
    assert report(req)["attention"] == SPARSE
    assert report(req)["recomputed_tokens"] == report(whole)["recomputed_tokens"]
    assert logprobs(req) == pytest.approx(logprobs(whole), abs=1e-4)
    assert in_tree(stocked, ids) == 0


def test_where_loading_does_not_pay_the_rows_are_sparse_all_the_same(engine):
    local = engine("llama")
    ids = [*PREFIX_IDS, *tokens(10, 61), *CHUNKS[0], *tokens(150, 60)]
    alone = local.ask(ids, 2, fusion={"attention": SPARSE})
    local.build(PREFIX_IDS, CHUNKS[0])
    local.flush()
    fuse = {"spans": [30, 70], "prefix_len": 20, "policy": "query:0.3", "attention": SPARSE}
    with chunk_limit(local, 64):
        req = local.ask(ids, 2, fusion=fuse)
    assert (report(req)["fallback"], report(req)["attention"]) == ("no_savings", SPARSE)
    assert report(req)["fresh_tokens"] == len(ids)
    assert logprobs(req) == pytest.approx(logprobs(alone), abs=1e-4)
    assert in_tree(local, ids) == 0


def test_nothing_behind_sparse_rows_is_published_or_stored(engine):
    local = engine("llama")
    fuse = {"spans": [20, 60], "policy": "reuse"}
    ids = [*PREFIX_IDS, *CHUNKS[0], *QUESTION]
    req = local.ask(ids, 1, fusion=fuse | {"attention": SPARSE})
    assert report(req)["built_chunks"] == 0
    assert local.runtime.store.stats().chunks_now == 0
    assert in_tree(local, ids) == 0
    local.fresh()
    assert report(local.ask(ids, 1, fusion=fuse))["built_chunks"] == 1


def test_a_turn_is_kept_for_turns_of_the_same_method_only(stocked):
    fuse = {"spans": SWAPPED_SPANS, "policy": "reuse", "conversation": "c"}
    first = stocked.ask(SWAPPED, 4, fusion=fuse | {"attention": SPARSE})
    turn = [*SWAPPED, *first.output_ids, *tokens(6, 5)]
    for other in ({}, {"attention": "edges:recent=3"}):
        assert report(stocked.ask(turn, 1, fusion=fuse | other))["conversation_tokens"] == 0
    again = stocked.ask(turn, 1, fusion=fuse | {"attention": SPARSE})
    # The tree has the prefix by now: the first of the others is dense in front of what it loads.
    assert report(again)["conversation_tokens"] == len(SWAPPED) + 3 - len(PREFIX_IDS)


# -- sparse KV never passes for exact, whichever way it came in ------------------------------------


WAYS = {
    "plain": {},
    "pieces": {"limit": 32},
    "fused": {"fusion": {"spans": SWAPPED_SPANS, "policy": "reuse"}, "is_stocked": True},
    "chosen rows, in pieces": {
        "fusion": {"spans": SWAPPED_SPANS, "policy": "query:0.3"},
        "is_stocked": True,
        "limit": 48,
    },
    "conversation": {"fusion": {"mode": "fuse", "conversation": "c"}},
    "fused conversation": {
        "fusion": {"spans": SWAPPED_SPANS, "policy": "reuse", "conversation": "c"},
        "is_stocked": True,
    },
}
"""How a request of a method reaches the engine; what comes behind each of them is its decoded turn."""


@pytest.mark.parametrize("method", [POWER, SALE])
@pytest.mark.parametrize("way", WAYS)
def test_sparse_kv_never_passes_for_exact(engine, way, method):
    """A dense turn behind a sparse one, in the same conversation if there was one, is that of an engine without a past.

    No chunk is made of what the method computed. A turn of a conversation is kept, under the method's name.
    """
    local = engine("llama")
    how = WAYS[way]
    if how.get("is_stocked"):
        store_chunks(local, CHUNKS[:2])
    in_store = local.runtime.store.keys()
    fusion = how.get("fusion", {})
    limit = how.get("limit")
    with chunk_limit(local, limit) if limit else contextlib.nullcontext():
        first = local.ask(SWAPPED, 4, fusion=fusion | {"attention": method})
    assert report(first)["attention"] == method
    local.settle()
    if how.get("is_stocked") and "conversation" not in fusion:
        assert local.runtime.store.keys() == in_store
    turn = [*SWAPPED, *first.output_ids, *tokens(6, 5)]
    named = {key: fusion[key] for key in ("conversation",) if key in fusion}
    dense = local.ask(turn, 3, fusion=REPORTED | named)
    assert report(dense)["exact_prefix_tokens"] == 0
    assert report(dense)["conversation_tokens"] == 0
    local.fresh()
    alone = local.ask(turn, 3, fusion=REPORTED)
    assert dense.output_ids == alone.output_ids
    assert logprobs(dense) == pytest.approx(logprobs(alone), abs=1e-4)
    local.flush()
    # What was kept apart is another thing.
    assert differs(first, local.ask(SWAPPED, 4, fusion=REPORTED))


# -- batches and faults -------------------------------------------------------------------------


def test_requests_of_one_batch_do_not_feel_each_other(stocked):
    other = tokens(70, 30)
    asks = [
        (SWAPPED, {"attention": SPARSE}),
        (other, {"mode": "off"}),
        (SWAPPED[1:], {"attention": "edges:recent=4"}),
        ([*SWAPPED, 5], {"spans": SWAPPED_SPANS, "policy": "reuse", "attention": SPARSE}),
        ([*SWAPPED, 6], {"spans": SWAPPED_SPANS, "policy": "reuse"}),
    ]
    alone = []
    for ids, fusion in asks:
        stocked.flush()
        alone.append(stocked.ask(ids, 3, fusion=fusion))
    stocked.flush()
    Edges.layers.clear()
    reqs = [stocked.submit(ids, 3, fusion=fusion) for ids, fusion in asks]
    stocked.run(*reqs)
    assert Edges.layers == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # two methods, one pass
    for req, one in zip(reqs, alone, strict=True):
        assert logprobs(req) == pytest.approx(logprobs(one), abs=1e-4)
    assert in_tree(stocked, other) == len(other) - 1
    assert in_tree(stocked, SWAPPED) == len(PREFIX_IDS)  # of the last request, which is dense there


@pytest.mark.parametrize("piece", [-1, 32])
def test_a_fault_of_a_method_makes_the_prompt_dense(engine, piece):
    local = engine("llama", chunked_prefill_size=piece)
    dense = local.ask(SWAPPED, 4)
    local.flush()
    req = local.ask(SWAPPED, 4, fusion={"attention": "edges:faulty=true"})
    assert logprobs(req) == pytest.approx(logprobs(dense), abs=1e-4)
    assert report(req)["fallback"] == "fused_pass_error"
    assert "attention" not in report(req)


def test_where_nothing_may_be_approximated_the_prompt_is_dense(engine):
    local = engine("llama")
    dense = local.ask(SWAPPED, 2, logprob_start_len=0)
    local.flush()
    req = local.ask(SWAPPED, 2, logprob_start_len=0, fusion={"attention": SPARSE})
    assert logprobs(req) == logprobs(dense)
    assert report(req)["fallback"] == "input_logprobs"
    assert "attention" not in report(req)
    assert Edges.layers == []


def test_the_field_travels_in_both_carriers():
    request = FusionRequest(attention=SPARSE)
    assert parse_custom_params(request.to_custom_params(), 9) == request
    assert request.to_kv_hints()["actions"][0]["payload"]["attention"] == SPARSE
    assert "rag_attention" not in FusionRequest().to_custom_params()

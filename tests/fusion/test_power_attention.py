"""PowerAttention in the real engine: the blocks that tokens read in decoding, and how far information moves.

What the engine answers is compared with a forward pass written out in fp64. How information moves is tried by changing
a token: the last row must feel it if, and only if, the pattern has a path of as many hops as the model has layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from fp64_oracle import Oracle
from fusion_helpers import SWAPPED, SWAPPED_SPANS, chunk_limit, logprobs, report, tokens

from rag_kernels import ATTENTION_METHODS
from rag_kernels.sparse.static_blocks import StaticBlocks, StaticConfig
from rag_pipeline.sglang_plugin.cpu import attention_backend
from rag_pipeline.sglang_plugin.fusion.forward import model_forward

LAYERS = 5
BARE = "power:block=8+window=1+sink=0"
"""Powers of two alone: a distance takes as many layers as it has bits."""


def may_read(length, window, sink, block=8):
    """The pattern by its definition, bool ``[length, length]``; causality apart."""
    at = torch.arange(length) // block
    distance = at[:, None] - at[None]
    is_power = torch.zeros_like(distance, dtype=torch.bool)
    for power in range(12):
        is_power |= distance == 2**power
    return (distance < window) | is_power | (at[None] < sink)


def answers(oracle, prompt, output, reads):
    """Log-probabilities of an answer's tokens, row by row through the definition."""
    ids = [*prompt, *output]
    rows = torch.arange(len(ids))
    h = oracle.run(ids, rows, oracle.empty(len(ids)), oracle.empty(len(ids)), reads=reads)
    return [
        float(oracle.log_probs(h[: at + 1])[token])
        for at, token in enumerate(output, len(prompt) - 1)
    ]


@pytest.fixture
def keys_read(monkeypatch):
    """Keys of every decode batch that reads chosen positions, per planned layer group."""
    counts = []
    original = attention_backend.plan_kept_slots

    def counted(*args, **kwargs):
        plan = original(*args, **kwargs)
        counts.append(plan.keys_read)
        return plan

    monkeypatch.setattr(attention_backend, "plan_kept_slots", counted)
    return counts


# -- decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [-1, 48])
def test_prompt_and_answer_are_what_the_definition_says(engine, tiny_model, keys_read, piece):
    local = engine("llama", chunked_prefill_size=piece)
    prompt = tokens(141, 12)
    req = local.ask(prompt, 12, fusion={"attention": "power:block=8+window=2"})
    reads = may_read(len(prompt) + 12, 2, 1)
    want = answers(Oracle(tiny_model("llama")), prompt, req.output_ids, reads)
    assert logprobs(req) == pytest.approx(want, abs=2e-4)
    lengths = range(len(prompt) + 1, len(prompt) + 12)
    assert keys_read == [int(reads[n - 1, :n].sum()) for n in lengths]
    # Decoding that read everything would have answered otherwise.
    dense = reads.clone()
    dense[len(prompt) :] = True
    other = answers(Oracle(tiny_model("llama")), prompt, req.output_ids, dense)
    assert max(abs(a - b) for a, b in zip(want, other, strict=True)) > 1e-2


def test_dense_layers_decode_densely(engine, tiny_model, keys_read):
    local = engine("llama")
    prompt = tokens(141, 12)
    whole = f"power:block=8+window=1+sink=0+dense_period={LAYERS}+dense_layers={LAYERS}"
    dense = local.ask(prompt, 6, fusion={"mode": "fuse"})
    local.flush()
    req = local.ask(prompt, 6, fusion={"attention": whole})
    assert req.output_ids == dense.output_ids
    assert logprobs(req) == pytest.approx(logprobs(dense), abs=1e-4)
    assert keys_read == []
    local.flush()
    hybrid = local.ask(prompt, 6, fusion={"attention": f"{BARE}+dense_layers=2"})
    assert len(keys_read) == 5  # the sparse layers of a step share one plan
    assert logprobs(hybrid) != pytest.approx(logprobs(dense), abs=1e-3)


@pytest.mark.parametrize(
    "method", ["block_topk:block=8", "vertical_slash:block=8", "xattention:block=8"]
)
def test_methods_that_look_at_the_prompt_decode_densely(engine, keys_read, method):
    req = engine("llama").ask(tokens(141, 12), 3, fusion={"attention": method})
    assert report(req)["attention"] == method
    assert "fallback" not in report(req) or not report(req)["fallback"]
    assert keys_read == []


def test_requests_of_a_decode_batch_do_not_feel_each_other(stocked, keys_read):
    asks = [
        (tokens(141, 12), {"attention": BARE}),
        (tokens(100, 13), None),
        (tokens(100, 14), {"mode": "fuse"}),
        (tokens(160, 15), {"attention": "streaming:block=8+window=3"}),
        (tokens(120, 16), {"attention": f"{BARE}+dense_layers=2"}),
        (SWAPPED, {"spans": SWAPPED_SPANS, "policy": "query:0.3", "attention": BARE}),
    ]
    alone = []
    for ids, fusion in asks:
        stocked.flush()
        alone.append(stocked.ask(ids, 6, fusion=fusion))
    stocked.flush()
    keys_read.clear()
    reqs = [stocked.submit(ids, 6, fusion=fusion) for ids, fusion in asks]
    stocked.run(*reqs)
    assert len(keys_read) == 2 * 5  # with and without the hybrid's dense layers, each step
    for req, one in zip(reqs, alone, strict=True):
        assert req.output_ids == one.output_ids
        assert logprobs(req) == pytest.approx(logprobs(one), abs=1e-4)


def test_nothing_that_was_decoded_sparsely_is_published(engine):
    local = engine("llama")
    prompt = tokens(96, 12)
    local.ask(prompt[:64], 1)
    req = local.ask(prompt, 8, fusion={"attention": BARE})
    turn = [*prompt, *req.output_ids, *tokens(5, 3)]
    assert report(local.ask(turn, 1, fusion={"mode": "fuse"}))["exact_prefix_tokens"] == 64


# -- faults -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OddConfig(StaticConfig):
    answer: str = "raise"


class Odd(StaticBlocks):
    """Reads everything in the prompt, and says in decoding what no token can read."""

    name = "odd"
    config_type = OddConfig

    def keeps(self, row, key):
        return row >= key

    def decode_blocks(self, position):
        own = position // self.config.block
        if self.config.answer == "raise":
            raise RuntimeError("a fault of the method's own")
        wrong = {
            "none": [],
            "behind": [0, own + 1],
            "falling": [own, 0],
            "early": [0],
            "below": [-1, own],
        }
        return torch.tensor(wrong[self.config.answer], dtype=torch.int64)


@pytest.fixture
def odd():
    ATTENTION_METHODS.register("odd", Odd)
    yield
    ATTENTION_METHODS.unregister("odd")


@pytest.mark.usefixtures("odd")
@pytest.mark.parametrize("answer", ["raise", "none", "behind", "falling", "early", "below"])
def test_a_method_that_fails_in_decoding_decodes_densely(engine, keys_read, answer):
    local = engine("llama")
    prompt = tokens(90, 12)
    dense = local.ask(prompt, 5, fusion={"mode": "fuse"})
    local.flush()
    req = local.ask(prompt, 5, fusion={"attention": f"odd:block=8+answer={answer}"})
    assert req.output_ids == dense.output_ids
    assert logprobs(req) == pytest.approx(logprobs(dense), abs=1e-4)
    assert keys_read == []


def test_where_the_backend_gathers_nothing_decoding_is_dense(
    engine, keys_read, monkeypatch, caplog
):
    monkeypatch.setattr(attention_backend.RagCpuAttentionBackend, "gathers_positions", False)
    local = engine("llama")
    local.runtime._said.discard("decode")
    caplog.set_level("WARNING", logger=type(local.runtime).__module__)  # engines set another
    req = local.ask(tokens(90, 12), 4, fusion={"attention": BARE})
    assert report(req)["attention"] == BARE
    assert keys_read == []
    said = [r.message for r in caplog.records if "reads every key in decoding" in r.message]
    assert len(said) == 1


def test_without_a_method_a_decode_batch_is_not_touched(engine, monkeypatch):
    """The state that SGLang made is the one that it runs, and the slots are planned as ever."""
    seen = []
    original = model_forward.mark_reads

    def watched(runtime, batch, reqs, backend):
        before = batch.model_specific_states
        original(runtime, batch, reqs, backend)
        seen.append(batch.model_specific_states is before)

    monkeypatch.setattr(model_forward, "mark_reads", watched)
    local = engine("llama")
    local.ask(tokens(60, 12), 4)
    local.ask(tokens(61, 12), 4, fusion={"mode": "fuse"})
    local.ask(tokens(62, 12), 4, fusion={"attention": "dense"})
    assert seen == [True] * 9


# -- how far information moves (the receptive-field theorem) ------------------------------------


def feels(local, ids, at, fusion, new=1):
    """Whether each answered token's probabilities change, to the bit, with the token at a position."""
    changed = list(ids)
    changed[at] = ids[at] % 50 + 60
    answered = []
    for prompt in (ids, changed):
        local.flush()
        answered.append(logprobs(local.ask(prompt, new, fusion=fusion)))
    return [a != b for a, b in zip(*answered, strict=True)]


@pytest.mark.parametrize("piece", [-1, 100])
@pytest.mark.parametrize(
    ("method", "reached", "beyond"),
    [
        # distances in blocks from the last row: at most five bits, and six
        (BARE, [1, 5, 31, 47, 62, 64], [63]),
        ("streaming:block=8+window=2+sink=0", [1, 4, 5], [6, 7, 32, 64]),
        ("dilated:block=8+window=16", [2, 64], [1, 33, 63]),
        (f"{BARE}+dense_layers=1+dense_offset=3", [63], []),
    ],
)
def test_the_last_row_feels_a_token_if_and_only_if_it_is_reachable(
    engine, method, reached, beyond, piece
):
    local = engine("llama", chunked_prefill_size=-1)
    ids = tokens(65 * 8 + 3, 12)
    found = {}
    for distance in (*reached, *beyond):
        at = (65 - distance) * 8 + 4
        if piece < 0:
            found[distance] = feels(local, ids, at, {"attention": method})[0]
        else:
            with chunk_limit(local, piece):
                found[distance] = feels(local, ids, at, {"attention": method})[0]
    assert found == dict.fromkeys(reached, True) | dict.fromkeys(beyond, False)


def test_a_decoded_token_feels_what_its_own_blocks_reach(engine):
    """The first answered token comes from the last row of the prompt, the second from a new block."""
    local = engine("llama")
    ids = tokens(127 * 8, 12)  # the last row in block 126, the next token in block 127

    def felt(block):
        return feels(local, ids, block * 8 + 4, {"attention": BARE}, new=2)

    assert felt(1) == [False, False]  # 125 and 126 blocks before them: six bits each
    assert felt(63) == [False, True]  # 63 and 64
    assert felt(126) == [True, True]  # its own block, and the one before

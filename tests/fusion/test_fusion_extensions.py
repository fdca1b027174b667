"""Things of somebody else's at every seam, run by the real engine: policies, a signal, an attention kernel."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from fusion_helpers import (
    CHUNKS,
    SWAPPED,
    SWAPPED_SPANS,
    logprobs,
    registered,
    report,
)

from chunk_cache import TIERS
from chunk_cache.policies import (
    POLICIES,
    PassObserver,
    Policy,
    ScoredPolicy,
    Signal,
    top_positions,
)
from rag_kernels import ATTENTION_KERNELS, AttentionKernel
from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig
from rag_pipeline.sglang_plugin.fusion.conversation_memories import CONVERSATION_MEMORIES
from rag_pipeline.sglang_plugin.fusion.startup import build_runtime


@dataclass(frozen=True, kw_only=True)
class EveryNthConfig:
    step: int = 4


class EveryNthPolicy(Policy):
    """Recomputes every n-th reused token."""

    name = "every-nth"
    config_type = EveryNthConfig

    @property
    def ratio(self):
        return 1 / self.config.step

    def select(self, layout):
        return layout.reused_positions()[:: self.config.step]


def test_a_policy(stocked):
    with registered(POLICIES, EveryNthPolicy):
        some = stocked.ask(SWAPPED, 2, fusion={"spans": SWAPPED_SPANS, "policy": "every-nth"})
        stocked.flush()
        more = stocked.ask(
            SWAPPED,
            2,
            fusion={"spans": SWAPPED_SPANS, "policy": "every-nth", "options": {"step": 2}},
        )
    # The chunk at its own place is exact: only the moved one is up to a policy.
    assert (report(some)["policy"], report(some)["recomputed_tokens"]) == ("every-nth", 10)
    assert (report(more)["reused_tokens"], report(more)["recomputed_tokens"]) == (60, 20)
    stocked.flush()
    # Gone, it is no policy any more: the request is served as usual.
    assert stocked.ask(
        SWAPPED, 2, fusion={"spans": SWAPPED_SPANS, "policy": "every-nth"}
    ).output_ids


@dataclass(frozen=True)
class ValueNormSignal(Signal):
    """Norm of the loaded values at one layer, largest first or smallest first."""

    name = "value-norm"
    layer: int
    sign: int

    def cost(self, layout, kept):
        return layout.scoring_rows * (self.layer + layout.qkv_share)

    def choose(self, passes, requests):
        rows = [request.rows(request.fresh) for request in requests]
        slots = [request.kv_slots[request.candidates] for request in requests]
        observer = ValueNormObserver(self.layer, slots)
        passes.run(rows, observer)
        return [
            request.policy.choose(
                request.layout, self.sign * passes.total(norms).sqrt(), request.candidates
            )
            for request, norms in zip(requests, observer.norms, strict=True)
        ]


class ValueNormObserver(PassObserver):
    """Takes the squared norms, and ends the pass there."""

    def __init__(self, layer, slots):
        self.layer, self.slots, self.norms = layer, slots, []

    @property
    def last_layer(self):
        return self.layer

    def before_write(self, layer_id, k_pool, v_pool, k, v):
        if layer_id == self.layer:
            self.norms = [v_pool[slots].float().square().sum((1, 2)) for slots in self.slots]


@dataclass(frozen=True, kw_only=True)
class ValueNormConfig:
    ratio: float = 0.3
    sign: int = 1


class ValueNormPolicy(ScoredPolicy):
    """Recomputes the tokens whose values are largest."""

    name = "value-norm"
    config_type = ValueNormConfig

    def signal(self, layout):
        return ValueNormSignal(layout.num_layers - 2, self.config.sign)

    def num_selected(self, layout):
        return (int(self.ratio * layout.num_reused),)

    def choose(self, layout, scores, candidates, stage=0):
        return top_positions(scores, candidates, self.num_selected(layout)[stage])


def stored_values(local, chunk, layer):
    """Values of a chunk as the store holds them, ``[tokens, heads, head_dim]``: loading does not change them."""
    store = local.runtime.store
    (lease,) = [found for key in store.keys() if (found := store.acquire(key, chunk))]  # noqa: SIM118
    with lease:
        return lease.record.layer(layer, 0, len(chunk))[1].clone()


def painted(req, kind):
    """Positions of the prompt that the report paints as 1 (reused) or 2 (recomputed)."""
    at, found = 0, []
    for painted_as, length in report(req)["runs"]:
        found += range(at, at + length) if painted_as == kind else ()
        at += length
    return found


@pytest.mark.parametrize("sign", [1, -1])
def test_a_policy_with_a_signal_of_its_own(stocked, sign):
    fuse = {"spans": SWAPPED_SPANS, "policy": "value-norm", "options": {"sign": sign}}
    with registered(POLICIES, ValueNormPolicy):
        req = stocked.ask(SWAPPED, 2, fusion=fuse)
    layer = stocked.runtime.facts.num_layers - 2
    norms = sign * stored_values(stocked, CHUNKS[0], layer).double().square().sum((1, 2))
    # Only the second chunk is moved, and 12 of its 40 tokens are bought.
    wanted = (norms.argsort(descending=True)[:12].sort().values + 60).tolist()
    assert report(req)["fallback"] == ""
    assert painted(req, 2) == wanted
    # The pass is charged: the fresh rows as far as the signal looked, then all rows that are computed.
    facts = stocked.runtime.facts
    fresh = report(req)["fresh_tokens"]
    work = fresh * (layer + facts.qkv_share) + (fresh + 12) * facts.num_layers
    behind = (len(SWAPPED) - report(req)["exact_prefix_tokens"]) * facts.num_layers
    assert report(req)["computed_fraction"] == pytest.approx(work / behind, abs=1e-6)


class CountingKernel(AttentionKernel):
    """The reference, counting its calls."""

    name = "counting"
    block_rows = 7
    calls = 0

    def refuse_device(self, device):
        return None

    def attend(self, *args):
        type(self).calls += 1
        return ATTENTION_KERNELS.get("reference")().attend(*args)


def test_an_attention_kernel(stocked, monkeypatch):
    fuse = {"spans": SWAPPED_SPANS, "policy": "query:0.3"}
    usual = stocked.ask(SWAPPED, 3, fusion=fuse)
    stocked.flush()
    with registered(ATTENTION_KERNELS, CountingKernel):
        chosen = dataclasses.replace(stocked.runtime.config, attention_kernel="counting")
        monkeypatch.setattr(stocked.runtime, "config", chosen)
        other = stocked.ask(SWAPPED, 3, fusion=fuse)
    assert CountingKernel.calls >= 5
    assert report(other)["recomputed_tokens"] == report(usual)["recomputed_tokens"] > 0
    assert logprobs(other) == pytest.approx(logprobs(usual), abs=1e-4)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"attention_kernel": "flashinfer"}, "needs a CUDA device"),
        ({"tier": "broken"}, "cannot be loaded"),
        ({"conversation_memory": "broken"}, "cannot be loaded"),
    ],
)
def test_what_a_setting_names_and_cannot_be_used_turns_fusion_off(
    stocked, monkeypatch, tmp_path, setting, reason
):
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    groups = ("rag_pipeline.tiers", "rag_pipeline.conversation_memories")
    lines = [line for group in groups for line in (f"[{group}]", "broken = no_such_module:Thing")]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in (TIERS, CONVERSATION_MEMORIES):
        registry.__dict__.pop("_offers", None)
    try:
        monkeypatch.setenv(FUSION_VARIABLE, FusionConfig(**setting).to_env())
        runtime = build_runtime(stocked.scheduler)
    finally:
        for registry in (TIERS, CONVERSATION_MEMORIES):
            registry.__dict__.pop("_offers", None)
    assert not runtime.is_on
    assert reason in runtime.off_reason
    assert "\n" not in runtime.off_reason


class WrongPositions(EveryNthPolicy):
    """Chooses what no policy may choose."""

    name = "wrong"

    def select(self, layout):
        wrong = {
            2: torch.tensor([60, 60]),
            3: torch.tensor([61, 60]),
            5: torch.tensor([0]),
            6: torch.tensor([60.0]),
            7: torch.tensor([[60]]),
        }
        return wrong[self.config.step]


@pytest.mark.parametrize("step", [2, 3, 5, 6, 7])
def test_a_policy_that_chooses_wrongly_costs_speed_only(stocked, step):
    with registered(POLICIES, WrongPositions):
        fusion = {"spans": SWAPPED_SPANS, "policy": "wrong", "options": {"step": step}}
        answer = stocked.ask(SWAPPED, 2, fusion=fusion)
    assert report(answer)["fallback"] == "internal_error"
    stocked.flush()
    assert stocked.ask(SWAPPED, 2, fusion={"mode": "off"}).output_ids == answer.output_ids


def test_a_clients_option_cannot_overflow_a_tensor():
    from rag_kernels import ATTENTION_METHODS, create_attention_method
    from rag_pipeline.protocol import RequestError
    from rag_pipeline.protocol.fields import parse_request

    class Near(ATTENTION_METHODS.get("dense")):
        name = "near"
        config_type = EveryNthConfig

    with registered(ATTENTION_METHODS, Near):
        assert create_attention_method("near:step=5").config.step == 5
        for value in ("9" * 30, "-" + "9" * 30, "nan", "1.5"):
            with pytest.raises(ValueError, match="expected int"):
                create_attention_method(f"near:step={value}")
    with pytest.raises(RequestError, match="give at most 200"):
        parse_request(None, {"rag_mode": "fuse", "rag_attention": "x" * 201}, 9)

"""Things of somebody else's at every seam, run by the real engine: a policy, an attention kernel."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from fusion_helpers import logprobs, report, tokens

from chunk_cache.policies import POLICIES, Policy
from rag_kernels import ATTENTION_KERNELS, AttentionKernel

PREFIX, CHUNKS, QUESTION = tokens(20, 1), [tokens(40, 10 + i) for i in range(2)], tokens(9, 2)
PROMPT = [*PREFIX, *CHUNKS[1], *CHUNKS[0], *QUESTION]
SPANS = [20, 60, 60, 100]


@contextlib.contextmanager
def registered(registry, value):
    registry.register(value.name, value)
    try:
        yield
    finally:
        registry.unregister(value.name)


@pytest.fixture
def local(engine):
    made = engine("llama")
    for chunk in CHUNKS:
        made.build(PREFIX, chunk)
    made.flush()
    return made


@dataclass(frozen=True, kw_only=True)
class EveryNthConfig:
    step: int = 4


class EveryNthPolicy(Policy):
    """Recomputes every n-th reused token."""

    name = "every-nth"
    config_type = EveryNthConfig
    signal = "none"

    def __init__(self, config):
        self.config = config

    @property
    def ratio(self):
        return 1 / self.config.step

    def num_selected(self, layout):
        return (len(self._positions(layout)),)

    def select(self, layout, *, scores=None, candidates=None, stage=0):
        return torch.tensor(self._positions(layout), dtype=torch.int64)

    def computed_row_layers(self, layout, kept=None):
        return float((kept or self.num_selected(layout))[-1] * layout.num_layers)

    def _positions(self, layout):
        reused = [at for start, end in layout.spans for at in range(start, end)]
        return reused[:: self.config.step]


def test_a_policy(local):
    with registered(POLICIES, EveryNthPolicy):
        some = local.ask(PROMPT, 2, fusion={"spans": SPANS, "policy": "every-nth"})
        local.flush()
        more = local.ask(
            PROMPT, 2, fusion={"spans": SPANS, "policy": "every-nth", "options": {"step": 2}}
        )
    # The chunk at its own place is exact: only the moved one is up to a policy.
    assert (report(some)["policy"], report(some)["recomputed_tokens"]) == ("every-nth", 10)
    assert (report(more)["reused_tokens"], report(more)["recomputed_tokens"]) == (60, 20)
    local.flush()
    # Gone, it is no policy any more: the request is served as usual.
    assert local.ask(PROMPT, 2, fusion={"spans": SPANS, "policy": "every-nth"}).output_ids


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


def test_an_attention_kernel(local, monkeypatch):
    fuse = {"spans": SPANS, "policy": "query:0.3"}
    usual = local.ask(PROMPT, 3, fusion=fuse)
    local.flush()
    with registered(ATTENTION_KERNELS, CountingKernel):
        chosen = dataclasses.replace(local.runtime.config, attention_kernel="counting")
        monkeypatch.setattr(local.runtime, "config", chosen)
        other = local.ask(PROMPT, 3, fusion=fuse)
    assert CountingKernel.calls >= 5
    assert report(other)["recomputed_tokens"] == report(usual)["recomputed_tokens"] > 0
    assert logprobs(other) == pytest.approx(logprobs(usual), abs=1e-4)

"""An engine of the test process with a tier below its memory that holds three chunks."""

from __future__ import annotations

import contextlib
import dataclasses

from fusion_helpers import CHUNKS, PREFIX, PREFIX_IDS, lay_out, report, tokens

from rag_pipeline.sglang_plugin.fusion.builds import persistence
from rag_pipeline.sglang_plugin.fusion.runtime.rates import Rates

PROMPT, SPANS = lay_out([CHUNKS[1], CHUNKS[0], CHUNKS[2]], tokens(9, 2))
FUSE = {"spans": SPANS, "policy": "epic:0.3", "prefix_len": PREFIX}


def outcome(req):
    told = report(req)
    return (
        list(req.output_ids),
        list(req.logprob.output_token_logprobs_val),
        told["reused_tokens"],
        told["recomputed_tokens"],
        told["fallback"],
    )


class Below:
    """An engine with a folder below its memory, filled with three chunks."""

    def __init__(self, local, folder):
        self.local, self.runtime, self.folder = local, local.runtime, folder
        self.keys = []
        for chunk in CHUNKS[:3]:
            local.build(PREFIX_IDS, chunk)
            # A small memory gives up what was built before: the folder has it.
            stored = self.runtime.store.keys()
            self.keys += [key for key in stored if key not in self.keys]
        assert len(self.keys) == 3
        local.flush()
        assert self.runtime.tiers.drain(60)
        self.usual = outcome(local.ask(PROMPT, 4, fusion=FUSE))
        assert self.usual[2] > 0

    @property
    def tier(self):
        (tier,) = self.runtime.tiers.tiers.values()
        return tier

    def forget(self):
        """As after a restart that read nothing: the folder has all, memory nothing."""
        assert self.runtime.fetcher.drain(60)
        self.local.fresh()
        assert not self.runtime.store.keys()

    def ask(self, **options):
        return self.local.ask(PROMPT, 4, fusion=FUSE | options)

    def counts(self, tier="slow"):
        found = self.runtime.metrics.to_json()
        return {k.partition(".")[2]: n for k, n in found.items() if k.startswith(f"{tier}.")}


@contextlib.contextmanager
def opened(local, monkeypatch, tier, path):
    local.fresh()
    runtime = local.runtime
    for name in ("tiers", "fetcher", "erased", "timeline"):
        monkeypatch.setattr(runtime, name, None)
    monkeypatch.setattr(runtime, "epoch", 0)
    # What an earlier test slowed down says nothing here.
    monkeypatch.setattr(runtime, "rates", Rates())
    chosen = dataclasses.replace(runtime.config, tier=tier, store_dir=str(path))
    monkeypatch.setattr(runtime, "config", chosen)
    persistence.start_tiers(runtime, "no-model")
    try:
        yield Below(local, path)
    finally:
        assert runtime.fetcher.close(60)
        assert runtime.tiers.close(60)
        local.fresh()

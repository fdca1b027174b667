"""Lives of an engine that keeps memories: real stores, tiers and rules, KV without a model."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import torch

from chunk_cache import RecordForm, layout_named
from rag_kernels import RotarySpec, rerotate_keys
from rag_pipeline.protocol import FusionRequest, MemoryFields, MemoryLoad, MemoryStore, memory_id
from rag_pipeline.sglang_plugin.fusion.admission import fetching
from rag_pipeline.sglang_plugin.fusion.builds import persistence
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.memory import leasing
from rag_pipeline.sglang_plugin.fusion.memory.keeping import conclude
from rag_pipeline.sglang_plugin.fusion.memory.records import name_of
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.request.state import ATTRIBUTE, RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts
from rag_pipeline.sglang_plugin.fusion.runtime.rank_group import RankGroup
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 8
PREFIX, BLOCK, PROBE, BUDGET = 6, 10, 3, 7
ACME, GLOBEX = RadixNamespace(None, "acme"), RadixNamespace(None, "globex")
SPEC = RotarySpec.from_inv_freq(1.0 / 100.0 ** (torch.arange(0, DIM, 2) / DIM), rotary_dim=DIM)
_IDLE = SimpleNamespace(can_run_list=[], running_batch=SimpleNamespace(is_empty=lambda: True))


class Engine:
    """One life of an engine; what its pool holds for a prompt is drawn from the token ids."""

    def __init__(self, group: RankGroup | None = None, **settings: Any) -> None:
        group = group or RankGroup()
        layer = SimpleNamespace(sliding_window_size=-1, logit_cap=0.0)
        facts = ModelFacts(
            layers=(layer,) * LAYERS,
            num_q_heads=HEADS * GROUP,
            num_kv_heads=HEADS,
            head_dim=DIM,
            scaling=DIM**-0.5,
            rotary=SPEC,
            layout=layout_named("heads"),
            fingerprint="w",
            context_fields={
                "model_fingerprint": "w",
                "dtype": "float32",
                "kv_dtype": "float32",
                "rope": "{}",
                "tp_rank": group.rank,
                "tp_size": group.size,
            },
            qkv_share=0.1,
        )
        config = FusionConfig(store_bytes=1 << 20, **settings)
        self.runtime = FusionRuntime(config, facts, group=group)
        kv = torch.zeros(LAYERS, 1, HEADS, DIM)
        self.runtime.record_form = RecordForm("heads", kv, kv)
        persistence.start_tiers(self.runtime, "no-model")

    def state(
        self, prompt: list[int], memory: MemoryFields, tenant: RadixNamespace = ACME
    ) -> RequestState:
        """A request that has come, waited for its fetches and was admitted."""
        request = FusionRequest(prefix_len=PREFIX, memory=memory)
        state = RequestState(request, request.make_policy("reuse"), prompt, explicit=True)
        req = SimpleNamespace(rid="r", **tenant._asdict(), **{ATTRIBUTE: state})
        fetching.expect(self.runtime, req, state)
        while fetching.must_wait(self.runtime, _IDLE, req, state):
            pass
        state.begin_attempt(0, self.runtime.epoch)
        leasing.lease(self.runtime, state, tenant)
        state.resolve()
        return state

    def prefill(self, state: RequestState, *, rows: slice = slice(None)) -> Any:
        """Fill the pool as a forward would, hand the queries over and conclude; returns keys, values and queries."""
        ids = state.prompt
        noise = torch.Generator().manual_seed(int(ids.sum()))
        shape = (LAYERS, ids.size, HEADS, DIM)
        keys, values = (torch.randn(shape, generator=noise) for _ in "kv")
        queries = torch.randn(LAYERS, ids.size, HEADS * GROUP, DIM, generator=noise)
        for span in state.spans:
            for layer in range(LAYERS):
                k, v = span.lease.record.layer(layer)
                keys[layer, span.start : span.end] = rerotate_keys(k, span.delta, SPEC)
                values[layer, span.start : span.end] = v
        work = state.memory
        if work is not None and work.target is not None:
            wanted = range(work.target.first_query, work.target.last_query)[rows]
            for layer in range(LAYERS):
                for row in wanted:  # as if each came in a piece of its own
                    work.note_queries(layer, queries[layer, row : row + 1])
        pool = SimpleNamespace(
            get_key_buffer=lambda i: keys[i], get_value_buffer=lambda i: values[i]
        )
        conclude(self.runtime, state, pool, torch.arange(ids.size))
        return keys, values, queries

    def found(self, name: str) -> Any:
        for key in self.runtime.store.keys():  # noqa: SIM118 - not a mapping
            with self.runtime.store.borrow(key) as record:
                if record is not None and name_of(record) == name:
                    return record
        return None

    def counts(self) -> dict[str, int]:
        return self.runtime.metrics.to_json()

    def end(self) -> None:
        if self.runtime.fetcher is not None:
            assert self.runtime.fetcher.close(60)
            assert self.runtime.tiers.close(60)
        self.runtime.store.check_integrity(expect_idle=True)


class Rank(RankGroup):
    """One of two ranks; a vote that the other one does not come to breaks the barrier."""

    def __init__(self, rank: int, barrier: threading.Barrier, votes: list[Any]) -> None:
        super().__init__()
        self.size, self.rank = 2, rank
        self._barrier, self._votes = barrier, votes

    def _exchange(self, vote: tuple[bool, Any]) -> list[tuple[bool, Any]]:
        self._votes[self.rank] = vote
        self._barrier.wait(30)
        votes = list(self._votes)
        self._barrier.wait(30)
        return votes


class Talk:
    """A conversation whose blocks are steps."""

    def __init__(
        self,
        *,
        rule: str = "epicache",
        budget: int = BUDGET,
        seed: int = 0,
        own: tuple[tuple[int, int], ...] = (),
        own_share: float = 1.0,
    ) -> None:
        self.rule, self.budget, self.seed = rule, budget, seed
        self.own, self.own_share = own, own_share
        self.prefix = list(range(PREFIX))
        self.history: list[int] = []
        self.name, self.slots = "", 0

    @property
    def load(self) -> tuple[MemoryLoad, ...]:
        end = PREFIX + self.slots
        return (MemoryLoad(start=PREFIX, end=end, id=self.name),) if self.name else ()

    def begin(self) -> list[int]:
        return [*self.prefix, *(self.history[-self.slots :] if self.slots else [])]

    def step(self, engine: Engine, *, tenant: RadixNamespace = ACME, **rows: Any) -> Any:
        """Make the next step; returns its state and what the pool held."""
        at = len(self.history)
        block = [100 + at + n for n in range(BLOCK)]
        probe = [] if self.rule != "epicache" else [1000 + self.seed + n for n in range(PROBE)]
        ids = [*self.begin(), *block]
        store = MemoryStore(
            end=len(ids),
            budget=self.budget,
            rule=self.rule,
            own=self.own,
            own_share=self.own_share,
        )
        state = engine.state([*ids, *probe], MemoryFields(load=self.load, store=store), tenant)
        held = engine.prefill(state, **rows)
        how = self.rule, self.budget, self.own, self.own_share
        self.name = memory_id(self.name, self.prefix, block, probe, *how)
        self.history += block
        self.slots = min(self.budget, self.slots + BLOCK)
        state.finish(state.prompt.size)
        return state, held

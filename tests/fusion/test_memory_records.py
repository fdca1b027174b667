"""What a prefill leaves as a memory, and how it is found again: real stores, tiers and rules, KV without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chunk_cache import RecordForm, layout_named
from rag_kernels import RotarySpec, rerotate_keys
from rag_pipeline.protocol import FusionRequest, MemoryFields, MemoryLoad, MemoryStore, memory_id
from rag_pipeline.protocol.cache_order import CacheOrder
from rag_pipeline.sglang_plugin.fusion.admission import fetching
from rag_pipeline.sglang_plugin.fusion.builds import persistence
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.management.memories import memories
from rag_pipeline.sglang_plugin.fusion.memory import keeping, leasing
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


@pytest.fixture
def engines(tmp_path: Path):
    made: list[Engine] = []

    def begin(**settings: Any) -> Engine:
        made.append(Engine(**settings))
        return made[-1]

    yield begin
    for one in made:
        one.end()


def brute_force(keys: torch.Tensor, queries: torch.Tensor, budget: int) -> tuple[Any, Any]:
    """Columns that stay, of each head: by loops, in fp64; and every column's score."""
    chosen, scores = [], []
    for head in range(HEADS):
        best = torch.zeros(keys.shape[0]).double()
        for row in range(queries.shape[0]):
            for q in range(head * GROUP, (head + 1) * GROUP):
                logits = keys[:, head].double() @ queries[row, q].double() / DIM**0.5
                best = torch.maximum(best, logits.softmax(0))
        order = sorted(range(len(best)), key=lambda i, best=best: (-float(best[i]), i))
        chosen.append(sorted(order[:budget]))
        scores.append(best)
    return chosen, scores


def test_the_best_of_each_head_stay_at_their_true_positions_and_old_ones_bit_for_bit(engines):
    engine, talk = engines(), Talk()
    before = None
    for number in range(4):
        state, (keys, values, queries) = talk.step(engine)
        record = engine.found(talk.name)
        assert record is not None
        num_old = 0 if before is None else BUDGET
        end, true_end = PREFIX + num_old + BLOCK, PREFIX + (number + 1) * BLOCK
        assert record.base_position == true_end - BUDGET
        assert record.token_ids.tolist() == talk.history[-BUDGET:]
        assert record.seen_ids.tolist() == [*talk.prefix, *talk.history]
        assert record.codec == "plain"
        for layer in range(LAYERS):
            probe = queries[layer, end : end + PROBE]
            chosen, scores = brute_force(keys[layer, PREFIX:end], probe, BUDGET)
            for head, columns in enumerate(chosen):
                new = range(true_end - BLOCK, true_end)
                old = [] if before is None else before.side["positions"][layer, head].tolist()
                true = [*old, *new]
                assert record.side["positions"][layer, head].tolist() == [true[c] for c in columns]
                got = record.side["scores"][layer, head].double()
                torch.testing.assert_close(got, scores[head][columns], rtol=1e-3, atol=1e-6)
                for slot, column in enumerate(columns):
                    if column < num_old:
                        wanted = before.k[layer, column, head], before.v[layer, column, head]
                    else:
                        at = PREFIX + column
                        moved = rerotate_keys(keys[layer, at : at + 1], true[column] - at, SPEC)
                        wanted = moved[0, head], values[layer, at, head]
                    assert torch.equal(record.k[layer, slot, head], wanted[0])
                    assert torch.equal(record.v[layer, slot, head], wanted[1])
        before = record
    assert engine.counts()["memories.stored"] == 4
    assert state.memory is not None


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_own_tokens_stay_before_others_and_scores_are_the_rules(engines, share):
    own = ((PREFIX + 2, PREFIX + 5), (PREFIX + 14, PREFIX + 23))  # the last one goes on behind
    engine, talk = engines(), Talk(own=own, own_share=share)
    free, old = round(BUDGET * (1 - share)), [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
    for number in range(3):
        _, (keys, _, queries) = talk.step(engine)
        record = engine.found(talk.name)
        assert record is not None
        end = PREFIX + (BUDGET if number else 0) + BLOCK
        for layer in range(LAYERS):
            probe = queries[layer, end : end + PROBE]
            _, scores = brute_force(keys[layer, PREFIX:end], probe, BUDGET)
            for head, by in enumerate(scores):
                true = [*old[layer][head], *range(PREFIX + number * BLOCK, PREFIX + (number + 1) * BLOCK)]  # fmt: skip
                order = sorted(range(len(by)), key=lambda c, by=by: (-float(by[c]), c))
                mine = [c for c in order if any(a <= true[c] < b for a, b in own)]
                kept = list(dict.fromkeys([*order[:free], *mine, *order]))[:BUDGET]
                got = record.side["positions"][layer, head].tolist()
                assert got == sorted(true[c] for c in kept)
                near = record.side["scores"][layer, head].double()
                torch.testing.assert_close(near, by[sorted(kept)], rtol=1e-3, atol=1e-6)
                old[layer][head] = got
    assert record.side["own_spans"].tolist() == [list(span) for span in own]
    assert record.side["own_free"].tolist() == [free]
    plain = Talk()
    plain.step(engine)
    assert "own_spans" not in engine.found(plain.name).side


def test_two_memories_with_own_tokens_are_loaded_as_half_of_each_also_behind_a_restart(
    engines, tmp_path
):
    spans = ((PREFIX, PREFIX + 8),), ((PREFIX + 8, PREFIX + 16),)
    settings = {"store_dir": str(tmp_path / "kv")}
    engine, merged = engines(**settings), []
    talks = [Talk(seed=20 * number, own=own) for number, own in enumerate(spans)]
    for talk in talks:
        talk.step(engine)
        talk.step(engine)
    one, two = talks
    asked = MemoryFields(load=(*one.load, *two.load))
    for life in (engine, None):
        if life is None:
            engine.end()
            life = engines(**settings)
        state = life.state([*one.begin(), 5, 5], asked)
        assert state.memory.loaded == BUDGET
        merged.append(state.spans[0].lease.record.side["positions"])
        state.finish(state.prompt.size)
    assert torch.equal(*merged)
    for (own,) in spans:
        mine = ((merged[0] >= own[0]) & (merged[0] < own[1])).sum(-1)
        assert int(mine.min()) >= BUDGET // 2


def test_a_budget_above_the_history_keeps_everything_and_nothing_is_rotated(engines):
    engine, talk = engines(), Talk(budget=100)
    for _ in range(3):
        _, (keys, _, _) = talk.step(engine)
    record = engine.found(talk.name)
    assert record.base_position == PREFIX
    assert (record.side["positions"] == torch.arange(PREFIX, PREFIX + 30, dtype=torch.int32)).all()
    assert torch.equal(record.k, keys[:, PREFIX : PREFIX + 30])


@pytest.mark.parametrize("rule", ["streaming:first=2", "snapkv:window=4+kernel=1", "keydiff"])
def test_rules_without_a_probe_take_the_blocks_own_rows_or_none(engines, rule):
    engine, talk = engines(), Talk(rule=rule)
    for _ in range(3):
        state, _ = talk.step(engine)
        assert engine.found(talk.name) is not None
    positions = engine.found(talk.name).side["positions"]
    if rule.startswith("streaming"):
        assert (positions == torch.tensor([PREFIX, PREFIX + 1, *range(31, 36)])).all()
    if rule.startswith("snapkv"):
        assert (positions[..., -4:] == torch.arange(32, 36)).all()
    assert leasing.matched_until(state) == PREFIX


def test_a_step_whose_queries_were_not_all_seen_leaves_nothing(engines):
    engine, talk = engines(), Talk()
    talk.step(engine, rows=slice(1, None))
    assert engine.found(talk.name) is None
    assert engine.counts()["memories.incomplete"] == 1


def test_what_is_there_is_known_and_not_computed_again(engines):
    engine = engines()
    one, two = Talk(), Talk()
    one.step(engine)
    state, _ = two.step(engine)
    assert two.name == one.name
    assert engine.counts()["memories.known"] == 1
    assert (state.memory.name, state.memory.kept) == (one.name, BUDGET)


def test_another_tenant_prefix_or_placeholder_finds_nothing(engines):
    engine, talk = engines(), Talk()
    talk.step(engine)
    talk.step(engine)
    ids = [*talk.begin(), 5, 5]
    asked = MemoryFields(load=talk.load)

    def loaded(prompt: list[int], tenant: RadixNamespace = ACME) -> int:
        state = engine.state(prompt, asked, tenant)
        state.finish(len(prompt))
        assert state.memory.is_missed == (not state.memory.loaded)
        return state.memory.loaded

    assert loaded(ids) == BUDGET
    assert not loaded(ids, GLOBEX)
    assert not loaded([7, *ids[1:]])
    changed = list(ids)
    changed[PREFIX] += 1
    assert not loaded(changed)


@pytest.mark.parametrize("codec", ["plain", "kivi4"])
def test_a_restart_finds_memories_in_the_folder_and_goes_on_bit_for_bit(engines, tmp_path, codec):
    settings = {"store_dir": str(tmp_path / "kv"), "store_codec": codec}
    first = engines(**settings)
    talk = Talk()
    talk.step(first)
    talk.step(first)
    record = first.found(talk.name)
    first.end()
    second = engines(**settings)
    for key in second.runtime.store.keys():  # noqa: SIM118 - not a mapping
        second.runtime.store.evict(key)  # so that it is fetched
    order = CacheOrder(action="memories", ticket="t", keys=(talk.name, "0" * 64))
    told = memories(second.runtime, order)
    assert told == {"present": [talk.name], "absent": ["0" * 64]}
    talk.step(second)
    assert second.counts()["disk.fetched"] == 1
    assert second.found(talk.name) is not None
    with_old = second.runtime.store
    again = [k for k in with_old.keys() if k == record.key]  # noqa: SIM118 - not a mapping
    with with_old.borrow(again[0]) as back:
        assert torch.equal(back.k, record.k)
        assert torch.equal(back.side["positions"], record.side["positions"])


def test_two_memories_are_loaded_as_the_best_of_both(engines):
    engine = engines()
    one, two = Talk(seed=0), Talk(seed=20)
    for talk in (one, two):
        talk.step(engine)
        talk.step(engine)
    state = engine.state([*one.begin(), 5, 5], MemoryFields(load=(*one.load, *two.load)))
    assert state.memory.loaded == BUDGET
    merged = state.spans[0].lease.record
    records = [engine.found(talk.name) for talk in (one, two)]
    assert merged.base_position == records[0].base_position
    for layer in range(LAYERS):
        for head in range(HEADS):
            best: dict[int, tuple[float, Any]] = {}
            for record in records:
                rows = zip(
                    record.side["positions"][layer, head].tolist(),
                    record.side["scores"][layer, head].tolist(),
                    record.k[layer, :, head],
                    strict=True,
                )
                for position, score, key in rows:
                    if position not in best or score > best[position][0]:
                        best[position] = score, key
            order = sorted(best, key=lambda p, best=best: (-best[p][0], p))[:BUDGET]
            assert merged.side["positions"][layer, head].tolist() == sorted(order)
            wanted = torch.stack([best[p][1] for p in sorted(order)])
            assert torch.equal(merged.layer(layer).k[:, head], wanted)
    state.finish(state.prompt.size)
    # One that is gone takes the other with it: a half is not what was asked for.
    engine.runtime.store.evict(records[1].key)
    state = engine.state([*one.begin(), 5, 5], MemoryFields(load=(*one.load, *two.load)))
    assert state.memory.is_missed
    state.finish(state.prompt.size)


def test_kept_shares_are_those_of_what_is_loaded(engines):
    engine, talk = engines(), Talk(rule="streaming:first=2")
    talk.step(engine)
    talk.step(engine)
    spans = ((PREFIX, PREFIX + 4), (26 - 5, 26), (0, PREFIX))
    state = engine.state([*talk.begin(), 5, 5], MemoryFields(load=talk.load, spans=spans))
    engine.prefill(state)
    assert state.memory.shares == [0.5, 1.0, 0.0]
    state.finish(state.prompt.size)


def test_new_weights_find_no_memory_and_none_is_stored_over_an_update(engines):
    engine, talk = engines(), Talk()
    talk.step(engine)
    engine.runtime.new_weights(in_update=False, tree_is_old=False)
    state = engine.state([*talk.begin(), 5, 5], MemoryFields(load=talk.load))
    assert state.memory.is_missed
    state.finish(state.prompt.size)


def test_ranks_load_and_store_a_memory_together_or_not_at_all(engines, monkeypatch):
    barrier, votes = threading.Barrier(2), [None, None]
    ranks = [engines(group=Rank(rank, barrier, votes)) for rank in range(2)]
    talks = [Talk(), Talk()]

    def both(work: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(work, range(2)))

    def step(rank: int) -> str:
        talks[rank].step(ranks[rank])
        return talks[rank].name

    assert len(set(both(step))) == 1
    assert len(set(both(step))) == 1
    keys = [ranks[rank].found(talks[rank].name).key for rank in range(2)]
    assert keys[0] != keys[1]  # each has its own heads
    # A rank that cannot score takes the other along.
    fine = [set(engine.runtime.store.keys()) for engine in ranks]
    target, original = ranks[1], keeping.keep_top

    def fail(*args: Any) -> Any:
        if threading.current_thread().name.endswith("_1"):
            raise RuntimeError("a fault of the test")
        return original(*args)

    before = [(list(talk.history), talk.name, talk.slots) for talk in talks]
    monkeypatch.setattr(keeping, "keep_top", fail)
    both(step)
    monkeypatch.setattr(keeping, "keep_top", original)
    assert [set(engine.runtime.store.keys()) for engine in ranks] == fine
    for talk, (history, name, slots) in zip(talks, before, strict=True):
        talk.history, talk.name, talk.slots = history, name, slots

    def missed(rank: int) -> bool:
        talk = talks[rank]
        state = ranks[rank].state([*talk.begin(), 5, 5], MemoryFields(load=talk.load))
        state.finish(state.prompt.size)
        return bool(state.memory.is_missed)

    assert both(missed) == [False, False]
    assert target.runtime.store.evict(keys[1])
    assert both(missed) == [True, True]

"""Two ranks decide alike whatever befalls one of them: real stores, queues and admission in two threads, no engine.

A vote that only one rank comes to would hang an engine; here it breaks a barrier. The KV of a chunk is made from what
it is a function of, that of a conversation's turn from the request that computed it, so that mixed heads show.
"""

from __future__ import annotations

import concurrent.futures
import operator
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_facts import tiny_facts

from chunk_cache import ChunkKV
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.admission import fetching, next_batch, radix_tree
from rag_pipeline.sglang_plugin.fusion.admission import prefill_adder as batching
from rag_pipeline.sglang_plugin.fusion.builds import idle as background
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.request.state import ATTRIBUTE, RequestState, state_of
from rag_pipeline.sglang_plugin.fusion.runtime.rank_group import RankGroup
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

PREFIX, PASSAGE, QUESTION = [1, 2, 3, 4], [7, 8, 9], [200, 201, 202, 203, 204, 205]
# The first two end alike: a run of either is the same tokens, but not the same KV.
CHUNKS = [
    [10, 11, *range(20, 100)],
    [12, 13, *range(20, 100)],
    [*range(110, 130)],
    [*range(140, 168)],
]
LOCAL = threading.local()


class Meeting:
    """Where two ranks vote; a rank that is alone there breaks it."""

    def __init__(self):
        self._barrier = threading.Barrier(2)
        self._votes = [None, None]
        self.is_broken = False

    def exchange(self, rank, vote):
        self._votes[rank] = vote
        try:
            self._barrier.wait(10)
            votes = list(self._votes)
            self._barrier.wait(10)
        except threading.BrokenBarrierError:
            self.is_broken = True
            raise
        return votes


class Rank(RankGroup):
    def __init__(self, meeting, rank):
        super().__init__()
        self.size, self.rank, self._meeting = 2, rank, meeting

    def _exchange(self, vote):
        return self._meeting.exchange(self.rank, vote)


class Request:
    """The fields of SGLang's request that admission looks at; what it is not told is unset."""

    def __init__(self, ids, fusion):
        self.origin_input_ids = self.full_untruncated_fill_ids = ids
        self.rid, self.prefix_len, self.extend_end = "r", 0, len(ids)
        self.output_ids_through_stop = [5, 6]
        self.sampling_params = SimpleNamespace(max_new_tokens=2)
        state = RequestState(fusion, fusion.make_policy("reuse"), ids, explicit=bool(fusion.spans))
        setattr(self, ATTRIBUTE, state)

    def __getattr__(self, name):
        return None

    def is_dllm(self):
        return False


def make_runtime(meeting, rank, memory="turns"):
    facts = tiny_facts(f"shard {rank}", tp_rank=rank, tp_size=2)
    config = FusionConfig(
        automatic=True,
        min_reused_tokens=4,
        max_background=4,
        store_bytes=1 << 20,
        conversation_memory=memory,
    )
    runtime = FusionRuntime(config, facts, group=Rank(meeting, rank))
    runtime.passage = np.array(PASSAGE)
    runtime.max_prompt = 4096
    return runtime


class Pair:
    """Two ranks, driven by the same script."""

    def __init__(self, threads, memory="turns"):
        self.meeting = Meeting()
        self.ranks = [make_runtime(self.meeting, rank, memory) for rank in range(2)]
        self.clocks = [0.0, 0.0]
        for rank, runtime in enumerate(self.ranks):
            runtime.store._clock = lambda rank=rank: self.clocks[rank]
        self._threads = threads
        self._computations = 0

    def both(self, work, trigger):
        """Run a step on both ranks at once, with a fault on one; what it gives must be the same."""
        kind, where, at = trigger or ("", 0, "")

        def run(rank):
            LOCAL.runtime, LOCAL.built = self.ranks[rank], []
            undo = break_at(self.ranks[rank], at) if kind == "raise" and rank == where else None
            try:
                return work(rank, self.ranks[rank])
            finally:
                if undo is not None:
                    undo()

        futures = [self._threads.submit(run, rank) for rank in range(2)]
        concurrent.futures.wait(futures)
        one, two = (future.result() for future in futures)
        assert not self.meeting.is_broken, "a vote that only one rank came to"
        assert one == two
        waiting = [[chunk.ids.tolist() for chunk in r.missing] for r in self.ranks]
        assert waiting[0] == waiting[1]
        for runtime in self.ranks:
            runtime.store.check_integrity(expect_idle=True)
        return one

    def ask(self, ids, fusion, trigger=()):
        """Admit, compute, store and end a request; return what it loaded."""
        self._computations += 1
        stamp = self._computations

        def serve(rank, runtime):
            req = Request(ids, fusion)
            adder = SimpleNamespace(can_run_list=[], rem_input_tokens=10**6, rem_chunk_tokens=None)
            batching.around_add_one_req(
                lambda adder, req, *args, **kwargs: adder.can_run_list.append(req), adder, req
            )
            if trigger[:2] == ("clock", rank):
                self.clocks[rank] += 1000.0
            return finish(runtime, req, stamp)

        return self.both(serve, trigger)

    def idle(self, trigger=()):
        """Let the loop be idle for long enough, and serve the build that it starts."""

        self._build(
            lambda: background.before_idle(SimpleNamespace(is_fully_idle=lambda: True)), trigger
        )

    def busy(self, trigger=()):
        """Turn the loop of a scheduler that is never idle, and serve the build that it starts."""
        running = SimpleNamespace(reqs=[object()], batch_is_full=False)
        scheduler = SimpleNamespace(
            waiting_queue=[], chunked_req=None, collect_inflight_reqs=lambda: []
        )
        self._build(
            lambda: next_batch.before_next_batch(scheduler, running_batch=running, last_batch=None),
            trigger,
        )

    def _build(self, turn, trigger):
        def take(rank, runtime):
            turn()
            return LOCAL.built

        for ids, start in self.both(take, trigger):
            self.ask(ids, FusionRequest(mode="build", spans=((start, len(ids)),), prefix_len=start))


def break_at(runtime, at):
    place, _, name = at.rpartition(".")
    target = operator.attrgetter(place)(runtime)
    assert callable(getattr(target, name))

    def fails(*args, **kwargs):
        raise RuntimeError("injected")

    setattr(target, name, fails)
    return lambda: delattr(target, name)


def finish(runtime, req, stamp):
    """Compute, store and end a request; return all that must be the same on every rank."""
    state, ids = state_of(req), req.origin_input_ids
    seen = [
        (s.start, s.end, s.delta, s.is_turn, s.is_behind_passage, s.lease.record.k[0, 0].tolist())
        for s in state.spans
    ]
    for capture in state.captures:
        value = float(zlib.crc32(repr(ids[: capture.end]).encode()) % 1000)
        kv = torch.full((1, capture.end - capture.start, 1, 2), value)
        record = ChunkKV(
            key=capture.build.key,
            token_ids=capture.build.token_ids,
            base_position=capture.start,
            k=kv,
            v=kv.clone(),
        )
        capture.build.commit(record)
    state.finish(state.prompt.size)
    if state.request.conversation:
        kv = torch.full((len(ids) + 4, 1, 2), float(stamp))
        pool = SimpleNamespace(get_key_buffer=lambda i: kv, get_value_buffer=lambda i: kv)
        try:
            turn = radix_tree.finished_turn(req, state, pool, torch.arange(len(ids) + 4), len(ids))
            if turn is not None:
                runtime.conversations.keep(turn)
        except Exception as error:
            runtime.say_fault("turn", error)
    told = (
        state.report.fallback,
        state.exact_limit,
        state.turns_end,
        state.turn,
        state.planned_ratio,
    )
    state.drop()
    return seen, told


@pytest.fixture
def make_pair(monkeypatch):
    def submit(scheduler, ids, request, **fields):
        LOCAL.built.append((ids, request.prefix_len))
        return object()

    for module in (batching, background, next_batch):
        monkeypatch.setattr(module, "get_runtime", lambda: LOCAL.runtime)
    monkeypatch.setattr(background.internal_requests, "submit", submit)
    monkeypatch.setattr(background, "_IDLE_TURNS", 1)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        yield lambda memory="turns": Pair(threads, memory)


def prompt_of(order, question=QUESTION):
    ids, spans = list(PREFIX), []
    for chunk in order:
        spans.append((len(ids), len(ids) + len(CHUNKS[chunk])))
        ids += CHUNKS[chunk]
    return [*ids, *question], tuple(spans)


def fuse(order, **fields):
    ids, spans = prompt_of(order)
    return ids, FusionRequest(spans=spans, prefix_len=len(PREFIX), **fields)


FAULTS = (
    "store.resolve",
    "store.match",
    "store.acquire",
    "store.begin_build",
    "store.state",
    "conversations.table.find",
    "conversations.table.has_room",
    "conversations.table.add",
)
RANK = st.integers(0, 1)
TRIGGERS = st.one_of(
    st.just(()),
    st.tuples(st.just("raise"), RANK, st.sampled_from(FAULTS)),
    st.tuples(st.just("clock"), RANK, st.just("")),
)
ORDERS = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)
STEPS = st.one_of(
    st.tuples(
        st.just("ask"),
        ORDERS,
        st.sampled_from(["spans", "automatic", "talk", "plain talk"]),
        TRIGGERS,
    ),
    st.tuples(st.sampled_from(["idle", "busy"]), TRIGGERS),
    st.tuples(st.just("lose"), RANK, st.integers(0, 9)),
    st.tuples(st.just("full"), RANK),
    st.tuples(st.just("clock"), RANK),
)


def play(pair, step):
    match step:
        case ("ask", order, "automatic", trigger):
            pair.ask(prompt_of(order)[0], FusionRequest(), trigger)
        case ("ask", order, "plain talk", trigger):
            # Of a shorter order, its chunks stand at other places: the oldest turns were cut.
            fusion = FusionRequest(prefix_len=len(PREFIX), conversation="c", passage=False)
            pair.ask(prompt_of(order)[0], fusion, trigger)
        case ("ask", order, how, trigger):
            ids, fusion = fuse(order, conversation="c" if how == "talk" else "")
            pair.ask(ids, fusion, trigger)
        case ("idle", trigger):
            pair.idle(trigger)
        case ("busy", trigger):
            pair.busy(trigger)
        case ("lose", rank, number):
            keys = pair.ranks[rank].store.keys()
            if keys:
                pair.ranks[rank].store.evict(keys[number % len(keys)], force=True)
        case ("full", rank):
            store = pair.ranks[rank].store
            for key in store.keys():  # noqa: SIM118
                store.pin(key)
            store._ledger.byte_budget = max(1, store._ledger.bytes_now)
        case ("clock", rank):
            pair.clocks[rank] += 1000.0


@pytest.mark.parametrize("memory", ["turns", "cached_attention"])
def test_ranks_stay_in_step_whatever_befalls_one_of_them(make_pair, memory):
    @settings(max_examples=60, deadline=None)
    @given(st.lists(STEPS, max_size=12))
    def run(steps):
        pair = make_pair(memory)
        for step in steps:
            play(pair, step)

    run()


@pytest.mark.parametrize("fault", ["loses", "is full", "is late"])
def test_what_one_rank_could_not_store_is_built_again_on_both(make_pair, fault):
    pair = make_pair()
    ids, fusion = fuse([2, 3])
    store = pair.ranks[1].store
    if fault == "is full":
        store._ledger.byte_budget = 1
    pair.ask(ids, fusion, ("clock", 1, "") if fault == "is late" else ())
    pair.idle()
    if fault == "loses":
        store.clear()
    store._ledger.byte_budget = 1 << 20
    pair.clocks[:] = [5000.0, 5000.0]
    assert pair.ask(ids, fusion)[0] == [] or fault == "is late"
    pair.idle()
    assert [len(runtime.store) for runtime in pair.ranks] == [2, 2]
    loaded, _ = pair.ask(ids, fusion)
    assert [(start, end) for start, end, *_ in loaded] == list(fusion.spans)


def test_ranks_that_measure_otherwise_plan_the_same_ratio(make_pair):
    pair = make_pair()
    for _ in range(2):
        pair.ask(*fuse([2, 3]))
        pair.idle()
    for rank, runtime in enumerate(pair.ranks):
        for _ in range(16):
            runtime.rates.note_forward(100, 0.1 * (1 + rank))
            runtime.rates.note_load("memory", 1000, 0.03 / (1 + rank))
    ids, fusion = fuse([3, 2], policy="adaptive")
    loaded, told = pair.ask(ids, fusion)
    assert len(loaded) == 2
    # 16 bytes per token at rank 0's 0.03 s per 1000, over rank 1's 2 ms per row.
    assert told[-1] == pytest.approx(16 * 0.03 / 1000 / 0.002)


@pytest.mark.parametrize("held", [(0, 0), (0, 1), (1, 0)])
def test_a_run_of_the_same_tokens_from_another_chunk_is_another_run(make_pair, held):
    pair = make_pair()
    for chunk in (0, 1):
        ids, spans = prompt_of([chunk])
        pair.ask(ids, FusionRequest(mode="build", spans=spans, prefix_len=len(PREFIX)))
    for runtime, kept in zip(pair.ranks, held, strict=True):
        assert runtime.store.evict(runtime.store.keys()[1 - kept])
    loaded, _ = pair.ask([*PREFIX, 150, *CHUNKS[0][2:], *QUESTION], FusionRequest())
    assert len(loaded) == (held[0] == held[1])


def test_a_turn_that_one_rank_lost_is_computed_and_kept_anew_on_both(make_pair):
    pair = make_pair()
    ids, fusion = fuse([2, 3], conversation="c")
    for _ in range(2):
        pair.ask(ids, fusion)
        pair.idle()
    pair.ask(ids, fusion)
    turns = pair.ranks[0].conversations.table
    (segments,) = turns._spaces.of("")
    assert pair.ask(ids, fusion)[1][2] > len(PREFIX)
    assert pair.ranks[0].store.evict(segments[0].key)
    assert pair.ask(ids, fusion)[1][2] == 0
    # Had rank 1 kept the old one, the heads of two computations would meet here.
    assert pair.ask(ids, fusion)[1][2] > len(PREFIX)


def test_a_turn_that_one_rank_could_not_keep_is_kept_by_none(make_pair):
    pair = make_pair()
    for _ in range(2):
        pair.ask(*fuse([2, 3]))
        pair.idle()
    ids, fusion = fuse([2, 3], conversation="c")
    pair.ask(ids, fusion, ("raise", 1, "store.begin_build"))
    assert [len(runtime.conversations.table) for runtime in pair.ranks] == [0, 0]
    # Had rank 0 counted it, the ranks would number their turns differently from here on.
    assert pair.ask(ids, fusion)[1][2] == 0
    assert pair.ask(ids, fusion)[1][2] > len(PREFIX)


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_turns_behind_a_cut_are_moved_alike_on_both_ranks(make_pair, lost):
    pair = make_pair("cached_attention")
    fusion = FusionRequest(prefix_len=len(PREFIX), conversation="c", passage=False)
    pair.ask(prompt_of([2])[0], fusion)
    whole = [*prompt_of([2])[0], *CHUNKS[3], *QUESTION]
    pair.ask(whole, fusion)
    (turns,) = pair.ranks[lost or 0].conversations.table._spaces.of("")
    # The second turn is computed over the first one as it is stored, which is exact.
    assert [turn.exact for turn in turns] == [True, True]
    if lost is not None:
        assert pair.ranks[lost].store.evict(turns[1].key)
    cut = [*PREFIX, *CHUNKS[3], *QUESTION, 211, 212, 213]
    loaded, told = pair.ask(cut, fusion)
    start = len(PREFIX)
    if lost is None:
        distance = len(CHUNKS[2]) + len(QUESTION)
        assert [(s, e, d, turn) for s, e, d, turn, *_ in loaded] == [
            (start, len(cut) - 3, -distance, True)
        ]
        assert told[2] == len(cut) - 3
    else:
        assert told[2] == 0


@pytest.mark.parametrize("comes", [True, False])
def test_a_request_waits_on_both_ranks_while_one_of_them_fetches(make_pair, monkeypatch, comes):
    """Rank 1 has its chunk in memory, rank 0 hears of its own later, or not in time."""
    pair = make_pair()
    fetch = SimpleNamespace(
        has_header=False, has_layers=lambda number: True, is_ended=False, loading=None
    )
    fusion = FusionRequest(spans=((4, 86),), prefix_len=4)
    reqs = [Request([*PREFIX, *CHUNKS[0], *QUESTION], fusion) for _ in range(2)]
    state_of(reqs[0]).await_fetches([fetch])
    pair.ranks[0].fetcher = SimpleNamespace(wait=lambda is_met, timeout_s: is_met())
    idle = SimpleNamespace(can_run_list=[], running_batch=SimpleNamespace(is_empty=lambda: True))
    monkeypatch.setattr(fetching, "HEADER_WAIT_S", 60.0)

    def ask(rank, runtime):
        return fetching.must_wait(runtime, idle, reqs[rank], state_of(reqs[rank]))

    waits = [pair.both(ask, None) for _ in range(3)]
    if comes:
        fetch.has_header = True
    else:
        monkeypatch.setattr(fetching, "HEADER_WAIT_S", 0.0)
    assert [*waits, pair.both(ask, None)] == [True, True, True, False]

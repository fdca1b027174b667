"""Two ranks decide alike whatever befalls one of them: real stores, queues and admission in two threads, no engine.

A vote that only one rank comes to would hang an engine; here it breaks a barrier. The KV of a chunk is made from what
it is a function of, that of a conversation's turn from the request that computed it, so that mixed heads show.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pair import CHUNKS, LOCAL, PREFIX, QUESTION, Pair, Request, fuse, prompt_of

from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.admission import fetching, next_batch
from rag_pipeline.sglang_plugin.fusion.admission import prefill_adder as batching
from rag_pipeline.sglang_plugin.fusion.builds import idle as background
from rag_pipeline.sglang_plugin.fusion.request.state import state_of


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

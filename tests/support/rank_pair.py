"""Two ranks in two threads that run one script: real stores, queues and admission, and no engine."""

from __future__ import annotations

import concurrent.futures
import operator
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import torch
from tiny_facts import tiny_facts

from chunk_cache import ChunkKV
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.admission import next_batch, radix_tree
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


def prompt_of(order, question=QUESTION):
    ids, spans = list(PREFIX), []
    for chunk in order:
        spans.append((len(ids), len(ids) + len(CHUNKS[chunk])))
        ids += CHUNKS[chunk]
    return [*ids, *question], tuple(spans)


def fuse(order, **fields):
    ids, spans = prompt_of(order)
    return ids, FusionRequest(spans=spans, prefix_len=len(PREFIX), **fields)

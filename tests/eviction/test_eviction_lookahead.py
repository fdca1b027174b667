"""Look-ahead: the published windows, the order within them, the watermark, the TTL, and the queue behind it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_cache.eviction import WaitingJob
from chunk_cache.eviction.lookahead import LookAheadPolicy
from chunk_cache.eviction.waiting import WaitingQueue
from chunk_cache.eviction.window import RunningMean, eviction_window, prefetch_window
from rag_eval.simulator.two_tiers import DISK, MEMORY, TwoTiers


def job(name: object, *keys: int, num_bytes: int = 0) -> WaitingJob:
    return WaitingJob(name, keys, num_bytes)


# -- the windows -----------------------------------------------------------------------------------


@given(
    memory=st.integers(0, 10**12), disk=st.integers(0, 10**12), size=st.integers(1, 10**9)
)  # fmt: skip
def test_the_windows_are_the_published_formulas(memory: int, disk: int, size: int) -> None:
    assert prefetch_window(memory, size) == memory // size
    assert eviction_window(memory, disk, size) == (memory + disk) // size
    assert prefetch_window(memory, size) <= eviction_window(memory, disk, size)


def test_the_windows_follow_the_mean_size_of_the_jobs() -> None:
    policy = LookAheadPolicy(memory_bytes=1000, disk_bytes=3000, watermark=0.1)
    assert (policy.prefetch_jobs, policy.window_jobs) == (0, None)
    policy.note_queue([job("a", 1, num_bytes=100), job("b", 2, num_bytes=300)])
    assert policy.mean_job_bytes == 200
    # C_mem of prefetching is what the watermark leaves: 900 / 200, and (1000 + 3000) / 200.
    assert (policy.reserve_bytes, policy.prefetch_jobs, policy.window_jobs) == (100, 4, 20)
    policy.note_queue([job("a", 1, num_bytes=100), job("b", 2, num_bytes=300)])
    assert policy.mean_job_bytes == 200  # a job that waits on is counted once
    policy.note_queue([job("c", 3, num_bytes=800)])
    assert policy.mean_job_bytes == 400


def test_a_job_without_a_size_weighs_what_its_items_weigh_and_unknown_ones_the_mean() -> None:
    policy = LookAheadPolicy(memory_bytes=1000)
    policy.note_queue([job("unknown", 1, 2)])
    assert policy.window_jobs is None  # nothing is known, so nothing is assumed
    policy.insert(1, 10)
    policy.insert(2, 30)
    policy.note_queue([job("half known", 2, 3)])
    assert policy.mean_job_bytes == 30 + 20


def test_the_mean_follows_a_load_that_changes() -> None:
    mean = RunningMean()
    for value in (1.0, 2.0, 6.0):
        mean.add(value)
    assert mean.value == pytest.approx(3.0)
    for _ in range(20_000):
        mean.add(10.0)
    assert mean.value == pytest.approx(10.0, abs=1e-3)


# -- the order -------------------------------------------------------------------------------------


def test_victims_are_first_what_nobody_waits_for_then_the_tail_of_the_window() -> None:
    policy = LookAheadPolicy(memory_bytes=100)
    for key in range(6):
        policy.insert(key, 1)
    policy.note_queue([job("next", 0, 4), job("then", 1, 0), job("last", 5)])
    # 0 waits for its first job. 4 and 0 are of one job: the longest unused of the two goes first.
    assert list(policy.victims()) == [2, 3, 5, 1, 0, 4]
    policy.note_queue([job("then", 1, 0), job("last", 5)])  # the first was admitted
    assert list(policy.victims()) == [2, 3, 4, 5, 0, 1]
    policy.note_queue([job("last", 5), job("then", 1, 0)])  # overtaken
    assert list(policy.victims()) == [2, 3, 4, 0, 1, 5]
    policy.note_queue([])
    assert list(policy.victims()) == [0, 1, 2, 3, 4, 5]


def test_jobs_behind_the_window_do_not_count() -> None:
    policy = LookAheadPolicy(memory_bytes=20, disk_bytes=10)
    for key in range(4):
        policy.insert(key, 10)
    jobs = [job(n, n, num_bytes=10) for n in range(4)]
    policy.note_queue(jobs)
    policy.note_queue(jobs)
    assert policy.window_jobs == 3
    assert [policy.is_awaited(key) for key in range(4)] == [True, True, True, False]
    assert list(policy.victims()) == [3, 2, 1, 0]
    assert [waiting.name for waiting in policy.jobs_to_prefetch()] == [0, 1]


def test_what_is_stored_while_it_is_awaited_takes_its_place() -> None:
    policy = LookAheadPolicy(memory_bytes=100)
    policy.note_queue([job("a", 1), job("b", 2)])
    for key in (3, 2, 1):
        policy.insert(key, 1)
    assert list(policy.victims()) == [3, 2, 1]


@pytest.mark.parametrize(
    ("variant", "order"),
    [("lru", [2, 3, 1]), ("lfu", [2, 1, 3]), ("fifo-birth", [1, 2, 3]), ("ttl", [2, 1, 3])],
)
def test_the_tie_break_is_a_parameter(variant: str, order: list[int]) -> None:
    policy = LookAheadPolicy(memory_bytes=100, variant=variant, ttl_s=10)
    for now, key in enumerate((1, 2, 3)):
        policy.insert(key, 1, now=now)
    policy.use(3, 7.0)
    policy.use(3, 8.0)
    policy.use(1, 9.0)
    assert list(policy.victims(now=12.0)) == order  # 2 was not used for 11 s


def test_what_outlived_its_ttl_is_told_once_unless_it_is_held_or_awaited() -> None:
    policy = LookAheadPolicy(memory_bytes=100, ttl_s=10)
    for key in (1, 2, 3, 4):
        policy.insert(key, 1, now=0.0)
    policy.hold(1)
    policy.note_queue([job("a", 2)])
    policy.use(3, 5.0)
    assert policy.expire(9.0) == []
    assert policy.expire(10.0) == [4]
    assert policy.expire(14.0) == []
    assert policy.expire(15.0) == [3]
    policy.use(4, 16.0)
    assert policy.expire(25.0) == []
    assert policy.expire(26.0) == [4]


@pytest.mark.parametrize("options", [{"ttl_s": 0.0}, {"watermark": 1.0}, {"memory_bytes": -1}])
def test_impossible_options_are_refused_in_one_line(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give") as caught:
        LookAheadPolicy(**{"memory_bytes": 1} | options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# -- the queue -------------------------------------------------------------------------------------

QUEUES = st.lists(st.lists(st.integers(0, 8), unique=True, max_size=8), max_size=12)
KEYS = {name: tuple({(name * 3 + i * i) % 7 for i in range(1 + name % 4)}) for name in range(9)}


@given(queues=QUEUES)
def test_the_order_of_tickets_is_the_order_of_first_jobs(queues: list[list[int]]) -> None:
    queue = WaitingQueue()
    known: set[int] = set()
    for names in queues:
        change = queue.update(WaitingJob(name, KEYS[name]) for name in names)
        assert [arrived.name for arrived in change.arrived] == [n for n in names if n not in known]
        known = set(names)
        assert [waiting.name for waiting in queue.jobs()] == names
        first = {key: min(i for i, n in enumerate(names) if key in KEYS[n]) for n in names for key in KEYS[n]}  # fmt: skip
        tickets = {key: queue.ticket(key) for key in range(7)}
        assert {key for key, ticket in tickets.items() if ticket is not None} == set(first)
        for one in first:
            for two in first:
                assert (tickets[one] < tickets[two]) == (first[one] < first[two])  # type: ignore[operator]


@settings(max_examples=50)
@given(queues=QUEUES)
def test_every_change_of_a_ticket_is_told(queues: list[list[int]]) -> None:
    queue = WaitingQueue()
    for names in queues:
        before = {key: queue.ticket(key) for key in range(7)}
        change = queue.update(WaitingJob(name, KEYS[name]) for name in names)
        moved = {key for key in range(7) if queue.ticket(key) != before[key]}
        assert moved <= change.keys


def test_jobs_that_overtake_each_other_for_ever_leave_nothing_behind() -> None:
    queue = WaitingQueue()
    jobs = [WaitingJob(n, ("shared", n)) for n in range(4)]
    for turn in range(2000):
        rest = jobs[1:]
        queue.update([jobs[0], *rest[turn % 3 :], *rest[: turn % 3]])
    assert len(queue._tickets["shared"]) < 100
    queue.update([])
    assert not queue._tickets
    assert not queue._alive


def test_a_name_that_stands_twice_counts_once() -> None:
    queue = WaitingQueue()
    change = queue.update([job("a", 1, 1), job("a", 2), job("b", 2)])
    assert [arrived.name for arrived in change.arrived] == ["a", "b"]
    assert queue.ticket(1) == 1
    assert queue.ticket(2) == 2


# -- two tiers -------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 15), min_size=1, max_size=4),  # what a request reads
        st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=3), max_size=5),  # the queue
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(
    steps=STEPS,
    memory=st.integers(10, 60),
    disk=st.integers(0, 80),
    variant=st.sampled_from(LookAheadPolicy.variants),
)
def test_nothing_of_the_window_is_dropped_while_something_else_is_there(
    steps: list[tuple[list[int], list[list[int]]]], memory: int, disk: int, variant: str
) -> None:
    policy = LookAheadPolicy(
        memory_bytes=memory, disk_bytes=disk, variant=variant, watermark=0.2, ttl_s=7
    )
    tiers = TwoTiers(memory, disk, policy)
    for now, (keys, waiting) in enumerate(steps):
        policy.note_queue(job((now, n), *w) for n, w in enumerate(waiting))
        for key in keys:
            before = set(policy.items) | {key}
            tiers.use(key, 3 + key % 5, key, float(now))
            dropped = before - set(policy.items)
            if any(map(policy.is_awaited, dropped)):
                assert all(map(policy.is_awaited, policy.items)), "something else could have gone"
            # The watermark holds at all times, and so do the budgets.
            assert tiers.tokens_in[MEMORY] <= memory - policy.reserve_bytes
            assert tiers.tokens_in[DISK] <= disk
            for tier in (MEMORY, DISK):
                weight = sum(i.num_bytes for i in policy.items.values() if i.group == tier)
                assert tiers.tokens_in[tier] == weight
            policy.check()

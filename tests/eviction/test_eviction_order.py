"""Each policy against a plain reference: the order of victims, who is a candidate, and what a change costs."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_cache.errors import IntegrityError
from chunk_cache.eviction import EVICTIONS, EvictionPolicy, StoredItem, WaitingJob, create_eviction
from chunk_cache.eviction.belady import BeladyPolicy
from chunk_cache.eviction.lookahead import LookAheadPolicy
from chunk_cache.eviction.lru import LRUPolicy
from chunk_cache.eviction.ranking import Ranking

NAMES = [
    "lru",
    "lfu",
    "fifo",
    "lookahead",
    "lookahead:lfu",
    "lookahead:fifo-birth",
    "lookahead:ttl",
]
ACCESSES = st.lists(st.integers(0, 7), max_size=80)


def single_tier_hits(policy: EvictionPolicy, accesses: list[int], room: int) -> list[bool]:
    """One tier of items of one size: what is missing is stored, and the first victim makes room before."""
    hits = []
    for number, key in enumerate(accesses):
        if isinstance(policy, BeladyPolicy):
            policy.job = number
        hits.append(key in policy.items)
        if hits[-1]:
            policy.use(key, float(number))
            continue
        if len(policy.items) == room:
            policy.remove(next(policy.victims(now=float(number))))
        policy.insert(key, 1, now=float(number))
        policy.check()
    return hits


@given(accesses=ACCESSES, room=st.integers(1, 5))
def test_lru_is_an_ordered_dict(accesses: list[int], room: int) -> None:
    plain: OrderedDict[int, None] = OrderedDict()
    expected = []
    for key in accesses:
        expected.append(key in plain)
        plain[key] = None
        plain.move_to_end(key)
        if len(plain) > room:
            plain.popitem(last=False)
    policy = create_eviction("lru", memory_bytes=room)
    assert single_tier_hits(policy, accesses, room) == expected
    assert list(policy.victims()) == list(plain)


@given(accesses=ACCESSES, room=st.integers(1, 5))
def test_fifo_and_lfu_are_what_their_names_say(accesses: list[int], room: int) -> None:
    stored: list[int] = []
    uses: Counter[int] = Counter()
    fifo, lfu = (create_eviction(name, memory_bytes=room) for name in ("fifo", "lfu"))
    expected = []
    for key in accesses:
        expected.append(key in stored)
        if key not in stored:
            stored = [*stored, key][-room:]
    assert single_tier_hits(fifo, accesses, room) == expected
    last: dict[int, int] = {}
    expected = []
    for number, key in enumerate(accesses):
        expected.append(key in uses)
        if key not in uses and len(uses) == room:
            victim = min(uses, key=lambda k: (uses[k], last[k]))
            del uses[victim]
        uses[key] += 1
        last[key] = number
    assert single_tier_hits(lfu, accesses, room) == expected


@given(accesses=ACCESSES, room=st.integers(1, 5))
def test_nobody_has_more_hits_than_belady(accesses: list[int], room: int) -> None:
    future: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(accesses):
        future[key].append(number)
    best = sum(single_tier_hits(BeladyPolicy(memory_bytes=room, future=future), accesses, room))
    for name in NAMES:
        policy = create_eviction(name, memory_bytes=room)
        assert sum(single_tier_hits(policy, accesses, room)) <= best, name


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "hold", "release", "use", "move", "remove"]),
        st.integers(0, 9),
        st.sampled_from(["a", "b"]),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(operations=OPERATIONS)
def test_candidates_are_the_items_that_nobody_holds(
    name: str, operations: list[tuple[str, int, str]]
) -> None:
    policies = [create_eviction(name, memory_bytes=100) for _ in range(2)]
    groups: dict[int, str] = {}
    held: set[int] = set()
    for now, (operation, key, group) in enumerate(operations):
        if (operation == "insert") == (key in groups):
            continue
        for policy in policies:
            if operation == "insert":
                policy.insert(key, key + 1, now=now, group=group, is_held=group == "b")
            elif operation in ("release", "use"):
                if (operation == "release") != (key in held):
                    continue
                getattr(policy, operation)(key, now)
            elif operation == "move":
                policy.move(key, group)
            else:
                getattr(policy, operation)(key)
        if operation == "insert":
            groups[key] = group
            held |= {key} if group == "b" else set()
        elif operation == "hold":
            held.add(key)
        elif operation == "release":
            held.discard(key)
        elif operation == "move":
            groups[key] = group
        elif operation == "remove":
            del groups[key]
            held.discard(key)
        for policy in policies:
            policy.check()
        for name_of_group in ("a", "b"):
            one, two = (list(policy.victims(name_of_group, now)) for policy in policies)
            assert one == two  # the same calls, the same order
            free = {k for k, g in groups.items() if g == name_of_group and k not in held}
            assert set(one) == free
            assert len(one) == len(free)
        assert set(policies[0].groups()) == {g for k, g in groups.items() if k not in held}


def test_a_session_is_of_one_age_and_its_end_goes_first() -> None:
    policy = create_eviction("fifo", memory_bytes=10)
    for key in ("a2", "a1", "b1"):
        policy.insert(key, 1, session=key[0])
    for key in ("a3", "a2", "a1"):  # the next turn of the older conversation, its end first
        if key in policy.items:
            policy.use(key)
        else:
            policy.insert(key, 1, session="a")
    assert list(policy.victims()) == ["a3", "a2", "a1", "b1"]
    for key in ("a1", "a2", "a3"):
        policy.remove(key)
    policy.insert("a1", 1, session="a")  # nothing of it was left: it is young again
    assert list(policy.victims()) == ["b1", "a1"]


def test_a_key_is_stored_once() -> None:
    policy = create_eviction("lru", memory_bytes=10)
    policy.insert("k", 1)
    with pytest.raises(IntegrityError, match="k is stored twice"):
        policy.insert("k", 1)


def test_an_engine_refuses_what_it_cannot_run() -> None:
    for name, told in (
        ("belady", "simulate tiers` only; choose one of lru, lfu, fifo, lookahead"),
        (
            "mru",
            "choose one of lru, lfu, fifo, lookahead, lookahead:lru, lookahead:lfu, lookahead:fifo-birth, lookahead:ttl.$",
        ),
        ("lru:old", "no variant 'old'; allowed: none"),
        ("lookahead:random", "allowed: lru, lfu, fifo-birth, ttl"),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            create_eviction(name, memory_bytes=1)
        assert "\n" not in str(caught.value)


class NoPolicy(LRUPolicy):
    """Of another distribution, and broken."""

    def __init__(self, **budgets: object) -> None:
        raise KeyError("no such\nfile")


def test_a_policy_that_cannot_be_made_is_refused_in_one_line() -> None:
    EVICTIONS.register("broken", NoPolicy)
    try:
        with pytest.raises(ValueError, match="'broken' cannot be made: KeyError") as caught:
            create_eviction("broken", memory_bytes=1)
    finally:
        EVICTIONS.unregister("broken")
    assert "\n" not in str(caught.value)


@given(changes=st.lists(st.tuples(st.integers(0, 20), st.integers(-1, 5)), max_size=200))
def test_a_ranking_is_a_sorted_list(changes: list[tuple[int, int]]) -> None:
    ranking = Ranking()
    plain: dict[int, tuple[int, int]] = {}
    for count, (key, rank) in enumerate(changes):
        if rank < 0:
            assert ranking.discard(key) == (plain.pop(key, None) is not None)
        else:
            ranking.set(key, (rank,))
            plain[key] = (rank, count)
        ranking.check()
    assert list(ranking) == sorted(plain, key=lambda key: plain[key])
    assert len(ranking) == len(plain)


class CountingRank:
    """A rank that counts how often it is compared."""

    compared = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __lt__(self, other: CountingRank) -> bool:
        CountingRank.compared += 1
        return self.value < other.value

    def __eq__(self, other: object) -> bool:
        CountingRank.compared += 1
        return isinstance(other, CountingRank) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]


def test_an_operation_among_100_000_items_costs_some_tens_of_comparisons() -> None:
    draw = random.Random(0)
    ranking = Ranking()
    for key in range(100_000):
        ranking.set(key, (CountingRank(draw.randrange(1 << 30)),))
    CountingRank.compared = 0
    for _ in range(5_000):
        ranking.set(draw.randrange(100_000), (CountingRank(draw.randrange(1 << 30)),))
        victim = next(iter(ranking))
        ranking.discard(victim)
        ranking.set(victim, (CountingRank(draw.randrange(1 << 30)),))
    # log2(100,000) is 17; a scan of the items would be 100,000. Tuples compare each pair twice.
    assert CountingRank.compared / 5_000 < 4 * 2 * 17


def test_a_queue_that_moves_on_costs_what_came_and_went() -> None:
    ranked = 0

    class Counting(LookAheadPolicy):
        def rank(self, item: StoredItem) -> tuple[int, ...]:
            nonlocal ranked
            ranked += 1
            return super().rank(item)

    policy = Counting(memory_bytes=10**9)
    for key in range(20_000):
        policy.insert(key, 1)
    jobs = [WaitingJob(n, range(10 * n, 10 * n + 10)) for n in range(2_000)]
    policy.note_queue(jobs[:1000])
    ranked = 0
    for head in range(1, 101):
        policy.note_queue(jobs[head : head + 1000])
    assert ranked == 100 * (10 + 10)

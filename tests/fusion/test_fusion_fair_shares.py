"""Prefixes, conversations and waiting builds are shared evenly: one tenant's loop pushes out its own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.conversations.turn_places import namespace_of
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.runtime.build_queue import BuildQueue, MissingChunk
from rag_pipeline.sglang_plugin.fusion.runtime.fair_table import FairTable
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

CALLS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9)), max_size=60)


def chunk(tenant, key):
    prefix = SimpleNamespace(tenant=RadixNamespace(None, tenant))
    return MissingChunk(prefix=prefix, ids=None, key=(tenant, key))


@given(CALLS, st.integers(1, 8))
def test_a_table_is_bounded_and_only_who_holds_most_loses(calls, capacity):
    table = FairTable()
    for tenant, key in calls:
        before = {name: len(table.of(name)) for name in "abcd"}
        is_new = table.get(tenant, key) is None
        gone = table.put(tenant, key, (tenant, key), capacity)
        assert len(table) <= capacity
        assert table.get(tenant, key) == (tenant, key) or (tenant, key) in gone
        for loser, _ in gone:
            held = before[loser] + (is_new and loser == tenant)
            assert held == max(before[name] + (is_new and name == tenant) for name in "abcd")


def test_one_tenant_has_the_whole_table_until_another_comes():
    table = FairTable()
    for key in range(9):
        table.put("loop", key, key, 8)
    assert table.of("loop") == list(range(1, 9))
    for key in range(3):
        table.put("quiet", key, key, 8)
    for key in range(100):
        table.put("loop", key, key, 8)
    assert table.of("quiet") == [0, 1, 2]
    for key in range(9):  # newcomers are heard even when everybody holds one
        table.put(f"new {key}", key, key, 8)
        assert table.of(f"new {key}") == [key]


@given(CALLS, st.integers(0, 8))
def test_waiting_builds_are_bounded_and_taken_in_turn(calls, capacity):
    queue = BuildQueue()
    for tenant, key in calls:
        if (tenant, key) in queue:
            continue
        before = [c.key for c in queue]
        dropped = queue.add(chunk(tenant, key), capacity)
        after = [c.key for c in queue]
        assert len(queue) == len(after) == len(before) + 1 - dropped <= max(capacity, 0)
        for lost, _ in set(before) - set(after):
            held = [sum(name == other for name, _ in before) for other in "abcd"]
            assert sum(name == lost for name, _ in before) == max(held)
            assert sum(name == tenant for name, _ in after) < max(held)
    order = [c.key for c in queue]
    assert [queue.take().key for _ in range(len(queue))] == order
    turns = [[name for name, _ in order].index(name) for name in {name for name, _ in order}]
    assert sorted(turns) == list(
        range(len(turns))
    )  # everybody's first comes before anybody's second


def test_who_splits_its_salt_has_one_share_all_the_same():
    queue = BuildQueue()
    for number in range(8):
        queue.add(chunk(f"loop/{number}", number), 8)
    queue.add(chunk("quiet/1", 0), 8)
    queue.add(chunk("quiet/2", 1), 8)
    assert [queue.take().key[0] for _ in range(4)] == ["loop/0", "quiet/1", "loop/1", "quiet/2"]
    acme = RadixNamespace(None, "acme")
    for same in (
        RadixNamespace("acme", None),
        RadixNamespace("acme/y", None),
        RadixNamespace("any", "acme/x"),
    ):
        assert same.owner == acme.owner
        assert same.salt != acme.salt  # its chunks are its own
    assert RadixNamespace("acme", "globex").owner != acme.owner
    assert RadixNamespace(None, None).owner == RadixNamespace("", "").owner == ""
    assert RadixNamespace(None, "/x").owner  # not nobody's


def test_who_splits_its_salt_shares_a_row_of_the_tables_but_no_prefix_and_no_conversation():
    facts = SimpleNamespace(context=lambda prefix_digest, tenant: f"{prefix_digest} {tenant}")
    runtime = FusionRuntime(FusionConfig(), facts)
    prompt = np.arange(40)
    tenants = [
        RadixNamespace(None, "acme"),
        RadixNamespace(None, "acme/x"),
        RadixNamespace("acme", None),
    ]
    known = [runtime.prefix(prompt, 32, tenant) for tenant in tenants]
    assert len({prefix.context for prefix in known}) == 3
    for tenant, prefix in zip(tenants, known, strict=True):
        assert runtime.prefix(prompt, 32, tenant) is prefix
        assert runtime.prefixes_of(prompt, tenant) == [prefix]
    assert runtime.prefixes_of(prompt, RadixNamespace(None, "acme/y")) == []
    state = SimpleNamespace(
        request=FusionRequest(conversation="c", passage=True),
        policy=SimpleNamespace(identity="p"),
    )
    assert len({namespace_of(runtime, state, tenant) for tenant in tenants}) == 3

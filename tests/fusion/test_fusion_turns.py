"""Finding the turns that a prompt goes through, against a plain definition; real records, no engine."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_cache import ChunkKey, ChunkKV, KVContext, MemoryStore
from rag_pipeline.sglang_plugin.fusion.conversations.turn_table import TurnTable


def put(store, ids, parent):
    context = KVContext(
        model_fingerprint="m",
        dtype="float32",
        kv_dtype="float32",
        rope="{}",
        prefix_digest="p",
        tenant=repr(parent),
    )
    key = ChunkKey.of(context, ids)
    kv = torch.zeros(1, len(ids), 1, 2)
    record = ChunkKV(key=key, token_ids=ids, base_position=0, k=kv, v=kv.clone())
    assert store.put(record)
    return key


@st.composite
def trees(draw):
    """Segments as (parent index or None, whole tokens, start), over a tiny alphabet so that they collide."""
    made = []
    for _ in range(draw(st.integers(1, 7))):
        parent = draw(st.sampled_from([None, *range(len(made))]))
        if parent is None:
            head = draw(st.lists(st.integers(0, 1), max_size=4))
        else:
            whole, start = made[parent][1:]
            head = whole[: draw(st.integers(start + 1, len(whole)))]
        tail = draw(st.lists(st.integers(0, 1), min_size=1, max_size=6))
        made.append((parent, head + tail, len(head)))
    return made


@settings(max_examples=300, deadline=None)
@given(trees(), st.lists(st.integers(0, 1), max_size=16), st.integers(0, 6), st.booleans())
def test_the_longest_chain_is_found_and_each_run_of_it_fits(tree, prompt, lost, loses):
    store = MemoryStore(1 << 20)
    conversations = TurnTable(store)
    numbers, keys = [], []
    for index, (parent, whole, start) in enumerate(tree):
        key = put(store, whole[start:], (index, parent))
        before = 0 if parent is None else numbers[parent]
        ids = np.array(whole, dtype=np.int64)
        numbers.append(conversations.add("space", ids, start, before, key).number)
        keys.append(key)
    gone = set()
    if loses and lost < len(tree):
        store.evict(keys[lost])
        gone.add(lost)
    for index, (parent, _, _) in enumerate(tree):
        if parent in gone:
            gone.add(index)
    reach = 0
    for index, (_, whole, start) in enumerate(tree):
        if index not in gone and prompt[: start + 1] == whole[: start + 1] and start < len(prompt):
            same = next(
                (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
                min(len(prompt), len(whole)),
            )
            reach = max(reach, same)
    chain = conversations.find("space", np.array(prompt, dtype=np.int64))
    assert (chain[-1][1].prompt_end if chain else 0) == reach
    at, parent = None, 0
    for segment, match in chain:
        index = numbers.index(segment.number)
        assert index not in gone
        assert segment.parent == parent
        assert at is None or match.prompt_start == at
        run = prompt[match.prompt_start : match.prompt_end]
        assert run == tree[index][1][match.prompt_start : match.prompt_end]
        assert (match.chunk_offset, match.prompt_start) == (0, tree[index][2])
        at, parent = match.prompt_end, segment.number
    assert conversations.find("another", np.array(prompt, dtype=np.int64)) == []


def test_the_least_recently_used_conversation_is_forgotten_with_its_records(monkeypatch):
    from rag_pipeline.sglang_plugin.fusion.conversations import turn_table as turns

    monkeypatch.setattr(turns, "_MAX_CONVERSATIONS", 2)
    monkeypatch.setattr(turns, "_MAX_TURNS", 1)
    store = MemoryStore(1 << 20)
    conversations = TurnTable(store)
    ids = np.arange(8)
    for name in ("a", "b"):
        assert conversations.has_room(name)
        conversations.add(name, ids, 2, 0, put(store, ids[2:], name))
        assert not conversations.has_room(name)
    assert conversations.find("a", ids)
    conversations.add("c", ids, 2, 0, put(store, ids[2:], "c"))
    assert [bool(conversations.find(name, ids)) for name in "abc"] == [True, False, True]
    assert (len(conversations), len(store)) == (2, 2)
    store.clear()
    assert conversations.find("a", ids) == []
    assert conversations.has_room("a")

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


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5),
    st.integers(0, 20),
    st.lists(st.integers(0, 2), max_size=5),
    st.integers(1, 4),
)
def test_the_longest_moved_run_is_found_and_its_tokens_are_those_of_the_turns(
    prefix, turns, cut, new, least
):
    store = MemoryStore(1 << 20)
    table = TurnTable(store)
    whole, parent, held = list(prefix), 0, {}
    for index, turn in enumerate(turns):
        start = len(whole)
        whole = [*whole, *turn]
        key = put(store, turn, (index, parent))
        parent = table.add("space", np.array(whole), start, parent, key).number
        held[key] = (start, turn)
    content = whole[len(prefix) :]
    prompt = [*prefix, *content[cut:], *new]
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
        min(len(prompt), len(whole)),
    )
    rest = prompt[same:]
    lengths = [
        next(
            (i for i, (a, b) in enumerate(zip(rest, tail, strict=False)) if a != b),
            min(len(rest), len(tail)),
        )
        for place in range(same - len(prefix) + 1, len(content))
        if (tail := content[place:])
    ]
    wanted = max(lengths, default=0)
    found = table.find_moved("space", np.array(prompt), at_least=least)
    if wanted < least:
        assert found is None
        return
    assert found is not None
    assert found.distance > 0
    assert found.number == parent
    assert found.matches[0].prompt_start == same
    at = same
    for match in found.matches:
        start, turn = held[match.key]
        assert match.prompt_start == at
        assert match.prompt_start + found.distance == start + match.chunk_offset
        assert turn[match.chunk_offset : match.chunk_end] == prompt[at : match.prompt_end]
        at = match.prompt_end
    # Where a run stands at very many places, the first ones are compared.
    assert at - same <= wanted
    assert at - same == wanted or len(lengths) > 8

"""Finding the turns that a prompt goes through, against a plain definition; real records, no engine."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunk_cache import ChunkKey, ChunkKV, ChunkState, KVContext, MemoryStore, hash_token_ids
from rag_pipeline.sglang_plugin.fusion.conversations import turn_table
from rag_pipeline.sglang_plugin.fusion.conversations.lineage import EXACT, Lineage
from rag_pipeline.sglang_plugin.fusion.conversations.stored_turns import StoredTurn
from rag_pipeline.sglang_plugin.fusion.conversations.turn_table import TurnTable


def put(table, store, space, ids, start, parent=0, through="a digest"):
    """Store a turn that ends a list of tokens, and list it; as a conversation memory does."""
    whole = np.array(ids, dtype=np.int64)
    lineage = Lineage(
        space=space,
        start=start,
        before=hash_token_ids(whole[:start]),
        parent=parent,
        through=through,
    )
    context = KVContext(
        model_fingerprint="m",
        dtype="float32",
        kv_dtype="float32",
        rope="{}",
        prefix_digest=lineage.encode(),
    )
    key = ChunkKey.of(context, whole[start:])
    kv = torch.zeros(1, whole.size - start, 1, 2)
    record = ChunkKV(key=key, token_ids=whole[start:], base_position=start, k=kv, v=kv.clone())
    assert store.put(record) or store.state(key) is ChunkState.READY
    turn = StoredTurn(lineage=lineage, ids=whole[start:], key=key, context=context)
    table.add(turn)
    return turn


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
    for parent, whole, start in tree:
        before = 0 if parent is None else numbers[parent]
        turn = put(conversations, store, "space", whole, start, before)
        numbers.append(turn.number)
        keys.append(turn.key)
    gone = set()
    if loses and lost < len(tree):
        store.evict(keys[lost])
        # Turns of the same tokens behind the same tokens are one turn.
        gone.update(index for index, key in enumerate(keys) if key == keys[lost])
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
    monkeypatch.setattr(turns, "MAX_TURNS", 1)
    store = MemoryStore(1 << 20)
    conversations = TurnTable(store)
    ids = np.arange(8)
    for name in ("a", "b"):
        assert conversations.has_room(name, ids)
        put(conversations, store, name, ids, 2)
        assert not conversations.has_room(name, ids)
    assert conversations.find("a", ids)
    put(conversations, store, "c", ids, 2)
    assert [bool(conversations.find(name, ids)) for name in "abc"] == [True, False, True]
    assert (len(conversations), len(store)) == (2, 2)
    store.clear()
    assert conversations.find("a", ids) == []
    assert conversations.has_room("a", ids)


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
    for turn in turns:
        start = len(whole)
        whole = [*whole, *turn]
        made = put(table, store, "space", whole, start, parent)
        parent, held[made.key] = made.number, (start, turn)
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


def a_conversation(table, store, through=EXACT):
    """Three turns of eight tokens behind a prefix of four; returns them and all tokens."""
    whole, turns, parent = list(range(4)), [], 0
    for number in range(3):
        start = len(whole)
        whole = [*whole, *range(100 + 10 * number, 108 + 10 * number)]
        turns.append(put(table, store, "space", whole, start, parent, through))
        parent = turns[-1].number
    return turns, np.array(whole)


def test_what_a_lost_turn_leaves_of_those_behind_it():
    """Exact turns stand on the tokens in front of them alone; fused ones on the turn that they were computed behind."""
    for through, left in ((EXACT, [(12, 20), (20, 28)]), ("a digest", [])):
        store = MemoryStore(1 << 20)
        table = TurnTable(store)
        turns, whole = a_conversation(table, store, through)
        assert store.evict(turns[0].key)
        found = table.find("space", whole)
        assert [(m.prompt_start, m.prompt_end) for _, m in found] == left
        # Other tokens in front, and nothing behind them is of use.
        other = np.array([*whole[:5], 7, *whole[6:]])
        assert table.find("space", other) == []
        if left:
            # The gap is what has to be kept anew, and under the very key of before.
            assert table.gaps("space", whole, 4, 28) == [(4, 12, 0)]
            again = put(table, store, "space", whole[:12], 4, 0, EXACT)
            assert again.key == turns[0].key
            assert table.gaps("space", whole, 4, 28) == []
            assert table.gaps("space", np.array([*whole, 1, 2]), 4, 30) == [
                (28, 30, turns[2].number)
            ]


def test_fused_turns_are_used_where_they_hold_more_than_the_exact_ones():
    store = MemoryStore(1 << 20)
    table = TurnTable(store)
    turns, whole = a_conversation(table, store)
    longer = np.array([*whole[:20], *range(200, 230)])
    fused = put(table, store, "space", longer, 20)
    found = table.find("space", np.array([*longer, 1]))
    assert [turn.number for turn, _ in found] == [turns[0].number, turns[1].number, fused.number]
    assert [t.number for t, _ in table.find("space", whole)] == [t.number for t in turns]


def test_a_turn_that_is_kept_once_more_loses_nothing_that_was_computed_behind_it():
    store = MemoryStore(1 << 20)
    table = TurnTable(store, lambda: True)
    ids = np.arange(12)
    first = put(table, store, "c", ids[:6], 2)
    put(table, store, "c", ids, 6, first.number)
    store.evict(first.key)  # it is below memory, and does not come in time
    put(table, store, "c", ids[:6], 2)
    assert [match.prompt_end for _, match in table.find("c", ids)] == [6, 12]


def test_the_scheduler_does_not_wait_while_the_text_of_turns_is_read():
    store = MemoryStore(1 << 20)
    table = TurnTable(store)
    ids = np.arange(12)
    for name in ("a", "b"):
        put(table, store, name, ids, 2)
    found = []

    def is_gone(turn, tenant):
        scheduler = threading.Thread(target=lambda: found.append(table.find("b", ids)), daemon=True)
        scheduler.start()
        scheduler.join(60)
        return turn.lineage.space == "a"

    table.forget(is_gone)
    assert len(found) == 2
    assert [bool(table.find(name, ids)) for name in "ab"] == [False, True]


def test_a_lineage_says_all_that_a_key_depends_on_and_is_read_back():
    one = Lineage(space="s", start=3, before="b", parent=7, through="t")
    ids = np.arange(3, 9)
    assert Lineage.decode(one.encode()) == one
    fields = {"space": "x", "start": 4, "before": "x", "parent": 8, "through": EXACT}
    others = [dataclasses.replace(one, **{name: value}) for name, value in fields.items()]
    assert len({other.encode() for other in [one, *others]}) == 6
    assert len({other.number(ids) for other in [one, *others]}) == 6
    assert one.number(ids) != one.number(ids[1:])
    text = one.encode()
    for wrong in (
        None,
        3,
        "",
        hash_token_ids(ids),
        text[:-1],
        text.replace("3", '"3"'),
        f"{text} ",
    ):
        assert Lineage.decode(wrong) is None
    for fields in ('"start":3,"more":1', '"start":-3', '"start":true', '"start":NaN'):
        assert Lineage.decode(text.replace('"start":3', fields)) is None
    assert Lineage.decode(text.partition("{")[0] + "[" * 100_000) is None


def test_a_turn_that_a_tier_told_of_wrongly_is_forgotten():
    store = MemoryStore(1 << 20)
    table = TurnTable(store)
    turns, whole = a_conversation(table, store)
    told = TurnTable(store)
    for turn in turns:
        told.add(dataclasses.replace(turn, context=None))
    wrong = dataclasses.replace(turns[0].lineage, start=5, before=hash_token_ids(whole[:5]))
    told.add(StoredTurn(lineage=wrong, ids=turns[1].ids, key=turns[1].key))
    told.confirm(
        "space", lambda one: dataclasses.replace(turns[0].context, prefix_digest=one.encode())
    )
    assert [turn.number for turn, _ in told.find("space", whole)] == [t.number for t in turns[::2]]
    assert all(turn.context is not None for turn in told.alive("space"))


def test_a_turn_that_is_below_memory_is_known_until_no_tier_has_it():
    store = MemoryStore(1 << 20)
    below = [True]
    table = TurnTable(store, lambda: below[0])
    turns, whole = a_conversation(table, store)
    assert store.evict(turns[1].key)
    assert len(table.find("space", whole)) == 3
    assert table.gaps("space", whole, 4, 28) == []
    table.note_absent(turns[1].key)
    assert [t.number for t, _ in table.find("space", whole)] == [turns[0].number, turns[2].number]
    assert table.gaps("space", whole, 4, 28) == [(12, 20, turns[0].number)]
    assert store.evict(turns[2].key)
    below[0] = False
    assert len(table.find("space", whole)) == 1


def test_a_turn_that_is_computed_once_more_keeps_those_behind_it():
    store = MemoryStore(1 << 20)
    table = TurnTable(store, lambda: True)
    whole = np.arange(12)
    first = put(table, store, "space", whole[:8], 2)
    second = put(table, store, "space", whole, 8, first.number)
    assert store.evict(first.key)
    put(table, store, "space", whole[:8], 2)
    chain = [turn.number for turn, _ in table.find("space", whole)]
    assert chain == [first.number, second.number]


def test_what_no_tier_had_is_not_noted_without_end(monkeypatch):
    monkeypatch.setattr(turn_table, "_MAX_ABSENT", 5)
    table = TurnTable(store := MemoryStore(1 << 20), lambda: True)
    turn = put(table, store, "c", [1, 2, 3], 0)
    strangers = [ChunkKey(32 * "a", f"{number:064x}", 3) for number in range(20)]
    for key in strangers:
        table.note_absent(key)
    assert len(table._absent) == 5
    assert strangers[-1] in table._absent  # the newest stay
    store.evict(turn.key)
    table.note_absent(turn.key)
    assert table.alive("c") == []
    assert turn.key not in table._absent
    assert len(table) == 0

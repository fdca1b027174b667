"""Keys: every condition counts, and no two different conditions encode alike."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunk_cache import (
    ChunkCacheError,
    ChunkKey,
    KVContext,
    as_prompt_ids,
    as_token_ids,
    canonical_json,
    hash_token_ids,
)
from chunk_cache.keys import keys_named

# Few letters, so that moving a letter from one field to the next is likely to be tried.
few_letters = st.text(alphabet="ab\x00s1", min_size=1, max_size=3)
contexts = st.builds(
    KVContext,
    model_fingerprint=few_letters,
    dtype=few_letters,
    kv_dtype=few_letters,
    rope=few_letters,
    prefix_digest=few_letters,
    settings=st.text(alphabet="ab\x00s1", max_size=3),
    tenant=st.text(alphabet="ab\x00s1", max_size=3),
    tp_rank=st.just(0),
    tp_size=st.integers(1, 3),
    format_version=st.integers(1, 3),
)


@given(contexts, contexts)
def test_contexts_have_equal_encodings_only_if_they_are_equal(one: KVContext, two: KVContext):
    assert (one.encode() == two.encode()) == (one == two)
    assert (one.namespace == two.namespace) == (one == two)


@given(contexts, st.data())
def test_moving_text_between_neighbouring_fields_changes_the_namespace(
    context: KVContext, data: st.DataObject
):
    names = [f.name for f in dataclasses.fields(KVContext) if f.type == "str"]
    at = data.draw(st.integers(0, len(names) - 2))
    one, two = names[at], names[at + 1]
    left, right = getattr(context, one), getattr(context, two)
    moved = dataclasses.replace(context, **{one: left + right[:1], two: right[1:] or "a"})
    assert (moved.namespace == context.namespace) == (moved == context)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(KVContext)])
def test_every_field_of_the_context_changes_the_key(context: KVContext, name: str):
    base = dataclasses.replace(context, tp_size=4)
    changed = dataclasses.replace(
        base, **{name: getattr(base, name) + (1 if isinstance(getattr(base, name), int) else "x")}
    )
    assert ChunkKey.of(base, [1, 2, 3]) != ChunkKey.of(changed, [1, 2, 3])
    assert ChunkKey.of(base, [1, 2, 3]).digest != ChunkKey.of(changed, [1, 2, 3]).digest


@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6),
)
def test_keys_are_equal_only_for_equal_ids(one: list[int], two: list[int]):
    namespace = "ab" * 16
    assert (ChunkKey.of(namespace, one) == ChunkKey.of(namespace, two)) == (one == two)
    assert (hash_token_ids(one) == hash_token_ids(two)) == (one == two)


def test_a_key_does_not_depend_on_how_the_ids_are_held(context: KVContext):
    ids = [5, 7, 11]
    held = [ids, tuple(ids), np.array(ids), np.array(ids, dtype=np.uint16), as_token_ids(ids)]
    assert len({ChunkKey.of(context, each) for each in held}) == 1
    assert ChunkKey.of(context, ids) == ChunkKey.of(context.namespace, ids)


def test_known_values_stay_as_they_are_because_stores_on_disk_carry_them(context: KVContext):
    assert context.namespace == "6ae0aa79a6e224ccbf0b8202e6727c12"
    assert (
        ChunkKey.of(context, [1, 2, 3]).digest
        == "f393ef5a198e1c15dd9c95d02d98e9d0a3c1d977fd9c3ed956a8d1e281994565"
    )


@pytest.mark.parametrize("ids", [[], [-1], [2**31], [0.5], [[1, 2]], ["a"]])
def test_ids_that_are_none_are_refused(ids: list[object]):
    with pytest.raises(ChunkCacheError):
        as_token_ids(ids)  # type: ignore[arg-type]


def test_frozen_ids_are_a_copy_that_cannot_be_written_to():
    source = np.array([1, 2, 3], dtype=np.int32)
    ids = as_token_ids(source)
    source[0] = 9
    assert ids.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 9


def test_a_read_only_view_of_writeable_memory_is_copied():
    source = np.array([1, 2, 3], dtype=np.int32)
    view = source[:]
    view.flags.writeable = False
    ids = as_token_ids(view)
    source[0] = 9
    assert ids.tolist() == [1, 2, 3]
    assert as_token_ids(ids) is ids
    assert np.shares_memory(as_token_ids(ids[1:]), ids)


def test_prompt_ids_may_be_empty_or_larger_than_any_token():
    assert as_prompt_ids([]).size == 0
    assert as_prompt_ids([2**40, -5]).tolist() == [2**40, -5]
    with pytest.raises(ChunkCacheError):
        as_prompt_ids([2**70])


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", ""), ("tp_rank", 1), ("tp_rank", -1), ("tp_size", "1"), ("settings", None)],
)
def test_a_context_that_says_too_little_is_refused(context: KVContext, name: str, value: object):
    with pytest.raises(ChunkCacheError, match=name):
        dataclasses.replace(context, **{name: value})  # type: ignore[arg-type]


def test_canonical_json_ignores_the_order_of_keys_and_refuses_nan():
    assert canonical_json({"a": 1, "b": [2.5]}) == canonical_json({"b": [2.5], "a": 1})
    with pytest.raises(ChunkCacheError):
        canonical_json({"a": float("nan")})


def test_importing_the_keys_loads_no_torch():
    code = "import chunk_cache.keys, chunk_cache.matching, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_keys_are_named_by_their_first_digits():
    digests = ["ab" * 32, "abc" + "0" * 61, "c" * 64]
    keys = [ChunkKey("0" * 32, digest, 1) for digest in reversed(digests)]
    by_digest = {key.digest: key for key in keys}
    found, unknown = keys_named(keys, ["ab", "abc", "d", "", digests[2], digests[2] + "0"])
    assert found == keys
    assert unknown == ["d", "", digests[2] + "0"]
    assert keys_named(keys, ["abc"]) == ([by_digest[digests[1]]], [])
    assert keys_named([], ["a"]) == ([], ["a"])

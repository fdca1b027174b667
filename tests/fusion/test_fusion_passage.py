"""Chunks computed behind the neutral passage: which KV is used where, and that it is right, in the real scheduler."""

from __future__ import annotations

import numpy as np
import pytest
from fusion_helpers import PREFIX, PREFIX_IDS, agree, report, tokens

from rag_pipeline.protocol import RequestError
from rag_pipeline.protocol.fields import parse_fields
from rag_pipeline.sglang_plugin.fusion.runtime.passage import MAX_CONTEXT_SHARE, passage_ids
from rag_pipeline.sglang_plugin.fusion.runtime.rank_group import RankGroup

PASSAGE, CHUNK = 50, 80


PASSAGE_IDS, QUESTION = tokens(PASSAGE, 2), tokens(9, 3)
FIRST, SECOND = tokens(CHUNK, 10), tokens(CHUNK, 11)
PROMPT = [*PREFIX_IDS, *FIRST, *SECOND, *QUESTION]
BEHIND_PASSAGE = {
    "spans": [PREFIX + PASSAGE, PREFIX + PASSAGE + CHUNK],
    "prefix_len": PREFIX,
}
SPANS = [PREFIX, PREFIX + CHUNK, PREFIX + CHUNK, PREFIX + 2 * CHUNK]


@pytest.fixture
def local(engine):
    made = engine("llama")
    made.runtime.passage = np.asarray(PASSAGE_IDS, dtype=np.int64)
    yield made
    made.runtime.passage = np.empty(0, dtype=np.int64)


def build(local, chunk, passage):
    ids = [*PREFIX_IDS, *chunk]
    fusion = {"mode": "build", "spans": [PREFIX, len(ids)], "passage": passage}
    return local.ask(ids, 1, fusion=fusion)


def build_both(local):
    """Store both chunks in both variants, and forget the prompts."""
    for chunk in (FIRST, SECOND):
        build(local, chunk, False)
        build(local, chunk, True)
    local.flush()


def hits(local):
    """Uses of each stored chunk, by base position and tokens."""
    return {(info.base_position, info.key.digest): info.hits for info in local.runtime.store.ls()}


def full_prefill_again(local, ids, fusion):
    """A fused request that must answer as full prefill does."""
    local.flush()
    plain = local.ask(ids, 6, fusion={"mode": "off"})
    local.flush()
    fused = local.ask(ids, 6, fusion=fusion)
    agree(fused, plain, 1e-4)
    return fused


def test_a_build_behind_the_passage_keeps_the_chunk_alone(local):
    req = build(local, FIRST, True)
    assert report(req)["built_chunks"] == 1
    assert len(req.origin_input_ids) == PREFIX + PASSAGE + CHUNK
    (info,) = local.runtime.store.ls()
    assert info.base_position == PREFIX + PASSAGE
    build(local, FIRST, False)
    assert sorted(i.base_position for i in local.runtime.store.ls()) == [
        PREFIX,
        PREFIX + PASSAGE,
    ]


def test_where_the_passage_really_stands_its_kv_is_that_of_a_full_prefill(local):
    build(local, FIRST, True)
    ids = [*PREFIX_IDS, *PASSAGE_IDS, *FIRST, *QUESTION]
    fused = full_prefill_again(local, ids, BEHIND_PASSAGE | {"policy": "reuse"})
    assert report(fused)["reused_tokens"] == CHUNK


def test_at_its_own_place_a_chunk_is_exact_and_elsewhere_it_saw_the_passage(local):
    build_both(local)
    before = hits(local)
    scans = local.runtime.store.stats().prompts_matched
    req = local.ask(PROMPT, 2, fusion={"spans": SPANS, "policy": "reuse"})
    assert report(req)["reused_tokens"] == 2 * CHUNK
    assert (
        local.runtime.store.stats().prompts_matched == scans
    )  # each chunk is there in one way or the other
    used = {key: count - before[key] for key, count in hits(local).items()}
    assert sorted((base, count) for (base, _), count in used.items()) == [
        (PREFIX, 0),
        (PREFIX, 1),
        (PREFIX + PASSAGE, 0),
        (PREFIX + PASSAGE, 1),
    ]
    local.flush()
    before = hits(local)
    local.ask(PROMPT, 2, fusion={"spans": SPANS, "policy": "reuse", "passage": False})
    used = {key: count - before[key] for key, count in hits(local).items()}
    assert sorted((base, count) for (base, _), count in used.items()) == [
        (PREFIX, 1),
        (PREFIX, 1),
        (PREFIX + PASSAGE, 0),
        (PREFIX + PASSAGE, 0),
    ]


@pytest.mark.parametrize("explicit", [True, False])
def test_ratio_one_is_full_prefill_whatever_was_stored(local, explicit):
    for chunk in (FIRST, SECOND):
        build(local, chunk, True)
    fusion = {"policy": "query:1.0"} | ({"spans": SPANS} if explicit else {})
    fused = full_prefill_again(local, PROMPT, fusion)
    assert report(fused)["recomputed_tokens"] == 2 * CHUNK
    exact = report(fused)["exact_prefix_tokens"]
    runs = [[0, exact], [2, 2 * CHUNK], [3, len(QUESTION)]]
    assert report(fused)["runs"] == ([[3, PREFIX], *runs[1:]] if exact == 0 else runs)


def test_passage_kv_at_delta_zero_behind_other_text_is_not_taken_for_exact(local):
    # The passage's length of other text: the chunk is not moved, but it stands behind something else.
    build(local, SECOND, True)
    ids = [*PREFIX_IDS, *tokens(PASSAGE, 77), *SECOND, *QUESTION]
    fused = full_prefill_again(local, ids, BEHIND_PASSAGE | {"policy": "query:1.0"})
    assert report(fused)["recomputed_tokens"] == CHUNK


def test_ranks_must_have_the_same_variant(local, monkeypatch):
    build_both(local)

    class Group(RankGroup):
        """The other rank has lost what saw the passage, and holds the same runs otherwise."""

        def __init__(self):
            super().__init__()
            self.size = 2

        def _exchange(self, vote):
            is_fine, value = vote
            if isinstance(value, tuple):
                runs, *others = value
                value = [run for run in runs if not run[4]], *others
            return [vote, (is_fine, value)]

    monkeypatch.setattr(local.runtime, "group", Group())
    req = local.ask(PROMPT, 2, fusion={"spans": SPANS, "policy": "reuse"})
    assert report(req)["reused_tokens"] == CHUNK  # the first chunk's exact variant, and no other


def test_a_prompt_without_spans_may_refuse_the_passage_too(local):
    build_both(local)
    before = hits(local)
    local.ask(PROMPT, 2, fusion={"policy": "reuse", "passage": False})
    used = {key: count - before[key] for key, count in hits(local).items()}
    assert sum(count for (base, _), count in used.items() if base == PREFIX) == 2
    assert sum(used.values()) == 2


def test_missing_chunks_are_built_for_the_place_where_they_were_missed(local):
    local.ask(PROMPT, 2, fusion={"spans": SPANS})
    for _ in range(900):
        local.step()
    bases = sorted(info.base_position for info in local.runtime.store.ls())
    assert bases == [PREFIX, PREFIX + PASSAGE]


def test_no_passage_or_no_room_for_it_stores_nothing(local, monkeypatch):
    monkeypatch.setattr(local.runtime, "max_prompt", PREFIX + PASSAGE)
    req = build(local, FIRST, True)
    assert len(req.origin_input_ids) == PREFIX + CHUNK
    assert local.runtime.store.stats().chunks_now == 0


def test_passage_is_true_or_false():
    with pytest.raises(RequestError, match="passage is 'yes'; give true or false"):
        parse_fields({"mode": "build", "spans": [[2, 4]], "passage": "yes"}, 8)


def test_the_passage_takes_its_share_of_the_context_at_most(smollm2_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    for ids, most in (
        (passage_ids(tokenizer, 768, 1 << 15), 768),
        (passage_ids(tokenizer, 768, 400), 400 // MAX_CONTEXT_SHARE),
    ):
        assert most - 40 < ids.size <= most
        assert tokenizer.decode(ids).endswith(".\n\n")
    assert passage_ids(tokenizer, 3, 1 << 15).size == 3
    assert passage_ids(tokenizer, 0, 400).size == 0
    assert passage_ids(None, 768, 400).size == 0

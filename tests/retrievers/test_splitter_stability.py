"""What the splitter promises about edits, and the two algorithms the promise rests on."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from itertools import accumulate, pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from retrievers import Chunk, Document, HFTokenizer, TokenSplitter
from retrievers.loaders import load_topics
from retrievers.splitter.anchors import find_anchors
from retrievers.splitter.atoms import Boundary
from retrievers.splitter.packing import _BORDER_COST, _SLACK_COST, pack

_WORDS = [
    "kernel", "cache", "token", "river", "stone", "answer", "window", "planet", "garden", "letter",
    "signal", "matrix", "forest", "engine", "number", "silver", "bridge", "copper", "summer",
]  # fmt: skip


def _paragraph(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.1:
        return " ".join(rng.choices(_WORDS, k=3)).title()
    if kind < 0.2:
        return "\n".join(f"    {rng.choice(_WORDS)} = f({rng.random()})" for _ in range(5))
    return " ".join(
        " ".join(rng.choices(_WORDS, k=rng.randint(4, 14))).capitalize() + "."
        for _ in range(rng.randint(1, 6))
    )


def _split(splitter: TokenSplitter, paragraphs: list[str]) -> list[Chunk]:
    return splitter.split(Document(id="d", text="\n\n".join(paragraphs), title="T"))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(120, 160),
    place=st.floats(0, 1, exclude_max=True),
    edit=st.sampled_from(["replace", "insert", "delete", "word"]),
    overlap=st.sampled_from([0, 8]),
)
@example(seed=30015, size=153, place=0.203125, edit="replace", overlap=0)  # brings a text once more
def test_an_edited_paragraph_changes_only_its_neighbours(
    tokenizer: HFTokenizer, seed: int, size: int, place: float, edit: str, overlap: int
) -> None:
    rng = random.Random(seed)
    splitter = TokenSplitter(tokenizer, chunk_tokens=32 + overlap, overlap=overlap)
    before = [_paragraph(rng) for _ in range(size)]
    index = int(place * size)
    after = list(before)
    if edit == "replace":
        after[index] = _paragraph(rng)
    elif edit == "insert":
        after.insert(index, _paragraph(rng))
    elif edit == "delete":
        del after[index]
    else:
        after[index] += " Added words."
    assume(after != before)

    old_text, new_text = "\n\n".join(before), "\n\n".join(after)
    old, new = _split(splitter, before), _split(splitter, after)
    front = len("\n\n".join(before[:index]))
    back = len(old_text) - len("\n\n".join(before[index + 1 :]))
    shift = len(new_text) - len(old_text)
    by_start = {chunk.start: chunk for chunk in new}
    times_old, times_new = (Counter(chunk.text for chunk in found) for found in (old, new))
    reach = 9 * splitter.anchor_tokens + overlap
    token_starts = [start for start, _ in tokenizer.encode_offsets(old_text)]

    def tokens_between(start: int, end: int) -> int:
        return bisect_left(token_starts, end) - bisect_left(token_starts, start)

    compared = 0
    for chunk in old:
        if chunk.end <= front:
            distance, moved = tokens_between(chunk.end, front), 0
        elif chunk.start >= back:
            distance, moved = tokens_between(back, chunk.start), shift
        else:
            continue
        if distance > reach:
            same = by_start.get(chunk.start + moved)
            assert same is not None
            assert (same.text, same.num_tokens) == (chunk.text, chunk.num_tokens)
            # Chunks of one text are counted through the document: an edit may bring one more.
            assert same.id == chunk.id or times_old[chunk.text] != times_new[chunk.text]
            compared += 1
    assert compared > len(old) / 4


def test_a_typical_edit_changes_few_chunks(tokenizer: HFTokenizer) -> None:
    """The promise is a bound; this is what happens on real text, on average over 40 edits."""
    splitter = TokenSplitter(tokenizer, chunk_tokens=128)
    text = next(document.text for document in load_topics() if document.title == "types")
    paragraphs = text.split("\n\n")
    old = {chunk.id for chunk in _split(splitter, paragraphs)}
    rng = random.Random(0)
    changed = []
    for _ in range(40):
        edited = list(paragraphs)
        edited[rng.randrange(len(edited))] += " This is new."
        changed.append(len({chunk.id for chunk in _split(splitter, edited)} - old))
    assert min(changed) >= 1
    assert sum(changed) / len(changed) < 5
    assert len(old) > 60


_KEYS = st.lists(
    st.tuples(st.tuples(st.integers(0, 2), st.integers(0, 9)), st.integers(1, 9)), max_size=60
)


@given(borders=_KEYS, window=st.integers(1, 30))
def test_anchors_are_the_local_minima_of_the_definition(
    borders: list[tuple[tuple[int, int], int]], window: int
) -> None:
    keys = [(cls, bytes([value])) for (cls, value), _ in borders]
    counts = [count for _, count in borders]
    *starts, total = accumulate(counts, initial=0)

    def is_anchor(i: int) -> bool:
        return window < starts[i] < total - window and all(
            keys[j] > keys[i] if j < i else keys[j] >= keys[i]
            for j in range(len(keys))
            if j != i and abs(starts[j] - starts[i]) <= window
        )

    anchors = find_anchors(keys, counts, window)
    expected = [i for i in range(len(keys)) if i == 0 or is_anchor(i)]
    assert anchors == expected
    assert all(starts[b] - starts[a] > window for a, b in pairwise(anchors))


@pytest.mark.parametrize("seed", range(60))
def test_packing_is_optimal_among_all_packings(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randint(1, 10)
    counts = [rng.randint(1, 12) for _ in range(size)]
    boundaries = [Boundary(rng.randint(0, 3)) for _ in range(size)]
    limit = 12

    def cost(ranges: list[tuple[int, int]]) -> float:
        return sum(
            1 + _BORDER_COST[boundaries[a]] + _SLACK_COST * (1 - sum(counts[a:b]) / limit) ** 2
            for a, b in ranges
        )

    def packings(start: int):  # type: ignore[no-untyped-def]
        if start == size:
            yield []
        for end in range(start + 1, size + 1):
            if sum(counts[start:end]) <= limit:
                for rest in packings(end):
                    yield [(start, end), *rest]

    found = pack(counts, boundaries, limit)
    assert [i for a, b in found for i in range(a, b)] == list(range(size))
    assert all(sum(counts[a:b]) <= limit for a, b in found)
    assert cost(found) == pytest.approx(min(map(cost, packings(0))))

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrievers import Document, HFTokenizer, RetrievalError, TokenSplitter
from retrievers.loaders import load_topics


def _document(text: str, name: str = "d") -> Document:
    return Document(id=name, text=text, title="T", path="p.txt", metadata={"lang": "en"})


_PIECES = st.sampled_from(
    [
        "A short sentence. ", "Is this one? ", "wrapped\nline ", "\n\n", "\n", "# Heading\n\n",
        "- item\n", "    x = f(1)\n", "a | b\n", "word " * 40, "é" * 50, "🎉", "日本語。", "\t", "\r\n",
        "Title\n=====\n\n", "```\n", "Dr. No said so. ", "x" * 400, "\x0c", "\u2028", "<|im_start|>",
    ]
)  # fmt: skip
_TEXTS = st.one_of(
    st.lists(_PIECES, max_size=60).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
)


@settings(deadline=None, max_examples=200)
@given(text=_TEXTS, chunk_tokens=st.integers(16, 80), overlap_share=st.sampled_from([0, 0.2, 0.5]))
def test_chunks_are_exact_slices_that_fit_and_cover_the_text(
    tokenizer: HFTokenizer, text: str, chunk_tokens: int, overlap_share: float
) -> None:
    overlap = int(chunk_tokens * overlap_share)
    splitter = TokenSplitter(tokenizer, chunk_tokens=chunk_tokens, overlap=overlap)
    chunks = splitter.split(_document(text))
    assert all(left.start < right.start for left, right in pairwise(chunks))
    end = 0
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end]
        assert chunk.text.strip()
        assert chunk.num_tokens == len(tokenizer.encode(chunk.text)) <= chunk_tokens
        assert (chunk.document_id, chunk.title, chunk.path) == ("d", "T", "p.txt")
        assert chunk.metadata == {"lang": "en"}
        assert chunk.end > end
        if overlap == 0:
            assert chunk.start >= end
            assert not text[end : chunk.start].strip()
        else:
            assert not text[end : max(end, chunk.start)].strip()
            shared = text[chunk.start : end]
            assert len(tokenizer.encode(shared)) <= overlap
        end = chunk.end
    assert not text[end:].strip()
    assert len({chunk.id for chunk in chunks}) == len(chunks)


def test_the_same_document_gives_the_same_chunks_in_another_process(
    tokenizer: HFTokenizer, tokenizer_folder: Path
) -> None:
    program = (
        "import sys, json\n"
        "from retrievers import HFTokenizer, TokenSplitter\n"
        "from retrievers.loaders import load_topics\n"
        "splitter = TokenSplitter(HFTokenizer(sys.argv[1]), chunk_tokens=128, overlap=16)\n"
        "document = next(d for d in load_topics() if d.title == 'types')\n"
        "print(json.dumps([[c.id, c.num_tokens] for c in splitter.split(document)]))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tokenizer_folder)],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    document = next(d for d in load_topics() if d.title == "types")
    chunks = TokenSplitter(tokenizer, chunk_tokens=128, overlap=16).split(document)
    assert json.loads(done.stdout) == [[chunk.id, chunk.num_tokens] for chunk in chunks]
    assert len(chunks) > 50


def test_chunks_of_long_documents_are_well_filled(tokenizer: HFTokenizer) -> None:
    splitter = TokenSplitter(tokenizer, chunk_tokens=256)
    counts = []
    for document in load_topics():
        chunks = splitter.split(document)
        if len(chunks) > 4:
            counts.extend(chunk.num_tokens for chunk in chunks)
    assert len(counts) > 200
    assert sum(counts) / len(counts) >= 0.6 * 256


def test_prose_chunks_begin_and_end_with_sentences(tokenizer: HFTokenizer) -> None:
    sentences = [f"Sentence number {i} tells Dr. Smith about the U.S. rule." for i in range(60)]
    chunks = TokenSplitter(tokenizer, chunk_tokens=64).split(_document(" ".join(sentences)))
    assert len(chunks) > 5
    for chunk in chunks:
        assert chunk.text.startswith("Sentence number")
        assert chunk.text.endswith("rule.")


def test_a_heading_stays_with_its_text(tokenizer: HFTokenizer) -> None:
    parts = []
    for i in range(40):
        parts += [f"Heading {i}", f"The body of part {i} is here. " * (1 + i % 4)]
    chunks = TokenSplitter(tokenizer, chunk_tokens=64).split(_document("\n\n".join(parts)))
    assert len(chunks) > 10
    for chunk in chunks:
        assert not chunk.text.splitlines()[-1].startswith("Heading")


def test_code_and_tables_are_cut_between_lines(tokenizer: HFTokenizer) -> None:
    code = "\n".join(f"    value_{i} = compute(value, {i}).  result[{i}]" for i in range(80))
    table = "\n".join(f"name {i}. more | {i} | yes. no" for i in range(80))
    chunks = TokenSplitter(tokenizer, chunk_tokens=96).split(_document(f"{code}\n\n{table}"))
    whole = set(code.splitlines()) | set(table.splitlines())
    assert len(chunks) > 10
    for chunk in chunks:
        assert {line for line in chunk.text.splitlines() if line} <= whole


def test_a_sentence_longer_than_a_chunk_is_cut_between_words(tokenizer: HFTokenizer) -> None:
    words = [f"word{i}" for i in range(500)]
    chunks = TokenSplitter(tokenizer, chunk_tokens=48).split(_document(" ".join(words)))
    assert [word for chunk in chunks for word in chunk.text.split()] == words
    assert len(chunks) > 10


def test_repeated_text_gets_distinct_ids_and_other_documents_get_others(
    tokenizer: HFTokenizer,
) -> None:
    text = "\n\n".join(["The very same paragraph, word for word, again and again and on."] * 40)
    splitter = TokenSplitter(tokenizer, chunk_tokens=32)
    first = splitter.split(_document(text, "a"))
    second = splitter.split(_document(text, "b"))
    assert len({chunk.text for chunk in first}) < len(first)
    assert len({chunk.id for chunk in [*first, *second]}) == len(first) + len(second)


@pytest.mark.parametrize("text", ["", " \n\t\n ", "\n" * 50])
def test_blank_documents_have_no_chunks(tokenizer: HFTokenizer, text: str) -> None:
    assert TokenSplitter(tokenizer).split(_document(text)) == []


def test_split_all_streams(tokenizer: HFTokenizer) -> None:
    drawn = []

    def documents():  # type: ignore[no-untyped-def]
        for i in range(3):
            drawn.append(i)
            yield _document(f"Text {i}.", str(i))

    chunks = TokenSplitter(tokenizer).split_all(documents())
    assert next(chunks).document_id == "0"
    assert drawn == [0]
    assert [chunk.document_id for chunk in chunks] == ["1", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_tokens": 15}, "chunk_tokens is 15"),
        ({"overlap": -1}, "overlap is -1"),
        ({"chunk_tokens": 100, "overlap": 51}, "give 0 to 50"),
        ({"anchor_tokens": 0}, "anchor_tokens is 0"),
    ],
)
def test_settings_out_of_range_are_refused(
    tokenizer: HFTokenizer, options: dict[str, int], message: str
) -> None:
    with pytest.raises(RetrievalError, match=message):
        TokenSplitter(tokenizer, **options)


def test_lone_surrogates_are_refused_with_the_document_named(tokenizer: HFTokenizer) -> None:
    with pytest.raises(RetrievalError, match="document 'd' holds lone surrogates"):
        TokenSplitter(tokenizer).split(_document("bad \ud800 text"))


def test_overlap_repeats_whole_sentences_and_never_a_whole_chunk(tokenizer: HFTokenizer) -> None:
    text = " ".join(f"Sentence {i} is here." for i in range(80))
    chunks = TokenSplitter(tokenizer, chunk_tokens=64, overlap=24).split(_document(text))
    overlaps = [text[right.start : left.end] for left, right in pairwise(chunks)]
    assert len(overlaps) > 5
    assert sum(map(bool, overlaps)) > len(overlaps) / 2
    for overlap in filter(None, overlaps):
        assert overlap.startswith("Sentence")
        assert overlap.endswith("here.")
    assert all(left.start < right.start for left, right in pairwise(chunks))


def test_settings_name_everything_that_moves_a_border(tokenizer: HFTokenizer) -> None:
    base = TokenSplitter(tokenizer).settings
    assert json.loads(json.dumps(base)) == base
    assert base["tokenizer"] == tokenizer.fingerprint
    for options in ({"chunk_tokens": 128}, {"overlap": 32}, {"anchor_tokens": 99}):
        assert TokenSplitter(tokenizer, **options).settings != base

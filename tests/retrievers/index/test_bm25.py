from __future__ import annotations

import pydoc_data.topics
import unicodedata
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest

from retrievers import Bm25Builder, Bm25Index, CorruptIndexError, RetrievalError
from retrievers.bm25 import MAX_QUERY_TERMS
from retrievers.terms import text_terms


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


TEXTS = [
    paragraph
    for topic in sorted(pydoc_data.topics.topics)
    for paragraph in pydoc_data.topics.topics[topic].split("\n\n")
    if paragraph.strip()
]
QUERIES = [
    "with statement context manager",
    "How does the import system find modules?",
    "yield expression in a generator",
    "integer division and modulo",
    "class __init__ metaclass",
    "the the the of",
]


def build(texts: list[str], folder: Path, step: int = 700) -> Bm25Index:
    builder = Bm25Builder(folder)
    for start in range(0, len(texts), step):
        builder.append(texts[start : start + step])
    builder.finish()
    return Bm25Index(folder, len(texts))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Bm25Index:
    return build(TEXTS, tmp_path_factory.mktemp("bm25"))


@pytest.fixture(scope="module")
def direct() -> bm25s.BM25:
    model = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
    model.index([text_terms(text) for text in TEXTS], show_progress=False)
    return model


@pytest.mark.parametrize("query", QUERIES)
def test_equals_bm25s(query: str, index: Bm25Index, direct: bm25s.BM25) -> None:
    assert len(TEXTS) > 2000
    rows, scores = index.search(query, 25)
    expected = direct.get_scores([word for word in text_terms(query) if word in direct.vocab_dict])
    np.testing.assert_allclose(scores, np.sort(expected)[::-1][:25], rtol=1e-6)
    np.testing.assert_allclose(scores, expected[rows], rtol=1e-6)


def test_mask_is_a_filter(index: Bm25Index) -> None:
    mask = np.zeros(len(TEXTS), dtype=bool)
    mask[::3] = True
    rows, scores = index.search(QUERIES[0], 10, mask=mask)
    every, all_scores = index.search(QUERIES[0], len(TEXTS))
    keep = mask[every]
    np.testing.assert_array_equal(rows, every[keep][:10])
    np.testing.assert_allclose(scores, all_scores[keep][:10])


class Slices(np.ndarray):
    """An array that counts the values read from it."""

    num_read = 0

    def __getitem__(self, key: object) -> object:
        found = np.asarray(self)[key]  # type: ignore[call-overload]
        Slices.num_read += np.size(found)
        return found


@pytest.fixture
def counted(index: Bm25Index, monkeypatch: pytest.MonkeyPatch) -> Bm25Index:
    """The index, where `Slices.num_read` counts the rows of terms that are looked at."""
    stored = index._bm25.scores
    rows = np.asarray(stored["indices"]).view(Slices)
    monkeypatch.setattr(index._bm25, "scores", {**stored, "indices": rows})
    Slices.num_read = 0
    return index


def test_a_repeated_word_counts_each_time_and_is_looked_up_once(
    counted: Bm25Index, direct: bm25s.BM25
) -> None:
    query = "generator " * 500 + "the import"
    rows, scores = counted.search(query, 25)
    words = {"generator", "the", "import"}
    assert Slices.num_read == sum(len(words & set(text_terms(text))) for text in TEXTS)
    np.testing.assert_allclose(scores, direct.get_scores(text_terms(query))[rows], rtol=1e-5)


@pytest.mark.parametrize("query", QUERIES[:5])
def test_without_a_repetition_the_scores_are_those_of_bm25s_bit_for_bit(
    query: str, index: Bm25Index
) -> None:
    words = [word for word in dict.fromkeys(text_terms(query)) if word in index.vocabulary]
    rows, scores = index.search(" ".join(words), 25)
    np.testing.assert_array_equal(scores, index._bm25.get_scores(words)[rows])


def test_of_very_many_words_the_rarest_are_scored(counted: Bm25Index) -> None:
    found = Counter(word for text in TEXTS for word in set(text_terms(text)))
    assert len(found) > MAX_QUERY_TERMS + 500
    counted.search(" ".join(found), 5)
    assert Slices.num_read == sum(sorted(found.values())[:MAX_QUERY_TERMS])


def test_no_shared_term_gives_nothing(index: Bm25Index) -> None:
    assert len(index.search("zzzxqy", 5)[0]) == 0
    assert len(index.search("", 5)[0]) == 0
    assert len(index.search("?!", 5)[0]) == 0
    with pytest.raises(RetrievalError, match="k must be"):
        index.search("x", 0)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_copied_rows_equal_a_fresh_build(index: Bm25Index, tmp_path: Path, step: int) -> None:
    keep = np.flatnonzero(np.arange(len(TEXTS)) % 7 < step)
    added = ["a wholly new paragraph about zebrafish", "import import import"]
    builder = Bm25Builder(tmp_path / "a", index)
    builder.copy(index, keep)
    builder.append(added)
    builder.finish()
    copied = Bm25Index(tmp_path / "a", len(keep) + 2)
    fresh = build([*(TEXTS[i] for i in keep), *added], tmp_path / "b")
    for query in [*QUERIES, "zebrafish"]:
        rows, scores = copied.search(query, 20)
        expected_rows, expected = fresh.search(query, 20)
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_empty(tmp_path: Path) -> None:
    assert len(build([], tmp_path / "a").search("x", 3)[0]) == 0
    assert len(build(["", "..."], tmp_path / "b").search("x", 3)[0]) == 0


def test_terms() -> None:
    assert text_terms("The C-API's __init__, snake_case") == [
        "the", "c", "api", "s", "__init__", "snake_case",
    ]  # fmt: skip
    assert text_terms("日本語 text") == ["日", "本", "語", "日本", "本語", "text"]


_SAME_WORDS = {
    "decomposed German": (nfd("Der Prüfbericht über Größe"), "Prüfbericht GRÖSSE"),
    "decomposed Korean": (nfd("한국 지도"), "한국"),
    "decomposed Vietnamese": (nfd("tiếng Việt"), "tiếng Việt"),
    "no accents": ("Zażółć ŁÓDŹ øre Crème brûlée", "zazolc lodz ore creme brulee"),
    "Turkish i": ("İstanbul ISPARTA ısparta", "istanbul isparta"),
    "soft hyphen": ("infor\u00admation zero\u200bwidth \ufeffmark", "information zerowidth mark"),
    "ligatures": ("ﬁne ﬂow Straße", "fine flow STRASSE"),
    "full width": ("ＡＢＣ１２３ 𝐁𝐨𝐥𝐝", "ABC123 bold"),
    "half-width kana": ("ﾊﾞﾙﾌﾞ", "バルブ"),
    "Greek": ("ΟΔΟΣ ᾠδή", "οδός ωδη"),
    "Russian": ("за́мок ёлка", "замок елка"),
    "Ukrainian apostrophes": ("п’ять п'ять", "пʼять"),
    "Arabic points": ("مُحَمَّد العـــربية", "محمد العربية"),
    "Persian": ("می‌خواهم کتاب", "میخواهم كتاب"),
    "Hebrew points": ("שָׁלוֹם", "שלום"),
    "digits": ("١٢٣ १२३ Ⅳ", "123 iv"),
    "fractions, notes, units": ("10½ kg Acme™ Ventil¹ m² 10² CO₂", "10 acme ventil m2 co2"),
    "Hindi": ("हिन्दी ज़्यादा", "हिन्दी ज्यादा"),
    "Tamil": ("வணக்கம் தமிழ்", "தமிழ்"),
    "Lao": ("ປະເທດລາວສວຍງາມ", "ລາວ"),
    "Thai": ("กรุณาตรวจสอบวาล์วทุกปี", "ตรวจสอบ"),
    "Khmer": ("ភាសាខ្មែរ", "ខ្មែរ"),
    "Burmese": ("မြန်မာစာ", "မြန်မာ"),
    "Tibetan": ("བོད་ཡིག", "བོད"),
    "Chinese": ("请检查压力阀", "压力阀"),
    "Korean particle": ("서울은 크다", "서울"),
}


@pytest.mark.parametrize("name", _SAME_WORDS)
def test_every_spelling_of_a_word_is_one_term(name: str) -> None:
    text, query = _SAME_WORDS[name]
    assert set(text_terms(query)) <= set(text_terms(text))
    assert max(map(len, text_terms(query))) > 1


@pytest.mark.parametrize(
    ("one", "other"), [("мой", "мои"), ("10½", "101"), ("10²", "102"), ("が", "か"), ("คน", "กน")]
)
def test_letters_that_tell_words_apart_stay(one: str, other: str) -> None:
    assert not set(text_terms(other)) <= set(text_terms(one))


def test_truncated_file(tmp_path: Path) -> None:
    build(TEXTS[:20], tmp_path)
    path = tmp_path / "forward.i32"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptIndexError):
        Bm25Index(tmp_path, 20)

"""Data set files, generators, and the chunks made from them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_eval import EvalError
from rag_eval.datasets import (
    GENERATORS,
    DatasetOptions,
    Example,
    Passage,
    arrange,
    load_dataset,
    read_examples,
    shared_chunks,
)

_VOCABULARY: dict[str, int] = {}


def encode(text: str) -> list[int]:
    """One token per word; a blank line is one token of its own."""
    words = text.split() or ["<blank>"]
    return [_VOCABULARY.setdefault(word, len(_VOCABULARY)) for word in words]


def decode(ids: tuple[int, ...]) -> str:
    names = {number: word for word, number in _VOCABULARY.items()}
    return " ".join(names[token] for token in ids)


CTXS = [{"question": "Who?", "answers": ["Ann"], "ctxs": [{"title": "T", "text": "Ann did."}]}]
HOTPOT = [
    {
        "_id": "h1",
        "question": "Who?",
        "answer": "Ann",
        "supporting_facts": [["A", 0]],
        "context": [["A", ["Ann did.", " It rained."]], ["B", ["Bob did not."]]],
    }
]
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Some_article",
            "paragraphs": [
                {
                    "context": "Ann did.",
                    "qas": [{"id": "s1", "question": "Who?", "answers": [{"text": "Ann"}]}],
                },
                {
                    "context": "Bob did not.",
                    "qas": [{"id": "s2", "question": "Who not?", "answers": [{"text": "Bob"}]}],
                },
            ],
        }
    ],
}
FLASHRAG = [
    {
        "id": "f1",
        "question": "Who?",
        "golden_answers": ["Ann", "Anna"],
        "metadata": {
            "context": {"title": ["A", "B"], "sentences": [["Ann did."], ["Bob did not."]]},
            "supporting_facts": {"title": ["A"], "sent_id": [0]},
        },
    }
]
MUSIQUE = [
    {
        "id": "m1",
        "question": "Who?",
        "answer": "Ann",
        "answer_aliases": ["Anna"],
        "answerable": True,
        "paragraphs": [
            {"idx": 0, "title": "A", "paragraph_text": "Ann did.", "is_supporting": True},
            {"idx": 1, "title": "B", "paragraph_text": "Bob did not.", "is_supporting": False},
        ],
    },
    {"id": "m2", "question": "?", "answer": "x", "answerable": False, "paragraphs": []},
]


def as_json(value: object) -> str:
    return json.dumps(value)


def as_lines(value: list[object]) -> str:
    return "\n".join(json.dumps(item) for item in value) + "\n"


@pytest.mark.parametrize(
    ("text", "answers", "gold"),
    [
        (as_json(CTXS), ("Ann",), [None]),
        (as_json(HOTPOT), ("Ann",), [True, False]),
        (as_lines(HOTPOT), ("Ann",), [True, False]),
        (as_json(SQUAD), ("Ann",), [True, False]),
        (as_lines(FLASHRAG), ("Ann", "Anna"), [True, False]),
        (as_lines(MUSIQUE), ("Ann", "Anna"), [True, False]),
    ],
    ids=["ctxs", "hotpot", "hotpot lines", "squad", "flashrag", "musique"],
)
def test_every_format_gives_question_answers_and_gold_passages(
    tmp_path: Path, text: str, answers: tuple[str, ...], gold: list[bool | None]
) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, "utf-8")
    examples = read_examples(path)
    assert examples[0].question == "Who?"
    assert examples[0].answers == answers
    assert [passage.is_gold for passage in examples[0].passages] == gold
    assert examples[0].passages[0].text.startswith("Ann did.")


def test_squad_questions_share_the_paragraphs_of_their_article(tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(as_json(SQUAD), "utf-8")
    first, second = read_examples(path)
    assert [p.text for p in first.passages] == [p.text for p in second.passages]
    assert [p.is_gold for p in second.passages] == [False, True]
    assert first.passages[0].title == "Some article"


def test_hotpot_sentences_keep_one_space_between_them(tmp_path: Path) -> None:
    path = tmp_path / "hotpot.json"
    path.write_text(as_json(HOTPOT), "utf-8")
    assert read_examples(path)[0].passages[0].text == "Ann did. It rained."
    bare = json.loads(as_json(HOTPOT))
    bare[0]["context"][0][1] = ["Ann did.", "It rained."]  # 2WikiMultihopQA
    path.write_text(as_json(bare), "utf-8")
    assert read_examples(path)[0].passages[0].text == "Ann did. It rained."


def test_gzip_and_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(("\ufeff" + as_lines(FLASHRAG)).encode()))
    assert read_examples(path)[0].id == "f1"


def test_repeated_ids_are_made_unique(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text(as_json(HOTPOT * 3), "utf-8")
    assert len({example.id for example in read_examples(path)}) == 3


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["is empty"]),
        ("   \n", ["is empty"]),
        ("[]", ["holds no example"]),
        ('{"data": []}', ["holds no example"]),
        ("{not json", ["line 1", "not JSON"]),
        (as_lines(FLASHRAG) + "{broken\n", ["line 2", "not JSON"]),
        ("[1]", ["record 1", "int"]),
        ('[{"a": 1}]', ["record 1", "no known format", "a"]),
        (as_json(CTXS + HOTPOT), ["record 2", "HotpotQA", "ctxs"]),
        ('[{"question": "q", "ctxs": []}]', ["record 1", "lacks", "answer"]),
        ('[{"question": "", "answers": ["a"], "ctxs": []}]', ["record 1", "empty"]),
        ('[{"question": "q", "answers": [""], "ctxs": []}]', ["record 1", "no answer"]),
        ('[{"question": "q", "answers": ["a"], "ctxs": ["x"]}]', ["record 1", "not well formed"]),
        ('[{"question": "q", "answer": "a", "context": [["t"]]}]', ["record 1", "not well"]),
        ('[{"question": 7, "answer": "a", "context": []}]', ["record 1", "question", "int"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_record(
    tmp_path: Path, text: str, names: list[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, "utf-8")
    with pytest.raises(EvalError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in names), message


def test_undecodable_and_missing_files_are_one_line(tmp_path: Path) -> None:
    binary = tmp_path / "x.json"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    broken = tmp_path / "x.json.gz"
    broken.write_bytes(b"no gzip")
    for path in (binary, broken, tmp_path / "missing.json", tmp_path):
        with pytest.raises(EvalError, match=path.name):
            read_examples(path)
    with pytest.raises(EvalError, match="planted-1hop"):
        load_dataset("no-such-set", encode=encode)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_seeded_and_plant_every_answer(name: str) -> None:
    options = DatasetOptions(chunks=6, chunk_tokens=120, seed=3)
    first = load_dataset(name, encode=encode, options=options, limit=3)
    longer = load_dataset(name, encode=encode, options=options, limit=5)
    assert first == longer[:3]
    other = DatasetOptions(chunks=6, chunk_tokens=120, seed=4)
    assert first != load_dataset(name, encode=encode, options=other, limit=3)
    for example in first:
        assert len(example.passages) == 6
        for passage in example.passages:
            assert len(encode(passage.text)) <= 150
        text = " ".join(passage.text for passage in example.passages)
        for part in example.answer_parts or example.answers:
            assert part in text


def test_one_hop_facts_differ_only_in_name_and_code() -> None:
    for example in load_dataset("planted-1hop", encode=encode, limit=4):
        place = example.question.split(" the ")[2].removesuffix(" archive?")
        assert sum(f"the {place} archive" in p.text for p in example.passages) == 1
        assert [p.is_gold for p in example.passages].count(True) == 1
        gold = next(p for p in example.passages if p.is_gold)
        assert f"The access code of the {place} archive is {example.answers[0]}." in gold.text


def test_two_hops_need_two_chunks() -> None:
    for example in load_dataset("planted-2hop", encode=encode, limit=4):
        gold = [p.text for p in example.passages if p.is_gold]
        keeper = example.question.split(" that ")[1].split()[0]
        assert len(gold) == 2
        first = next(text for text in gold if f"{keeper} is the keeper" in text)
        assert example.answers[0] not in first
        second = next(text for text in gold if example.answers[0] in text)
        assert keeper not in second.split()
    with pytest.raises(EvalError, match="2 chunks"):
        load_dataset("planted-2hop", encode=encode, options=DatasetOptions(chunks=1), limit=1)


def test_variable_chain_stands_in_order() -> None:
    for example in load_dataset("ruler-variables", encode=encode, limit=4):
        text = " ".join(passage.text for passage in example.passages)
        places = [text.index(f"VAR {name} =") for name in example.answer_parts]
        assert places == sorted(places)


def test_common_words_are_the_most_common() -> None:
    from collections import Counter

    for example in load_dataset("ruler-commonwords", encode=encode, limit=3):
        words = " ".join(p.text for p in example.passages).split()[1::2]
        counted = Counter(words)
        top = {word for word, _ in counted.most_common(10)}
        assert top == set(example.answer_parts)
        rare = max(n for word, n in counted.items() if word not in top)
        assert rare * 5 <= min(counted[word] for word in top)


def passages(count: int, words: int, gold: set[int]) -> tuple[Passage, ...]:
    return tuple(
        Passage(title="", text=" ".join(f"p{n}w{i}" for i in range(words)), is_gold=n in gold)
        for n in range(count)
    )


def example_of(count: int, words: int, gold: set[int]) -> Example:
    return Example(id="e", question="q", answers=("a",), passages=passages(count, words, gold))


def test_short_passages_are_joined_and_long_ones_cut() -> None:
    options = DatasetOptions(chunks=3, chunk_tokens=100)
    joined = arrange(example_of(10, 30, {0, 1}), options, encode)
    assert len(joined) == 3
    assert all(80 <= len(chunk.ids) - 1 <= 100 for chunk in joined)
    cut = arrange(example_of(3, 500, {0}), options, encode)
    assert [len(chunk.ids) for chunk in cut] == [101, 101, 101]


def test_gold_passages_go_into_different_chunks_whole() -> None:
    chunks = arrange(example_of(10, 30, {2, 7}), DatasetOptions(chunks=4, chunk_tokens=90), encode)
    assert sum(chunk.is_gold for chunk in chunks) == 2
    text = " ".join(decode(chunk.ids) for chunk in chunks)
    assert all(f"p{n}w{i}" in text.split() for n in (2, 7) for i in range(30))


@pytest.mark.parametrize(("order", "place"), [("gold_first", 0), ("gold_last", -1)])
def test_order_puts_gold_where_it_is_wanted(order: str, place: int) -> None:
    options = DatasetOptions(chunks=4, chunk_tokens=40, order=order)  # type: ignore[arg-type]
    chunks = arrange(example_of(8, 30, {5}), options, encode)
    assert [chunk.is_gold for chunk in chunks].index(True) == place % len(chunks)


def test_a_seed_fixes_the_shuffle() -> None:
    make: Callable[[int], list[tuple[int, ...]]] = lambda seed: [  # noqa: E731
        chunk.ids
        for chunk in arrange(
            example_of(12, 30, {5}), DatasetOptions(chunks=6, chunk_tokens=40, seed=seed), encode
        )
    ]
    assert make(1) == make(1)
    assert make(1) != make(2)


def test_distractors_are_limited() -> None:
    options = DatasetOptions(chunks=4, chunk_tokens=40, distractors=1)
    chunks = arrange(example_of(8, 30, {5}), options, encode)
    assert len(chunks) == 2


def test_zipf_makes_passages_recur_between_examples() -> None:
    options = DatasetOptions(chunks=6, chunk_tokens=40, zipf=1.5)
    corpus = shared_chunks(passages(400, 20, set()), options, encode)
    assert len(corpus) == 200
    seen: dict[tuple[int, ...], int] = {}
    for number in range(30):
        gold = Passage(title="", text=f"gold{number} " * 30, is_gold=True)
        example = Example(id=f"z{number}", question="q", answers=("a",), passages=(gold,))
        for chunk in arrange(example, options, encode, corpus):
            seen[chunk.ids] = seen.get(chunk.ids, 0) + 1
    counts = sorted(seen.values(), reverse=True)
    assert counts[0] >= 20  # rank 1 is drawn nearly always
    assert counts.count(1) >= 30  # and the tail hardly ever


def test_an_example_without_contexts_asks_for_an_index() -> None:
    empty = Example(id="e7", question="q", answers=("a",))
    with pytest.raises(EvalError, match=r"e7.*--retrieve"):
        arrange(empty, DatasetOptions(), encode)


@pytest.mark.parametrize(
    "wrong",
    [
        {"chunks": 0},
        {"chunks": 65},
        {"chunk_tokens": 1},
        {"distractors": -1},
        {"order": "x"},
        {"zipf": 0},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(EvalError, match="allowed"):
        DatasetOptions(**wrong)  # type: ignore[arg-type]


def _shared_data() -> Path | None:
    named = os.environ.get("RAG_PIPELINE_TEST_DATA")
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(named) if named else beside
    return path if path.is_dir() else None


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("hotpotqa/hotpot_200.json", 200),
        ("musique/musique_s_first100.json", 100),
        ("xquad/xquad.en.first24.json", None),
        ("lost_in_the_middle/nq-open-oracle.jsonl.gz", None),
    ],
)
def test_real_files_are_read_whole(file: str, count: int | None) -> None:
    root = _shared_data()
    if root is None or not (root / file).is_file():
        pytest.skip(f"{file} is not there; set RAG_PIPELINE_TEST_DATA to the folder that holds it")
    examples = read_examples(root / file)
    assert count is None or len(examples) == count
    corpus = [p for example in examples[:20] for p in example.passages]
    for example in examples[:20]:
        chunks = arrange(example, DatasetOptions(chunks=5, chunk_tokens=150), encode, corpus)
        assert 1 <= len(chunks) <= 5
        assert all(len(chunk.ids) <= 151 for chunk in chunks)

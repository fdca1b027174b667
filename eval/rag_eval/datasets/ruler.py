"""Synthetic tasks after the definitions of RULER (Hsieh et al. 2024, arXiv:2404.06654).

Multi-key and multi-value retrieval, variable tracking and common-words extraction, cut into
chunks as a retriever would deliver them. Wording and word lists are our own; what is taken over
is each task's definition. Scores are the paper's "match all": the share of wanted items that
occur in the answer.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from itertools import pairwise

from rag_eval.datasets.core import DatasetOptions, Encode, Example, Passage
from rag_eval.datasets.filler import filler_chunks, paragraphs
from rag_eval.datasets.words import ADJECTIVES, NOUNS
from rag_eval.errors import EvalError

_ANSWER = "Read the passages below and answer the question about them."

NUM_VALUES = 4
"""Values of one key in the multi-value task (paper's default)."""
NUM_HOPS = 4
"""Assignments behind the first one in variable tracking (paper's default)."""
NUM_COMMON = 10
"""Common words to be named (paper's default)."""


def ruler_task(name: str, count: int, options: DatasetOptions, encode: Encode) -> list[Example]:
    """Generate `count` examples of a task.

    Parameters
    ----------
    name : str
        ``multikey``, ``multivalue``, ``variables`` or ``commonwords``.
    count : int
        Number of examples.
    options : DatasetOptions
        Number and length of chunks and the seed.
    encode : Encode
        Tokeniser that measures chunks.
    """
    if name not in TASKS:
        raise EvalError(f"RULER task {name!r} is not known; allowed: {', '.join(TASKS)}")
    build = TASKS[name]
    return [
        build(
            f"ruler-{name}-{number}",
            options,
            encode,
            random.Random(f"{name}/{options.seed}/{number}"),
        )
        for number in range(count)
    ]


def _multikey(name: str, options: DatasetOptions, encode: Encode, rng: random.Random) -> Example:
    """Ask for the number of one of many keys."""
    facts_per_chunk = 4
    keys = _keys(rng, facts_per_chunk * options.chunks)
    numbers = _numbers(rng, len(keys))
    target = rng.randrange(len(keys))
    lines = [_fact(key, number) for key, number in zip(keys, numbers, strict=True)]
    groups = [lines[at :: options.chunks] for at in range(options.chunks)]
    return _example(
        name,
        f"Which number is registered for {keys[target]}?",
        f"The number registered for {keys[target]} is",
        (numbers[target],),
        _spread(groups, {target % options.chunks}, options, encode, rng),
    )


def _multivalue(name: str, options: DatasetOptions, encode: Encode, rng: random.Random) -> Example:
    """Ask for all the numbers of one key."""
    key, *others = _keys(rng, options.chunks + 1)
    numbers = _numbers(rng, NUM_VALUES)
    groups: list[list[str]] = [
        [_fact(other, number)]
        for other, number in zip(others, _numbers(rng, options.chunks), strict=True)
    ]
    places = [rng.randrange(options.chunks) for _ in numbers]
    for place, number in zip(places, numbers, strict=True):
        groups[place].append(_fact(key, number))
    return _example(
        name,
        f"Which numbers are registered for {key}? Name all {NUM_VALUES}.",
        f"The numbers registered for {key} are",
        tuple(numbers),
        _spread(groups, set(places), options, encode, rng),
    )


def _variables(name: str, options: DatasetOptions, encode: Encode, rng: random.Random) -> Example:
    """Ask for every variable of a chain ``VAR A = 123``, ``VAR B = VAR A``, and so on."""
    names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(NUM_HOPS + 1)]
    value = _numbers(rng, 1)[0]
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
    # The chain runs through the prompt in order, as in the paper: a sorted draw of chunks.
    places = sorted(rng.choices(range(options.chunks), k=len(lines)))
    groups: list[list[str]] = [[] for _ in range(options.chunks)]
    for place, line in zip(places, lines, strict=True):
        groups[place].append(line)
    return _example(
        name,
        f"Which variables have the value {value}, directly or through other variables? "
        f"Name all {len(names)}.",
        f"The variables with the value {value} are",
        tuple(names),
        _spread(groups, set(places), options, encode, rng),
    )


def _common_words(
    name: str, options: DatasetOptions, encode: Encode, rng: random.Random
) -> Example:
    """Ask for the ten words that occur ten times as often as the others in a long list."""
    vocabulary = sorted(
        {
            word
            for text in paragraphs()
            for word in text.lower().split()
            if word.isalpha() and 4 <= len(word) <= 10
        }
    )
    common, rare = (words := rng.sample(vocabulary, 600))[:NUM_COMMON], words[NUM_COMMON:]
    budget = options.chunks * options.chunk_tokens
    # The paper repeats common words 30 and the others 3 times; the ratio is kept, the number of
    # distinct rare words follows the room there is.
    per_word = len(encode(" 1. " + " 2. ".join(rare[:50]))) / 50
    slots = int(budget / per_word)
    times = max(2, min(30, slots // (3 * NUM_COMMON)))
    listed = common * times
    single = max(1, times // 10)
    for word in rare:
        if len(listed) + single > slots:
            break
        listed += [word] * single
    rng.shuffle(listed)
    size = -(-len(listed) // options.chunks)
    passages = tuple(
        Passage(
            title="",
            text=" ".join(
                f"{start + at + 1}. {word}" for at, word in enumerate(listed[start : start + size])
            ),
            is_gold=True,
        )
        for start in range(0, len(listed), size)
    )
    return _example(
        name,
        f"Which {NUM_COMMON} words occur most often in the numbered list?",
        f"The {NUM_COMMON} words that occur most often are",
        tuple(common),
        passages,
    )


Task = Callable[[str, DatasetOptions, Encode, random.Random], Example]
TASKS: dict[str, Task] = {
    "multikey": _multikey,
    "multivalue": _multivalue,
    "variables": _variables,
    "commonwords": _common_words,
}


def _example(
    name: str, question: str, lead: str, parts: tuple[str, ...], passages: tuple[Passage, ...]
) -> Example:
    return Example(
        id=name,
        question=question,
        answers=(", ".join(parts),),
        answer_parts=parts,
        passages=passages,
        instruction=_ANSWER,
        lead=lead,
        ready_chunks=True,
    )


def _fact(key: str, number: str) -> str:
    return f"The number registered for {key} is {number}."


def _keys(rng: random.Random, count: int) -> list[str]:
    pairs = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    if count > len(pairs):
        raise EvalError(f"{count} keys are wanted, {len(pairs)} exist; take fewer chunks")
    return rng.sample(pairs, count)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _spread(
    groups: list[list[str]],
    gold: set[int],
    options: DatasetOptions,
    encode: Encode,
    rng: random.Random,
) -> tuple[Passage, ...]:
    """Insert each group's lines at random places of one filler chunk, their order kept."""
    longest = max(sum(len(encode(" " + line)) for line in group) for group in groups)
    room = max(1, options.chunk_tokens - longest)
    passages = []
    for index, (chunk, lines) in enumerate(
        zip(filler_chunks(len(groups), room, encode, rng), groups, strict=True)
    ):
        for shift, (place, line) in enumerate(
            zip(sorted(rng.randint(0, len(chunk)) for _ in lines), lines, strict=True)
        ):
            chunk.insert(place + shift, line)
        passages.append(Passage(title="", text=" ".join(chunk), is_gold=index in gold))
    return tuple(passages)

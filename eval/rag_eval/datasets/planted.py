"""Planted facts: one or two sentences to be found in real filler text.

Every chunk carries one fact of the same form, so the answer cannot be told from the form alone.
With two hops the first fact (who keeps which archive) and the second (the archive's code) stand
in different chunks, and only both together answer.
"""

from __future__ import annotations

import random

from rag_eval.datasets.core import DatasetOptions, Encode, Example, Passage
from rag_eval.datasets.filler import filler_chunks
from rag_eval.datasets.words import KEEPERS, PLACES
from rag_eval.errors import EvalError


def planted_facts(count: int, hops: int, options: DatasetOptions, encode: Encode) -> list[Example]:
    """Generate examples with one planted fact a chunk.

    Parameters
    ----------
    count : int
        Number of examples.
    hops : int
        1 (the fact names what is asked) or 2 (a second fact leads to it; needs two chunks).
    options : DatasetOptions
        Number and length of chunks and the seed.
    encode : Encode
        Tokeniser that measures chunks.

    Returns
    -------
    list of Example
        Ids are ``planted-<hops>hop-<n>``; the first n examples of a longer run are the same.
    """
    if hops not in (1, 2):
        raise EvalError(f"hops is {hops}; allowed: 1 or 2")
    if options.chunks < hops:
        raise EvalError(f"{hops} hops need at least {hops} chunks; given {options.chunks}")
    build = _one_hop if hops == 1 else _two_hops
    return [build(number, options, encode) for number in range(count)]


def _one_hop(number: int, options: DatasetOptions, encode: Encode) -> Example:
    rng = random.Random(f"planted-1/{options.seed}/{number}")
    places = rng.sample(PLACES, options.chunks)
    codes = _codes(rng, options.chunks)
    facts = [_code_fact(place, code) for place, code in zip(places, codes, strict=True)]
    target = rng.randrange(options.chunks)
    return Example(
        id=f"planted-1hop-{number}",
        question=f"What is the access code of the {places[target]} archive?",
        answers=(codes[target],),
        passages=_plant(facts, {target}, options, encode, rng),
        lead=f"The access code of the {places[target]} archive is",
        ready_chunks=True,
    )


def _two_hops(number: int, options: DatasetOptions, encode: Encode) -> Example:
    rng = random.Random(f"planted-2/{options.seed}/{number}")
    pairs = min(options.chunks // 2, len(KEEPERS))
    places = rng.sample(PLACES, options.chunks - pairs)
    codes = _codes(rng, options.chunks - pairs)
    keepers = rng.sample(KEEPERS, pairs)
    facts = [
        f"{keeper} is the keeper of the {place} archive."
        for keeper, place in zip(keepers, places[:pairs], strict=True)
    ]
    facts += [_code_fact(place, code) for place, code in zip(places, codes, strict=True)]
    target = rng.randrange(pairs)
    return Example(
        id=f"planted-2hop-{number}",
        question=f"What is the access code of the archive that {keepers[target]} keeps?",
        answers=(codes[target],),
        passages=_plant(facts, {target, pairs + target}, options, encode, rng),
        lead=f"The access code of the archive that {keepers[target]} keeps is",
        ready_chunks=True,
    )


def _code_fact(place: str, code: str) -> str:
    return f"The access code of the {place} archive is {code}."


def _codes(rng: random.Random, count: int) -> list[str]:
    return [str(code) for code in rng.sample(range(10_000, 100_000), count)]


def _plant(
    facts: list[str],
    gold: set[int],
    options: DatasetOptions,
    encode: Encode,
    rng: random.Random,
) -> tuple[Passage, ...]:
    """Put one fact into each chunk, between two of its sentences."""
    longest = max(len(encode(" " + fact)) for fact in facts)
    chunks = filler_chunks(len(facts), max(1, options.chunk_tokens - longest), encode, rng)
    passages = []
    for index, (chunk, fact) in enumerate(zip(chunks, facts, strict=True)):
        chunk.insert(rng.randint(1, max(1, len(chunk) - 1)), fact)
        passages.append(Passage(title="", text=" ".join(chunk), is_gold=index in gold))
    return tuple(passages)

"""Turning an example's passages into the chunks of one prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rag_eval.datasets.core import DatasetOptions, Encode, Example, Passage
from rag_eval.errors import EvalError

FILL = 0.8
"""A chunk counts as full from this share of the target length on: joining whole passages rarely
hits the target, and cutting every chunk would spoil more text than it gains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptChunk:
    """One chunk of a prompt.

    Parameters
    ----------
    ids : tuple of int
        Token ids of the chunk tokenised alone, its closing blank line included.
    titles : tuple of str
        Titles of the passages in it.
    is_gold : bool
        Whether it holds a passage that the data set marks as needed.
    """

    ids: tuple[int, ...]
    titles: tuple[str, ...]
    is_gold: bool


def arrange(
    example: Example,
    options: DatasetOptions,
    encode: Encode,
    corpus: Sequence[Passage] = (),
) -> list[PromptChunk]:
    """Build the chunks of one prompt.

    Gold passages go into different chunks where there are enough, other passages fill the
    shortest chunk until each holds ``FILL`` of the target length, and what is longer than the
    target is cut. Passages of `corpus` (other examples' contexts) fill what the example's own
    leave short.

    Parameters
    ----------
    example : Example
        Example with passages.
    options : DatasetOptions
        Number, length and order of chunks.
    encode : Encode
        Tokeniser of the model under test.
    corpus : sequence of Passage
        Passages that may serve as further distractors; with ``options.zipf``, whole chunks made
        by :func:`shared_chunks`.

    Returns
    -------
    list of PromptChunk
        `options.chunks` of them, fewer where there is not enough text.

    Raises
    ------
    EvalError
        The example has no contexts.
    """
    if not example.passages:
        raise EvalError(
            f"example {example.id} has no contexts of its own; "
            "give --retrieve INDEX or a data set with contexts"
        )
    rng = random.Random(f"{options.seed}/{example.id}")
    if example.ready_chunks:
        bins = [[passage] for passage in example.passages]
    else:
        bins = _pack(example, options, encode, corpus, rng)
    chunks = [
        _chunk(group, options, encode, cut=not example.ready_chunks) for group in bins if group
    ]
    return _ordered(chunks, options, rng)


def _pack(
    example: Example,
    options: DatasetOptions,
    encode: Encode,
    corpus: Sequence[Passage],
    rng: random.Random,
) -> list[list[Passage]]:
    # A data set without gold marks (CacheBlend's inputs) is taken in its own order.
    gold = [p for p in example.passages if p.is_gold]
    rest = [p for p in example.passages if not p.is_gold]
    if gold:
        rng.shuffle(rest)
    own = {p.text for p in example.passages}
    foreign = [p for p in corpus if p.text not in own]
    if options.zipf is not None:
        return _beside_shared(gold or rest[:1], _zipf(foreign, options, rng), options)
    # A few passages more than can fit; which ones is a matter of the seed.
    rest += rng.sample(foreign, min(len(foreign), 4 * options.chunks))
    if options.distractors is not None:
        rest = rest[: options.distractors]

    bins: list[list[Passage]] = [[] for _ in range(options.chunks)]
    sizes = [0] * options.chunks
    slots = rng.sample(range(options.chunks), options.chunks)
    for index, passage in enumerate(gold):
        slot = slots[index % options.chunks]
        bins[slot].append(passage)
        sizes[slot] += len(encode(passage.body))
    for passage in rest:
        slot = min(range(options.chunks), key=sizes.__getitem__)
        if sizes[slot] >= FILL * options.chunk_tokens:
            break
        bins[slot].append(passage)
        sizes[slot] += len(encode(passage.body))
    return bins


def shared_chunks(
    corpus: Sequence[Passage], options: DatasetOptions, encode: Encode
) -> list[Passage]:
    """Join the passages of a corpus, in its order, into chunks that prompts share as they are.

    Only an identical chunk has reusable KV, so what recurs must be the joined chunk.
    """
    joined: list[Passage] = []
    group: list[str] = []
    size = 0
    for passage in corpus:
        group.append(passage.body.strip())
        size += len(encode(passage.body))
        if size >= FILL * options.chunk_tokens:
            joined.append(Passage(title="", text="\n".join(group), is_gold=False))
            group, size = [], 0
    return joined


def _beside_shared(
    own: list[Passage], shared: list[Passage], options: DatasetOptions
) -> list[list[Passage]]:
    """Spread the example's own passages over at most all chunks, and fill up with shared ones."""
    bins: list[list[Passage]] = [[] for _ in range(min(len(own), options.chunks))]
    for index, passage in enumerate(own):
        bins[index % len(bins)].append(passage)
    room = options.chunks - len(bins)
    if options.distractors is not None:
        room = min(room, options.distractors)
    return bins + [[passage] for passage in shared[:room]]


def _zipf(pool: Sequence[Passage], options: DatasetOptions, rng: random.Random) -> list[Passage]:
    """Draw distinct passages, the one of rank k with weight ``1 / k ** exponent``.

    Ranks are those of the corpus, the same for every example: popular passages recur.
    """
    exponent = options.zipf or 1.0
    # Gumbel top-k would do the same; the exponential race needs no numpy and no normalisation.
    keyed = sorted(
        (rng.expovariate(1.0) * (rank + 1) ** exponent, rank) for rank in range(len(pool))
    )
    return [pool[rank] for _, rank in keyed[: options.chunks]]


def _chunk(
    group: Sequence[Passage], options: DatasetOptions, encode: Encode, *, cut: bool
) -> PromptChunk:
    ids = encode("\n".join(passage.body.strip() for passage in group))
    if cut:
        ids = ids[: options.chunk_tokens]
    return PromptChunk(
        # The blank line is tokenised by itself, so a cut never changes how a chunk ends.
        ids=(*ids, *encode("\n\n")),
        titles=tuple(passage.title for passage in group),
        is_gold=any(passage.is_gold for passage in group),
    )


def _ordered(
    chunks: list[PromptChunk], options: DatasetOptions, rng: random.Random
) -> list[PromptChunk]:
    if options.order == "given":
        return chunks
    shuffled = rng.sample(chunks, len(chunks))
    if options.order == "shuffled":
        return shuffled
    first = options.order == "gold_first"
    return sorted(shuffled, key=lambda chunk: chunk.is_gold != first)

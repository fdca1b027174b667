"""Prompts of ``bench ttft``: chunks of real text in two orders, to the token where a length is asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rag_eval.datasets import Example, PromptChunk
from rag_eval.datasets.core import Encode
from rag_eval.datasets.filler import filler_chunks
from rag_eval.errors import EvalError

if TYPE_CHECKING:
    from rag_eval.runner.prompts import EvalPrompt, PromptMaker

INSTRUCTION = "Answer the question from the passages."
QUESTION = "What do these passages say about names and how they are bound? Answer in one sentence."


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One prompt: its chunks, and its whole length where that is fixed, in tokens."""

    chunks: int
    chunk_tokens: int
    length: int | None = None


def make_prompts(
    point: Point, maker: PromptMaker, *, question_tokens: int, seed: int
) -> tuple[EvalPrompt, EvalPrompt]:
    """Prompt whose chunks are seen, and the same chunks in another order with a question.

    Parameters
    ----------
    point : Point
        Shape of the prompt.
    maker : PromptMaker
        Of the model that is measured.
    question_tokens : int
        Least length of the question in tokens; it is repeated up to there.
    seed : int
        Chooses the text.

    Raises
    ------
    EvalError
        The length leaves no room for the chunks.
    """
    question = QUESTION
    while len(maker.encode(question)) < question_tokens:
        question = f"{question} {QUESTION}"
    example = Example(
        id="ttft", question=question, answers=("",), passages=(), instruction=INSTRUCTION
    )
    frame = maker.join(example, ())
    sizes = _sizes(point, len(frame.input_ids))
    chunks = [
        PromptChunk(ids=ids, titles=(), is_gold=False)
        for ids in _texts(point, sizes, maker.encode, seed)
    ]
    seen = replace(frame, chunks=tuple(chunks))
    return seen, seen.rotated()


def _texts(point: Point, sizes: list[int], encode: Encode, seed: int) -> list[tuple[int, ...]]:
    """Token ids of each chunk: of about the size wanted, or cut to it where the length is fixed."""
    # Sentences are counted one by one; joined they are fewer tokens.
    for slack in range(0, max(sizes) + 65, 64):
        texts = filler_chunks(point.chunks, max(sizes) + slack, encode, random.Random(seed))
        found = [tuple(encode(" ".join(sentences) + "\n\n")) for sentences in texts]
        if point.length is None:
            return found
        if all(len(ids) >= size for ids, size in zip(found, sizes, strict=True)):
            return [ids[:size] for ids, size in zip(found, sizes, strict=True)]
    raise EvalError(
        f"there is not enough text for {point.chunks} chunks of {max(sizes)} tokens; ask for shorter "
        "prompts"
    )


def _sizes(point: Point, frame: int) -> list[int]:
    """Tokens of each chunk; where the length is fixed they share what the frame leaves."""
    if point.length is None:
        return [point.chunk_tokens] * point.chunks
    room = point.length - frame
    if room < point.chunks:
        raise EvalError(
            f"a prompt of {point.length} tokens leaves {room} for {point.chunks} chunks; ask for "
            "longer prompts or fewer chunks"
        )
    return [room // point.chunks + (index < room % point.chunks) for index in range(point.chunks)]

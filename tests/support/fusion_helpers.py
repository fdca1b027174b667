"""Prompts of random tokens over stored chunks, and what a finished request says: for the tests of fusion."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

VOCAB, PREFIX, CHUNK = 256, 20, 40
"""Size of the tiny models' vocabulary; tokens of the shared prefix and of one chunk."""


def tokens(count: int, seed: int) -> list[int]:
    """Random token ids without the two special ones."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(2, VOCAB, (count,), generator=generator).tolist()
    return ids


PREFIX_IDS = tokens(PREFIX, 1)
CHUNKS = [tokens(CHUNK, 10 + i) for i in range(4)]


def lay_out(
    chunks: Sequence[Sequence[int]],
    question: Sequence[int],
    prefix: Sequence[int] = PREFIX_IDS,
    between: Sequence[int] = (),
) -> tuple[list[int], list[int]]:
    """Prompt and the flat edges of its chunks; ``between`` follows every chunk and belongs to none."""
    ids, spans = list(prefix), []
    for chunk in chunks:
        spans += [len(ids), len(ids) + len(chunk)]
        ids += [*chunk, *between]
    return [*ids, *question], spans


QUESTION = tokens(9, 2)
SWAPPED, SWAPPED_SPANS = lay_out([CHUNKS[1], CHUNKS[0]], QUESTION)
"""Prompt of the first two chunks in the other order, so that only the second of them is moved; and its spans."""


def store_chunks(local: Any, chunks: Sequence[list[int]], prefix: list[int] = PREFIX_IDS) -> Any:
    """Have an engine build chunks behind a prefix and forget the prompts; returns the engine."""
    for chunk in chunks:
        local.build(prefix, chunk)
    local.flush()
    return local


def enter_prefix(local: Any, prefix: Sequence[int] = PREFIX_IDS) -> None:
    """Have the radix tree hold the shared prefix, and nothing behind it."""
    local.ask([*prefix, 3], 1, fusion={"mode": "off"})


@contextlib.contextmanager
def attribute(thing: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


def chunk_limit(local: Any, rows: int) -> contextlib.AbstractContextManager[None]:
    """Cut prompts into pieces of so many computed rows, for a while."""
    return attribute(local.scheduler, "chunked_prefill_size", rows)


def report(req: Any) -> dict[str, Any]:
    """What fusion reports of a finished request."""
    found: dict[str, Any] = req.customized_info["rag_fusion"][0]
    return found


def logprobs(req: Any) -> list[float]:
    """Log-probabilities of the tokens that were generated."""
    return list(req.logprob.output_token_logprobs_val)


def agrees_with_oracle(req: Any, wanted: torch.Tensor, limit: float = 5e-4) -> None:
    """Fail unless the first token and its likeliest rivals have the log-probabilities of the definition."""
    got = torch.tensor(req.logprob.output_top_logprobs_val[0]).double()
    named = torch.tensor(req.logprob.output_top_logprobs_idx[0])
    torch.testing.assert_close(got, wanted[named], rtol=0, atol=limit)
    assert int(wanted.argmax()) == req.output_ids[0]


def largest_difference(one: Any, two: Any) -> float:
    """Between the log-probabilities of two answers, whose tokens must be the same."""
    assert list(one.output_ids) == list(two.output_ids)
    return max(abs(a - b) for a, b in zip(logprobs(one), logprobs(two), strict=True))


def agree(one: Any, two: Any, limit: float = 5e-4) -> None:
    """Fail unless two answers are the same up to rounding."""
    assert largest_difference(one, two) < limit


@contextlib.contextmanager
def registered(registry: Any, value: Any) -> Iterator[None]:
    """Have a registry know somebody else's implementation, by its own name, for a while."""
    registry.register(value.name, value)
    try:
        yield
    finally:
        registry.unregister(value.name)

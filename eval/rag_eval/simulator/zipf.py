"""A trace of RAG requests whose chunks are as popular as Zipf's law says."""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable

from rag_eval.errors import EvalError
from rag_eval.simulator.traces import Trace, TraceJob

_SHORTEST, _LONGEST = 96, 192
"""Tokens of a chunk; the splitter's default is the longest."""
_QUESTION_TOKENS = 64


def zipf_trace(
    num_jobs: int = 8000,
    *,
    num_chunks: int = 20_000,
    top_k: int = 8,
    exponent: float = 1.0,
    seed: int = 0,
) -> Trace:
    """Generate requests that each retrieve a few chunks of one corpus.

    Requests arrive as a Poisson process of one per second. Chunks are drawn without replacement, the ``r``-th most
    popular with a weight of ``r ** -exponent``. A chunk is reused wherever it stands in a prompt.

    Parameters
    ----------
    num_jobs : int
        Requests, at least 2.
    num_chunks : int
        Chunks of the corpus, at least ``top_k``.
    top_k : int
        Chunks per request.
    exponent : float
        Of Zipf's law; 0 makes all chunks equally popular.
    seed : int
        Of all that is drawn.

    Raises
    ------
    EvalError
        Numbers out of these bounds.
    """
    if num_jobs < 2 or top_k < 1 or num_chunks < top_k or exponent < 0:
        raise EvalError(
            f"zipf trace: num_jobs={num_jobs}, num_chunks={num_chunks}, top_k={top_k}, exponent={exponent}; give at "
            "least 2 requests, 1 chunk per request and as many in the corpus, and 0 or more"
        )
    draw = random.Random(seed)
    sizes = [draw.randint(_SHORTEST, _LONGEST) for _ in range(num_chunks)]
    shares = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(num_chunks)))
    ranks = range(num_chunks)
    arrival_s = 0.0
    jobs = []
    for number in range(num_jobs):
        arrival_s += draw.expovariate(1.0)
        chosen: dict[Hashable, int] = {}
        while len(chosen) < top_k:
            (rank,) = draw.choices(ranks, cum_weights=shares)
            chosen[rank] = sizes[rank]
        weights = tuple(chosen.values())
        jobs.append(
            TraceJob(
                arrival_s=arrival_s,
                tokens=sum(weights) + _QUESTION_TOKENS,
                keys=tuple(chosen),
                weights=weights,
                session=("request", number),
            )
        )
    return Trace(name=f"zipf-{exponent:g}", jobs=jobs, is_prefix=False)

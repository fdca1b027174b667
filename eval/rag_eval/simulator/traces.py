"""Traces of requests: when each came, and which stored pieces of KV it asks for."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from rag_eval.errors import EvalError

BLOCK_TOKENS = 512
"""Tokens of one block in the traces of Mooncake."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TraceJob:
    """One request.

    Attributes
    ----------
    arrival_s : float
        When it came, seconds.
    tokens : int
        What its prompt holds; the server's work.
    keys : tuple of hashable
        Pieces of the prompt whose KV may be stored, in prompt order.
    weights : tuple of int
        Tokens of each piece.
    session : hashable
        The conversation that it belongs to; pieces that it stores first are of that session.
    """

    arrival_s: float
    tokens: int
    keys: tuple[Hashable, ...]
    weights: tuple[int, ...]
    session: Hashable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests in order of arrival.

    Attributes
    ----------
    name : str
        For reports.
    jobs : sequence of TraceJob
        At least two, at two different times.
    is_prefix : bool
        A piece can be used only behind all that stand before it in the prompt (prefix caching). Otherwise each stands
        for itself (chunk reuse).
    """

    name: str
    jobs: Sequence[TraceJob]
    is_prefix: bool

    def __post_init__(self) -> None:
        if len(self.jobs) < 2 or not self.duration_s > 0:
            raise EvalError(
                f"trace {self.name}: {len(self.jobs)} requests in {self.duration_s if self.jobs else 0:g} s; "
                "give at least two at different times"
            )

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last, seconds."""
        return self.jobs[-1].arrival_s - self.jobs[0].arrival_s

    @functools.cached_property
    def distinct_tokens(self) -> int:
        """Tokens of all pieces, each counted once: with so much memory nothing is ever evicted."""
        weights: dict[Hashable, int] = {}
        for job in self.jobs:
            weights.update(zip(job.keys, job.weights, strict=True))
        return sum(weights.values())


def read_trace(path: Path, *, limit: int | None = None) -> Trace:
    """Read a trace in the format of Mooncake: a JSON object per line.

    A line has ``timestamp`` (milliseconds), ``input_length`` (tokens) and ``hash_ids``, one per block of 512 tokens,
    where each hash covers all blocks before it too. The session of a request is its first block that fewer than half
    of the requests share: what all share is a system prompt.

    Parameters
    ----------
    path : Path
        The file, such as ``conversation_trace.jsonl`` of the Mooncake repository.
    limit : int, optional
        Read so many requests at most.

    Raises
    ------
    EvalError
        The file cannot be read or has a line of another form; one line that names it.
    """
    rows: list[tuple[float, int, tuple[Hashable, ...]]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(rows) >= limit:
                    break
                if line.strip():
                    rows.append(_row(f"{path}:{number}", line))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise EvalError(f"trace {path} cannot be read: {reason}; give a .jsonl file") from None
    rows.sort(key=lambda row: row[0])
    counts = Counter(key for _, _, keys in rows for key in keys)
    jobs = []
    for arrival_s, tokens, keys in rows:
        own = (key for key in keys if 2 * counts[key] < len(rows))
        jobs.append(
            TraceJob(
                arrival_s=arrival_s,
                tokens=tokens,
                keys=keys,
                weights=(BLOCK_TOKENS,) * len(keys),
                session=next(own, keys[0]),
            )
        )
    return Trace(name=path.stem, jobs=jobs, is_prefix=True)


def _row(where: str, line: str) -> tuple[float, int, tuple[Hashable, ...]]:
    try:
        found: Any = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise EvalError(f"{where}: no JSON object; give one object per line")
    stamp, tokens, keys = (found.get(n) for n in ("timestamp", "input_length", "hash_ids"))
    if (
        not isinstance(stamp, int | float)
        or not isinstance(tokens, int)
        or not isinstance(keys, list)
        or not 0 <= stamp < float("inf")
        or tokens < 1
        or not keys
        or not all(isinstance(key, int | str) for key in keys)
    ):
        raise EvalError(
            f"{where}: give timestamp (ms, 0 or more), input_length (tokens, 1 or more) and hash_ids (a list with at "
            "least one id)"
        )
    return stamp / 1000, tokens, tuple(dict.fromkeys(keys))

"""What a request asks of a conversation's memory: records of a fixed number of slots, loaded and made by requests.

A memory record holds the KV of the tokens of a long history that a rule kept, the same number for every layer and KV head
(EpiCache, https://arxiv.org/abs/2509.17396). A prompt that loads one is ``[prefix][slots][rest]``; the token ids at the
slots are the last tokens of the history that the record has seen, as many as it has slots. If the record is missing,
they are prefilled, and the prompt is one with a sliding window.

A prompt that makes one is ``[prefix][slots of the record before][block][probe]``: slots and block compete for the budget,
the queries of the probe score their keys, the probe's own KV is dropped. Some rules need no probe.

Slots and all that stands behind them are as far from one another as they were in the history. The prefix is not: it
keeps its place at the beginning, so everything sees it nearer, by as many tokens as were evicted (as StreamingLLM has its
sinks). Whoever wants it at its true distance, too, makes it the beginning of the first block, with ``prefix_len`` 0 and a
rule that pins it (``epicache:first=120``); its tokens then count as slots, and no other prompt shares its KV.

On the wire, inside the fusion fields (:mod:`rag_pipeline.protocol.fusion_request`)::

    {"prefix_len": 120, "memory": {
        "load": [{"start": 120, "end": 2168, "id": "5f..."}],
        "store": {"end": 2680, "budget": 2048, "rule": "epicache", "own": [[120, 310]], "own_share": 0.75},
        "spans": [[300, 340]]}}

``custom_params`` holds the same object as one string of JSON, ``rag_memory``. This module imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]
"""Token ids, one dimension."""

ID_DIGITS = 64
"""Hex digits of a memory id."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLoad:
    """Slots ``[start, end)`` of the prompt are the record of this id.

    Two loads of one request name the same slots: the engine merges the two records into one of that size.
    """

    start: int
    end: int
    id: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryStore:
    """What the request's prefill leaves as a record.

    Attributes
    ----------
    end : int
        ``[prefix_len, end)`` of the prompt competes for the budget, ``[end, prompt)`` is the probe.
    budget : int
        Most slots that are kept per layer and KV head.
    rule : str
        Scores the keys, with its parameters, such as ``snapkv:window=64``.
    own : tuple of (int, int)
        Spans ``[start, end)`` of true positions, counted as :attr:`MemoryFields.spans` are, rising and disjoint: their tokens
        stay before others whatever these score. None for scores alone.
    own_share : float
        Share of the budget in which they do, above 0 and up to 1; the rest is filled by score first. Without own spans it
        says nothing.
    """

    end: int
    budget: int
    rule: str
    own: tuple[tuple[int, int], ...] = ()
    own_share: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """What is not left at its default."""
        fields: dict[str, Any] = {"end": self.end, "budget": self.budget, "rule": self.rule}
        if self.own:
            fields["own"] = [list(span) for span in self.own]
            if self.own_share != 1.0:
                fields["own_share"] = self.own_share
        return fields


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFields:
    """What one request asks of the memory.

    Attributes
    ----------
    load : tuple of MemoryLoad
        None, one, or two over the same slots, which begin right behind the prefix.
    store : MemoryStore or None
        What it leaves.
    spans : tuple of (int, int)
        True positions ``[start, end)``, counted as if nothing had been evicted, prefix included, whose kept share the
        report tells: of the record that is stored, otherwise of the one that is loaded.
    """

    load: tuple[MemoryLoad, ...] = ()
    store: MemoryStore | None = None
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def load_end(self) -> int:
        """One past the last slot that is loaded; 0 where nothing is."""
        return self.load[0].end if self.load else 0

    def to_json(self) -> dict[str, Any]:
        """What is not left at its default; :func:`rag_pipeline.protocol.fields.parse_fields` reads it back."""
        fields: dict[str, Any] = {}
        if self.load:
            fields["load"] = [dataclasses.asdict(load) for load in self.load]
        if self.store is not None:
            fields["store"] = self.store.to_json()
        if self.spans:
            fields["spans"] = [list(span) for span in self.spans]
        return fields

    def to_text(self) -> str:
        """The same as one string of JSON."""
        return json.dumps(self.to_json(), separators=(",", ":"))


def memory_id(
    previous: str,
    prefix_ids: Ids,
    block_ids: Ids,
    probe_ids: Ids,
    rule: str,
    budget: int,
    own: Sequence[tuple[int, int]] = (),
    own_share: float = 1.0,
) -> str:
    """Name the record that a step makes, by all that goes into it.

    Client and engine compute it alike; a rule with its defaults spelled out, or not, is the same. The engine stores under
    the id of what it has processed, so an id never names other content. Model, engine settings and tenant are no part of it: they are part of every record's key.

    Parameters
    ----------
    previous : str
        Id of the record that the step loads; empty for the first step.
    prefix_ids : sequence of int
        Tokens in front of the slots.
    block_ids : sequence of int
        Tokens that the step computes behind them, without the probe.
    probe_ids : sequence of int
        Tokens of the probe; may be empty.
    rule : str
        As of :class:`MemoryStore`.
    budget : int
        Slots per layer and head.
    own, own_share : sequence of (int, int), float
        As of :class:`MemoryStore`.

    Returns
    -------
    str
        64 hex digits.
    """
    # Brings torch in, which a client that only writes requests has no use for.
    from chunk_cache.retention import create_rule

    digest = hashlib.blake2b(digest_size=ID_DIGITS // 2, person=b"ragkv-memory")
    parts = [
        previous.encode(),
        _id_bytes(prefix_ids),
        _id_bytes(block_ids),
        _id_bytes(probe_ids),
        create_rule(rule).identity.encode(),
        str(int(budget)).encode(),
    ]
    if own:
        parts += [
            _id_bytes([edge for span in own for edge in span]),
            repr(float(own_share)).encode(),
        ]
    for part in parts:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)
    return digest.hexdigest()


def memory_report(report: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What an answer's fusion report tells of the memory; empty where it tells nothing."""
    found = (report or {}).get("memory")
    return found if isinstance(found, Mapping) else {}


def _id_bytes(ids: Ids) -> bytes:
    return np.ascontiguousarray(np.asarray(ids, dtype="<i8").reshape(-1)).tobytes()

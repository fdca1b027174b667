"""An order to the chunk cache of a running engine, as it travels to the scheduler processes, and its answer.

An order rides as the id of SGLang's own request for its internal state: that request reaches every scheduler process
of an engine between two batches, in the same order on each, and what it brings back is a free dictionary. So orders
need no hook of their own and no socket. The answer is asked for by the same ticket until it is there.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rag_pipeline.errors import EngineError
from rag_pipeline.protocol.cache_replicas import merge_replicas

CACHE_KEY = "rag_cache"
"""Where the answer stands in each of SGLang's ``internal_states``."""

CACHE_ACTIONS = ("stats", "ls", "pin", "unpin", "prefetch", "evict", "verify", "memories")

MAX_KEYS = 1024
"""Keys of one order; bounds what one request can cause."""
MAX_LISTED = 10_000
"""Records of one page of a listing."""
MAX_TTL_S = 10 * 366 * 24 * 3600.0
"""Longest pin that ends, seconds."""

_MARK = "rag-cache:"


class CacheOrderError(EngineError):
    """An order that cannot be carried out: one line, and the HTTP status for it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOrder:
    """One order.

    Parameters
    ----------
    action : str
        One of :data:`CACHE_ACTIONS`.
    ticket : str
        Names the answer.
    keys : tuple of str
        Digests of chunks, or their first digits; of ``memories`` whole memory ids.
    tier : str
        Only this tier; empty for all.
    ttl_s : float or None
        How long a pin holds, seconds; None for good.
    max_bytes : int or None
        What a tier may weigh after an eviction.
    tenant : str or None
        Only what belongs to the tenant of this :func:`chunk_cache.tenant_mark`; None for everybody.
    offset, limit : int
        Page of a listing.
    """

    action: str
    ticket: str
    keys: tuple[str, ...] = ()
    tier: str = ""
    ttl_s: float | None = None
    max_bytes: int | None = None
    tenant: str | None = None
    offset: int = 0
    limit: int = 1000

    def encode(self) -> str:
        """Write it as the id of a request."""
        return _MARK + json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | None) -> CacheOrder | None:
        """Read the id of a request; None for one that is no order of ours."""
        if not isinstance(text, str) or not text.startswith(_MARK):
            return None
        try:
            given = json.loads(text.removeprefix(_MARK))
            known = {field.name for field in fields(cls)}
            return cls(**{**given, "keys": tuple(given["keys"])}) if known >= set(given) else None
        except (ValueError, TypeError, KeyError):
            return None


def memories_order(ids: Sequence[str], tenant: str | None = None) -> CacheOrder:
    """Ask which of these memory ids have a record; the answer names those that have under ``present``."""
    return CacheOrder(
        action="memories", ticket=secrets.token_hex(8), keys=tuple(ids), tenant=tenant
    )


def read_answer(states: list[Mapping[str, Any]], ticket: str) -> dict[str, Any] | None:
    """Find the answer to a ticket in what the scheduler processes reported; None where it is not there yet.

    Parameters
    ----------
    states : list of mapping
        Internal states, one per replica (``--dp-size``).
    ticket : str
        Of the order.

    Returns
    -------
    dict or None
        What the replicas that carried it out say together (:func:`.cache_replicas.merge_replicas`).

    Raises
    ------
    CacheOrderError
        With the line and the status of the refusal, where every replica refused.
    """
    answers = [state.get(CACHE_KEY) or {} for state in states]
    # The late report of somebody else's request has another ticket or none; whoever asks again is told.
    if not answers or not all(a.get("ticket") == ticket and a["done"] for a in answers):
        return None
    results: list[dict[str, Any]] = [a["result"] for a in answers if "result" in a]
    if not results:
        raise CacheOrderError(str(answers[0]["error"]), int(answers[0]["status"]))
    # A replica that has none of the chunks refuses, and the others do what they can.
    return results[0] if len(answers) == 1 else merge_replicas(results)

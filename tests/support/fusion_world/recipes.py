"""Recurring requests in other shapes: documents edited in place, cut, moved, repeated."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace

PREFIXES = ((2, 3, 4, 5, 6, 7), (2, 3, 4, 9, 9, 8, 7, 6, 5), ())
DOCUMENTS = tuple(
    tuple(random.Random(length).choices(range(2, 40), k=length)) for length in (18, 23, 31)
)
LONG_DOCUMENTS = tuple(
    tuple(random.Random(length).choices(range(2, 40), k=length)) for length in (75, 90, 120)
)
"""For an engine, which looks for runs of 64 tokens."""
POLICIES = ("reuse", "full", "epic:0.3", "query:0.5", "query:1.0", "cacheblend:0.5")
TENANTS = (
    RadixNamespace(None, None),
    RadixNamespace("other", None),
    RadixNamespace(None, "salt"),
    RadixNamespace(None, "salt/own"),
)
QUESTIONS = ((45, 46), (46, 47, 45, 3, 5, 9), DOCUMENTS[0][2:12])
EDITS = ("as it is", "as it is", "first tokens", "first tokens", "middle", "head cut", "tail cut")
MODES = ("fuse", "fuse", "fuse", "fuse", "build", "off", "automatic")

Choose = Callable[[Sequence[Any]], Any]
Fields = dict[str, Any] | None


def edited(document: tuple[int, ...], how: str) -> tuple[int, ...]:
    """A document as it comes back: a date changed in place, a part cut off."""
    if how == "first tokens":
        return (41, 42, 43, *document[3:])
    if how == "middle":
        return (*document[:8], 44, *document[9:])
    if how == "head cut":
        return document[4:]
    return document[:-5] if how == "tail cut" else document


def draw_request(
    choose: Choose, documents: Sequence[tuple[int, ...]] = DOCUMENTS
) -> tuple[list[int], Fields]:
    """Token ids, and the fields of fusion; None for a client that says nothing of it.

    Parameters
    ----------
    choose : callable
        Takes one of a sequence: hypothesis, or a random generator.
    documents : sequence of tuple of int
        What chunks are made of.
    """
    prefix = choose((PREFIXES[0], PREFIXES[0], PREFIXES[0], *PREFIXES))
    chunks = [edited(choose(documents), choose(EDITS)) for _ in range(choose((1, 1, 2)))]
    ids, spans = list(prefix), []
    for chunk in chunks:
        spans.append([len(ids), len(ids) + len(chunk)])
        ids += chunk
    ids += choose(QUESTIONS)
    mode = choose(MODES)
    if mode == "automatic":
        return ids, None
    if mode == "off":
        return ids, {"mode": "off"}
    if mode == "build":
        return ids, {"mode": "build", "spans": spans[:1], "prefix_len": len(prefix)}
    fusion: dict[str, Any] = {"spans": spans, "prefix_len": len(prefix)}
    fusion["policy"] = choose(POLICIES)
    if choose((False, True)):
        fusion["passage"] = False
    if choose((False, False, False, True)):
        fusion["conversation"] = "c"
    return ids, fusion


def draw_tenant(choose: Choose) -> RadixNamespace:
    """One of three, mostly the first."""
    tenant: RadixNamespace = choose((TENANTS[0], TENANTS[0], TENANTS[0], *TENANTS))
    return tenant


def builds() -> list[tuple[list[int], Fields]]:
    """Requests that store every document as it is behind the first prefix."""
    prefix, made = PREFIXES[0], []
    for document in DOCUMENTS:
        spans = [[len(prefix), len(prefix) + len(document)]]
        fields = {"mode": "build", "spans": spans, "prefix_len": len(prefix)}
        made.append(([*prefix, *document, 2], fields))
    return made

"""Which stored KV serves a prompt: at a chunk's own place what was computed there, elsewhere what saw the passage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from chunk_cache import ChunkKey, Match, merge_matches
from rag_pipeline.sglang_plugin.fusion.builds.variants import variant_at
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime, KnownPrefix, TokenArray

_MAX_PREFIX_CANDIDATES = 4

Spans = Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoredCover:
    """What of a prompt the store can serve.

    Attributes
    ----------
    matches : list of Match
        Disjoint runs in prompt order.
    missing : list of (int, int)
        Explicit spans that are worth building.
    behind_passage : frozenset of ChunkKey
        Chunks among the matches whose KV saw the neutral passage.
    """

    matches: list[Match]
    missing: list[tuple[int, int]]
    behind_passage: frozenset[ChunkKey] = frozenset()


def find_in_spans(
    runtime: FusionRuntime,
    prompt: TokenArray,
    prefix: KnownPrefix,
    spans: tuple[tuple[int, int], ...],
    *,
    passage: bool = True,
) -> StoredCover:
    """Look up a client's spans; `passage` false leaves KV unused that saw the neutral passage.

    Where a span is missing, the prompt is scanned for an older, differently cut chunk that may serve around it; outside
    the spans the client said that there is no chunk: the question stays fresh whatever it quotes.
    """
    with_passage = runtime.behind_passage(prefix) if passage else None
    if with_passage is None:
        return _look_up(runtime, prompt, prefix, spans, scan=True)
    behind_prefix = _look_up(runtime, prompt, prefix, spans, scan=False)
    behind_passage = _look_up(runtime, prompt, with_passage, spans, scan=False)
    # At its own place a chunk has plain KV only, elsewhere perhaps only what saw the passage: missing is what has neither.
    if set(behind_prefix.missing) & set(behind_passage.missing):
        behind_prefix = _look_up(runtime, prompt, prefix, spans, scan=True)
        behind_passage = _look_up(runtime, prompt, with_passage, spans, scan=True)
    # Away from its own place a chunk is worth building behind the passage although a plain one may serve now.
    missing = [
        span
        for found, built_behind in ((behind_prefix, prefix), (behind_passage, with_passage))
        for span in found.missing
        if variant_at(span[0], prefix, with_passage) is built_behind
    ]
    return _combine(runtime, prefix, behind_prefix.matches, behind_passage.matches, sorted(missing))


def scan_prompt(
    runtime: FusionRuntime, prompt: TokenArray, tenant: RadixNamespace, *, passage: bool = True
) -> tuple[KnownPrefix | None, StoredCover]:
    """Longest cover over the known prefixes that the prompt begins with; `passage` as for spans."""
    best: KnownPrefix | None = None
    cover, most = StoredCover(matches=[], missing=[]), 0
    for known in runtime.prefixes_of(prompt, tenant)[:_MAX_PREFIX_CANDIDATES]:
        behind_prefix = runtime.store.match(prompt, known.context)
        with_passage = runtime.behind_passage(known) if passage else None
        behind_passage = (
            runtime.store.match(prompt, with_passage.context) if with_passage is not None else []
        )
        here = _combine(runtime, known, behind_prefix, behind_passage, [])
        covered = sum(match.num_tokens for match in here.matches)
        if covered > most:
            best, cover, most = known, here, covered
    return best, cover


def _look_up(
    runtime: FusionRuntime, prompt: TokenArray, prefix: KnownPrefix, spans: Spans, *, scan: bool
) -> StoredCover:
    """Look up one variant of the chunks, those that were computed behind `prefix`."""
    found = runtime.store.resolve(
        prompt,
        prefix.context,
        spans=spans,
        automatic=scan,
        min_piece=runtime.config.min_reused_tokens,
    )
    inside = [
        match.clipped(start, end)
        for match in found.matches
        for start, end in spans
        if match.prompt_start < end and start < match.prompt_end
    ]
    return StoredCover(matches=inside, missing=list(found.missing))


def _combine(
    runtime: FusionRuntime,
    prefix: KnownPrefix,
    behind_prefix: Sequence[Match],
    behind_passage: Sequence[Match],
    missing: list[tuple[int, int]],
) -> StoredCover:
    """Chunk at its own place first, then what saw the passage, then plain KV for the rest."""
    own_place, min_piece = int(prefix.ids.size), runtime.config.min_reused_tokens
    at_own_place = [m for m in behind_prefix if m.prompt_start == own_place and m.chunk_offset == 0]
    matches = merge_matches(at_own_place, behind_passage, min_piece=min_piece)
    return StoredCover(
        matches=merge_matches(matches, behind_prefix, min_piece=min_piece),
        missing=missing,
        behind_passage=frozenset(m.key for m in behind_passage),
    )

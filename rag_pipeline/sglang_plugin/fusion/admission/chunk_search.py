"""Which stored KV serves a prompt: at a chunk's own place what was computed there, elsewhere what saw the passage."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from typing import Any

from chunk_cache import ChunkKey, Match
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.request.state import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime, KnownPrefix, TokenArray

_MAX_PREFIX_CANDIDATES = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the store has for a prompt.

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
) -> Found:
    """Look up a client's spans; `passage` false leaves KV unused that saw the neutral passage.

    Where a span is missing, the prompt is scanned for an older, differently cut chunk that may serve around it; outside
    the spans the client said that there is no chunk: the question stays fresh whatever it quotes.
    """
    behind = runtime.behind_passage(prefix) if passage else None
    if behind is None:
        return _resolve(runtime, prompt, prefix, spans, scan=True)
    plain, moved = (_resolve(runtime, prompt, p, spans, scan=False) for p in (prefix, behind))
    # At its own place a chunk has plain KV only, elsewhere perhaps only what saw the passage: missing is what has neither.
    if set(plain.missing) & set(moved.missing):
        plain, moved = (_resolve(runtime, prompt, p, spans, scan=True) for p in (prefix, behind))
    own = int(prefix.ids.size)
    # Away from its own place a chunk is worth building behind the passage although a plain one may serve now.
    missing = [s for s in plain.missing if s[0] == own]
    missing += [s for s in moved.missing if s[0] != own]
    return _together(plain.matches, moved.matches, sorted(missing), own, runtime)


def scan_prompt(
    runtime: FusionRuntime, prompt: TokenArray, tenant: RadixNamespace, *, passage: bool = True
) -> tuple[KnownPrefix | None, Found]:
    """Longest cover over the known prefixes that the prompt begins with; `passage` as for spans."""
    best: KnownPrefix | None = None
    found, most = Found(matches=[], missing=[]), 0
    for known in runtime.prefixes_of(prompt, tenant)[:_MAX_PREFIX_CANDIDATES]:
        plain = runtime.store.match(prompt, known.context)
        behind = runtime.behind_passage(known) if passage else None
        moved = runtime.store.match(prompt, behind.context) if behind is not None else []
        here = _together(plain, moved, [], int(known.ids.size), runtime)
        cover = sum(match.num_tokens for match in here.matches)
        if cover > most:
            best, found, most = known, here, cover
    return best, found


def build_behind_passage(runtime: FusionRuntime, req: Any, request: FusionRequest) -> FusionRequest:
    """Put the passage between the shared prefix and the chunk of a ``build`` request.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    req : Req
        SGLang's; its prompt is replaced.
    request : FusionRequest
        With ``passage``, as the client sent it.

    Returns
    -------
    FusionRequest
        For the new prompt; mode ``off`` when there is no passage, or no room for it.
    """
    passage, start = runtime.passage, request.prefix_len
    length = len(req.origin_input_ids) + passage.size
    if not passage.size or not runtime.is_on or length >= runtime.max_prompt:
        return FusionRequest(mode="off")
    ids = list(req.origin_input_ids)
    longer = array("q", [*ids[:start], *passage.tolist(), *ids[start:]])
    req.origin_input_ids = req.origin_input_ids_unpadded = longer
    offset = start + int(passage.size)
    spans = tuple((s - start + offset, e - start + offset) for s, e in request.spans)
    return dataclasses.replace(request, spans=spans, prefix_len=offset, passage=None)


def _resolve(
    runtime: FusionRuntime,
    prompt: TokenArray,
    prefix: KnownPrefix,
    spans: tuple[tuple[int, int], ...],
    *,
    scan: bool,
) -> Found:
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
    return Found(matches=inside, missing=list(found.missing))


def _together(
    plain: Sequence[Match],
    moved: Sequence[Match],
    missing: list[tuple[int, int]],
    own: int,
    runtime: FusionRuntime,
) -> Found:
    """Chunk at its own place first, then what saw the passage, then plain KV for the rest."""
    exact = [m for m in plain if m.prompt_start == own and m.chunk_offset == 0]
    least = runtime.config.min_reused_tokens
    matches = _fill(_fill(exact, moved, least), plain, least)
    return Found(matches=matches, missing=missing, behind_passage=frozenset(m.key for m in moved))


def _fill(chosen: list[Match], more: Sequence[Match], least: int) -> list[Match]:
    """Add the parts of `more` that lie in the gaps of `chosen`, pieces under `least` tokens left out."""
    filled = list(chosen)
    for match in more:
        at = match.prompt_start
        for taken in sorted(chosen, key=lambda m: m.prompt_start):
            if taken.prompt_end <= at or taken.prompt_start >= match.prompt_end:
                continue
            if taken.prompt_start - at >= least:
                filled.append(match.clipped(at, taken.prompt_start))
            at = taken.prompt_end
        if at < match.prompt_end and (at == match.prompt_start or match.prompt_end - at >= least):
            filled.append(match.clipped(at, match.prompt_end))
    return sorted(filled, key=lambda m: m.prompt_start)

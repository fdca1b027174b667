"""Store benchmark, the index: one prompt scanned against all stored chunks, chunks in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from chunk_cache import ChunkKey, ChunkMatcher, MatchResult, as_token_ids
from rag_eval.benchmarks.call_timer import CallTimer
from rag_eval.benchmarks.store_config import CONTEXT, VOCABULARY, StoreBenchConfig


def time_matching(config: StoreBenchConfig, progress: Callable[[str], None]) -> dict[str, Any]:
    """Time the index: chunks into it, prompts of four kinds against it, chunks out of it."""
    rng = np.random.default_rng(config.seed)

    def text(length: int) -> npt.NDArray[np.int64]:
        return rng.integers(0, VOCABULARY, length, dtype=np.int64)

    opening = text(min(96, config.chunk_tokens // 2))
    chunks: list[npt.NDArray[np.int32]] = []
    for number in range(config.chunks):
        drawn = text(config.chunk_tokens)
        if number % 10 == 0:
            drawn[: opening.size] = opening
        chunks.append(as_token_ids(drawn))
    keys = [ChunkKey.of(CONTEXT, ids) for ids in chunks]

    matcher = ChunkMatcher()
    progress(f"indexing {config.chunks} chunks of {config.chunk_tokens} tokens")
    adding = CallTimer()
    for key, ids in zip(keys, chunks, strict=True):
        adding(matcher.add, key, ids)
    matcher.match(chunks[0], CONTEXT)  # sorts what still waits, so that sizes are final
    index = {
        "chunks": len(matcher),
        "fingerprints_per_chunk": round(matcher.num_fingerprints / len(matcher), 3),
        "bytes": matcher.num_bytes,
        "bytes_per_chunk": round(matcher.num_bytes / len(matcher), 1),
        "build_s": round(sum(adding.wall), 3),
    }

    def prompt_of(members: list[int]) -> npt.NDArray[Any]:
        parts: list[npt.NDArray[Any]] = []
        spare = max(0, config.prompt_tokens - len(members) * config.chunk_tokens)
        gap = spare // (len(members) + 1)
        for member in members:
            parts += [text(gap), chunks[member]]
        parts.append(text(spare - gap * len(members)))
        prompt: npt.NDArray[Any] = np.concatenate(parts)[: config.prompt_tokens]
        return prompt

    fitting = max(1, config.prompt_tokens // config.chunk_tokens)
    plain = [n for n in range(config.chunks) if n % 10] or [0]
    opened = list(range(0, config.chunks, 10))
    timers = {
        name: CallTimer()
        for name in ("match", "match_fresh", "match_boiler_plate", "match_one_token")
    }

    def expect(result: MatchResult, members: list[int]) -> None:
        """Prove that what was timed is the whole work: every chunk is found, in order."""
        found = [match.key for match in result.matches]
        if found != [keys[member] for member in members]:
            raise AssertionError(f"matched {len(found)} of {len(members)} chunks")

    progress(f"matching {config.repeats} prompts of {config.prompt_tokens} tokens, four kinds")
    one_token = np.full(config.prompt_tokens, 7, dtype=np.int64)
    repeated = as_token_ids(np.full(config.chunk_tokens, 7))
    matcher.add(ChunkKey.of(CONTEXT, repeated), repeated)
    matched_fraction = []
    for _ in range(config.repeats):
        count = min(int(rng.integers(6, 11)), fitting, len(plain))
        members = rng.choice(plain, count, replace=False).tolist()
        prompt = prompt_of(members)
        result = timers["match"](matcher.match, prompt, CONTEXT)
        expect(result, members)
        matched_fraction.append(sum(m.num_tokens for m in result.matches) / prompt.size)

        prompt = text(config.prompt_tokens)
        expect(timers["match_fresh"](matcher.match, prompt, CONTEXT), [])

        members = rng.choice(opened, min(8, fitting, len(opened)), replace=False).tolist()
        prompt = prompt_of(members)
        result = timers["match_boiler_plate"](matcher.match, prompt, CONTEXT)
        expect(result, members)

        timers["match_one_token"](matcher.match, one_token, CONTEXT)
    index["matched_token_fraction"] = round(float(np.mean(matched_fraction)), 4)

    progress("removing half of the chunks")
    removing = CallTimer()
    for key in keys[::2]:
        removing(matcher.remove, key)
    return {
        **{name: timer.report() for name, timer in timers.items()},
        "add": adding.report(),
        "remove": removing.report(),
        "index": index,
    }

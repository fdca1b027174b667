"""Benchmark of the chunk store: find, save, load and evict, without any engine.

``python -m rag_eval.benchmarks.store --json``

What is timed, each call by itself, wall clock and process CPU time:

``match``
    One prompt scanned against the whole index; prompts hold 6-10 stored chunks at random places
    with fresh text between them.
``match_fresh``
    The same with nothing stored in the prompt: what a request pays that reuses nothing.
``match_boiler_plate``, ``match_one_token``
    The bad cases: an opening that a tenth of the chunks share, and one token repeated.
``add``, ``remove``
    One chunk into and out of the index, with the merges and compactions that fall due; the largest
    value is the longest pause.
``save``, ``load``, ``evict``
    KV of one chunk in the shape of SmolLM2-135M unless told otherwise: gathered from a paged pool and
    committed; leased and copied to other slots of the pool; pushed out by the next commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from chunk_cache import (
    ChunkKey,
    ChunkKV,
    ChunkMatcher,
    KVContext,
    MatchResult,
    MemoryStore,
    as_token_ids,
    hash_token_ids,
)
from rag_eval.errors import EvalError

_VOCABULARY = 49_152  # of SmolLM2; what matters is only that random windows differ
_SYSTEM_TOKENS = 32
_SHORTEST = 64

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreBenchConfig:
    """Sizes of a run; the defaults are those of the stated goal (match under 5 ms)."""

    chunks: int = 100_000
    """Chunks in the index."""
    chunk_tokens: int = 400
    """Tokens a chunk."""
    prompt_tokens: int = 4_000
    """Tokens a prompt."""
    repeats: int = 300
    """Timed calls of every kind."""
    layers: int = 30
    """Layers of the KV records."""
    kv_heads: int = 3
    """KV heads of the KV records."""
    head_dim: int = 64
    """Head size of the KV records."""
    records: int = 16
    """KV records that fit in the store of the save/load/evict part."""
    seed: int = 0
    """Seed of all random text."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name == "seed" else 1
            if getattr(self, field.name) < least:
                raise EvalError(
                    f"--{field.name.replace('_', '-')} {getattr(self, field.name)}: "
                    f"allowed is >= {least}"
                )
        if not 2 * _SHORTEST <= self.chunk_tokens <= self.prompt_tokens:
            raise EvalError(
                f"--chunk-tokens {self.chunk_tokens}: allowed is {2 * _SHORTEST} to "
                f"--prompt-tokens {self.prompt_tokens}"
            )


class _Timer:
    """Collects wall and CPU seconds of single calls."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, call: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        cpu, wall = time.process_time(), time.perf_counter()
        result = call(*args, **kwargs)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result

    def report(self) -> dict[str, float | int]:
        wall, cpu = np.array(self.wall) * 1e3, np.array(self.cpu) * 1e3
        return {
            "wall_ms_p50": round(float(np.median(wall)), 4),
            "wall_ms_p99": round(float(np.percentile(wall, 99)), 4),
            "wall_ms_max": round(float(wall.max()), 4),
            "cpu_ms_p50": round(float(np.median(cpu)), 4),
            "cpu_ms_p99": round(float(np.percentile(cpu, 99)), 4),
            "cpu_ms_max": round(float(cpu.max()), 4),
            "n": len(self.wall),
        }


def run(
    config: StoreBenchConfig, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run the benchmark.

    Parameters
    ----------
    config
        Sizes.
    progress
        Called with a line of text now and then.

    Returns
    -------
    dict
        JSON-ready: ``match``, ``match_fresh``, ``match_boiler_plate``, ``match_one_token``, ``add``,
        ``remove``, ``save``, ``load``, ``evict`` (milliseconds), ``index`` (bytes), ``config``,
        ``versions``, ``threads``.
    """
    context = KVContext(
        model_fingerprint="benchmark",
        dtype="bfloat16",
        kv_dtype="bfloat16",
        rope="{}",
        prefix_digest=hash_token_ids(range(_SYSTEM_TOKENS)),
    )
    return {
        "benchmark": "store",
        **_time_matching(config, context, progress),
        **_time_records(config, context, progress),
        "config": dataclasses.asdict(config),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
    }


def _time_matching(
    config: StoreBenchConfig, context: KVContext, progress: Callable[[str], None]
) -> dict[str, Any]:
    rng = np.random.default_rng(config.seed)

    def text(length: int) -> npt.NDArray[np.int64]:
        return rng.integers(0, _VOCABULARY, length, dtype=np.int64)

    opening = text(min(96, config.chunk_tokens // 2))
    chunks: list[npt.NDArray[np.int32]] = []
    for number in range(config.chunks):
        drawn = text(config.chunk_tokens)
        if number % 10 == 0:
            drawn[: opening.size] = opening
        chunks.append(as_token_ids(drawn))
    keys = [ChunkKey.of(context, ids) for ids in chunks]

    matcher = ChunkMatcher()
    progress(f"indexing {config.chunks} chunks of {config.chunk_tokens} tokens")
    adding = _Timer()
    for key, ids in zip(keys, chunks, strict=True):
        adding(matcher.add, key, ids)
    matcher.match(chunks[0], context)  # sorts what still waits, so that sizes are final
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
        name: _Timer() for name in ("match", "match_fresh", "match_boiler_plate", "match_one_token")
    }

    def expect(result: MatchResult, members: list[int]) -> None:
        """Prove that what was timed is the whole work: every chunk is found, in order."""
        found = [match.key for match in result.matches]
        if found != [keys[member] for member in members]:
            raise AssertionError(f"matched {len(found)} of {len(members)} chunks")

    progress(f"matching {config.repeats} prompts of {config.prompt_tokens} tokens, four kinds")
    one_token = np.full(config.prompt_tokens, 7, dtype=np.int64)
    repeated = as_token_ids(np.full(config.chunk_tokens, 7))
    matcher.add(ChunkKey.of(context, repeated), repeated)
    matched_fraction = []
    for _ in range(config.repeats):
        count = min(int(rng.integers(6, 11)), fitting, len(plain))
        members = rng.choice(plain, count, replace=False).tolist()
        prompt = prompt_of(members)
        result = timers["match"](matcher.match, prompt, context)
        expect(result, members)
        matched_fraction.append(sum(m.num_tokens for m in result.matches) / prompt.size)

        prompt = text(config.prompt_tokens)
        expect(timers["match_fresh"](matcher.match, prompt, context), [])

        members = rng.choice(opened, min(8, fitting, len(opened)), replace=False).tolist()
        prompt = prompt_of(members)
        result = timers["match_boiler_plate"](matcher.match, prompt, context)
        expect(result, members)

        timers["match_one_token"](matcher.match, one_token, context)
    index["matched_token_fraction"] = round(float(np.mean(matched_fraction)), 4)

    progress("removing half of the chunks")
    removing = _Timer()
    for key in keys[::2]:
        removing(matcher.remove, key)
    return {
        **{name: timer.report() for name, timer in timers.items()},
        "add": adding.report(),
        "remove": removing.report(),
        "index": index,
    }


def _time_records(
    config: StoreBenchConfig, context: KVContext, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Time records between a token-slot pool ``[L, S, H, D]`` and the store, as an engine would."""
    rng = np.random.default_rng(config.seed)
    tokens = config.chunk_tokens
    slots = 4 * tokens
    shape = (config.layers, slots, config.kv_heads, config.head_dim)
    progress(f"saving and loading KV of {config.layers} layers, {config.records} records")
    generator = torch.Generator().manual_seed(config.seed)
    pool_k = torch.randn(shape, generator=generator).to(torch.bfloat16)
    pool_v = torch.randn(shape, generator=generator).to(torch.bfloat16)

    def record_of(ids: npt.NDArray[np.int32], at: torch.Tensor) -> ChunkKV:
        return ChunkKV(
            key=ChunkKey.of(context, ids),
            token_ids=ids,
            base_position=_SYSTEM_TOKENS,
            k=pool_k.index_select(1, at),
            v=pool_v.index_select(1, at),
        )

    def some_slots() -> torch.Tensor:
        return torch.from_numpy(rng.permutation(slots)[:tokens])

    def fresh_ids() -> npt.NDArray[np.int32]:
        return as_token_ids(rng.integers(0, _VOCABULARY, tokens))

    def load(key: ChunkKey, ids: npt.NDArray[np.int32], target: torch.Tensor) -> None:
        lease = store.acquire(key, ids)
        if lease is None:
            raise AssertionError("a record that is listed is gone")
        with lease:
            for layer in range(config.layers):
                part = lease.record.layer(layer)
                pool_k[layer].index_copy_(0, target, part.k)
                pool_v[layer].index_copy_(0, target, part.v)

    sample = record_of(fresh_ids(), some_slots())
    store = MemoryStore(config.records * sample.num_bytes)
    saving, sealing, loading, evicting = _Timer(), _Timer(), _Timer(), _Timer()
    known: dict[ChunkKey, npt.NDArray[np.int32]] = {}
    for _ in range(config.repeats):
        ids, at = fresh_ids(), some_slots()
        full = store.free_bytes < sample.num_bytes
        record = saving(record_of, ids, at)
        commit = evicting if full else _Timer()
        if not commit(store.put, record):
            raise AssertionError("the store refused a record that fits")
        saving.wall[-1] += commit.wall[-1]
        saving.cpu[-1] += commit.cpu[-1]
        known[record.key] = ids
        sealing(record.compute_checksum)

        ready = store.keys()
        wanted = ready[int(rng.integers(len(ready)))]
        target = some_slots()

        loading(load, wanted, known[wanted], target)
    store.check_integrity(expect_idle=True)
    report: dict[str, Any] = {
        "save": saving.report(),
        "load": loading.report(),
        "checksum": sealing.report(),
        "record_bytes": sample.num_bytes,
    }
    if evicting.wall:
        report["evict"] = evicting.report()
    return report


def main(argv: list[str] | None = None) -> int:
    """Command line of the benchmark; progress on stderr, one JSON object or a table on stdout."""
    parser = argparse.ArgumentParser(
        prog="python -m rag_eval.benchmarks.store", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for field in dataclasses.fields(StoreBenchConfig):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=int, default=field.default, metavar="N"
        )
    options = vars(parser.parse_args(argv))
    as_json = options.pop("json")
    try:
        config = StoreBenchConfig(**options)
    except EvalError as error:
        parser.error(str(error))
    report = run(config, lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps(report))
        return 0
    for name, value in report.items():
        if isinstance(value, dict) and "wall_ms_p50" in value:
            print(
                f"{name:20} median {value['wall_ms_p50']:9.4f} ms   p99 {value['wall_ms_p99']:9.4f}"
                f"   max {value['wall_ms_max']:9.4f}   CPU {value['cpu_ms_p50']:9.4f}"
                f" p99 {value['cpu_ms_p99']:9.4f}"
                f"   n={value['n']}"
            )
    print(f"index {report['index']}")
    print(f"one record {report['record_bytes']} bytes, torch threads {report['threads']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

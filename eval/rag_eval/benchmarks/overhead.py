"""What the pipeline costs on top of a bare ``engine.generate`` of the same token ids.

Run with ``python -m rag_eval.benchmarks.overhead``. Both sides answer the same questions on the same
engine, interleaved, everything in the radix tree already, so that what differs is ours: retrieval,
layout, streaming through the loop's thread, and summing up.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.command import Progress
from retrievers.types import Chunk, SearchHit


class FixedRetriever:
    """Returns the same chunks at once: the retriever's own cost has a benchmark of its own."""

    def __init__(self, num_chunks: int, chunk_chars: int) -> None:
        import pydoc_data.topics

        topics = sorted(pydoc_data.topics.topics.items())[:num_chunks]
        self._hits = [
            SearchHit(
                chunk=Chunk(
                    id=name,
                    document_id=name,
                    text=text[:chunk_chars],
                    title=name,
                    start=0,
                    end=min(chunk_chars, len(text)),
                    num_tokens=1,
                ),
                score=1.0 / (place + 1),
            )
            for place, (name, text) in enumerate(topics)
        ]

    def search(
        self, query: str, *, k: int, where: Mapping[str, object] | None = None
    ) -> list[SearchHit]:
        """Return the first `k` chunks."""
        return self._hits[:k]


@dataclass(frozen=True, kw_only=True, slots=True)
class OverheadConfig:
    """What is measured."""

    model: str = "smollm2-135m"
    """Name, folder or file of the model."""
    repeats: int = 30
    """Questions per side."""
    chunks: int = 6
    """Chunks in each prompt."""
    new_tokens: int = 8
    """Length of each answer, tokens."""

    def __post_init__(self) -> None:
        require_at_least(self, 4, "repeats")
        require_at_least(self, 1, "chunks", "new_tokens")


def run(config: OverheadConfig, progress: Progress) -> dict[str, Any]:
    """Measure both sides.

    Returns
    -------
    dict
        Medians in milliseconds, the paired difference, and what was run.
    """
    from rag_pipeline import EngineBackend, RagPipeline, SamplingOptions, resolve_llm

    folder, num_chunks = resolve_llm(config.model).path, config.chunks
    repeats, new_tokens = config.repeats, config.new_tokens
    progress("starting the engine")
    backend = EngineBackend.start(folder, max_total_tokens=16384)
    try:
        pipeline = RagPipeline(FixedRetriever(num_chunks, 800), backend, folder, top_k=num_chunks)
        sampling = SamplingOptions(max_new_tokens=new_tokens)
        params = sampling.to_params()
        measured: list[tuple[tuple[float, float], tuple[float, float], float]] = []
        prompt_tokens = 0
        with keep_measured(lambda: len(measured) > 1) as end:
            for number in range(-3, repeats):  # three to warm up
                question = f"What is said about point {number % 7}?"
                hits = pipeline.retriever.search(question, k=num_chunks)
                pipeline.ask(question, sampling=sampling)  # now the prompt is in the radix tree
                started = time.perf_counter()
                layout = pipeline.builder.build(question, hits, max_new_tokens=new_tokens)
                laid_out = time.perf_counter() - started
                ids = list(layout.input_ids)

                def run_bare(ids: list[int] = ids) -> tuple[float, float]:
                    began, cpu = time.perf_counter(), time.process_time()
                    backend.engine.generate(input_ids=ids, sampling_params=params)
                    return time.perf_counter() - began, time.process_time() - cpu

                def run_whole(question: str = question) -> tuple[float, float]:
                    began, cpu = time.perf_counter(), time.process_time()
                    pipeline.ask(question, sampling=sampling)
                    return time.perf_counter() - began, time.process_time() - cpu

                # Whoever comes second is a little warmer; take turns.
                if number % 2:
                    a, b = run_bare(), run_whole()
                else:
                    b, a = run_whole(), run_bare()
                if number >= 0:
                    measured.append((a, b, laid_out))
                    prompt_tokens = len(ids)
    finally:
        backend.close()
    bare, whole, alone = zip(*measured, strict=True)
    difference = [(b[0] - a[0]) * 1e3 for a, b in zip(bare, whole, strict=True)]
    # The model runs in other processes, so this process's CPU time is the pipeline's own and the
    # engine front's; unlike wall time it barely feels what else the machine does.
    cpu_difference = [(b[1] - a[1]) * 1e3 for a, b in zip(bare, whole, strict=True)]
    return {
        "n": len(measured),
        "bare_ms_p50": statistics.median(wall for wall, _ in bare) * 1e3,
        "pipeline_ms_p50": statistics.median(wall for wall, _ in whole) * 1e3,
        "overhead_ms_p50": statistics.median(difference),
        "overhead_ms_quartiles": statistics.quantiles(difference, n=4),
        "overhead_cpu_ms_p50": statistics.median(cpu_difference),
        "overhead_cpu_ms_quartiles": statistics.quantiles(cpu_difference, n=4),
        "layout_ms_p50": statistics.median(alone) * 1e3,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load_average": os.getloadavg()[0],
        "versions": versions_of("sglang", "torch"),
    } | end.report()


def table(report: dict[str, Any]) -> str:
    """The report as text, one line per quantity."""
    return "\n".join(f"{name:26} {value}" for name, value in report.items())


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.overhead", __doc__)
    return run_benchmark(parser, OverheadConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())

"""What the pipeline costs on top of a bare ``engine.generate`` of the same token ids.

Run with ``python -m rag_eval.benchmarks.overhead``. Both sides answer the same questions on the same
engine, interleaved, everything in the radix tree already, so that what differs is ours: retrieval,
layout, streaming through the loop's thread, and summing up.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

from rag_eval.arguments import OneLineParser
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


def measure(*, model: str, repeats: int, num_chunks: int, new_tokens: int) -> dict[str, Any]:
    """Measure both sides.

    Parameters
    ----------
    model : str
        Name, folder or file of the model.
    repeats : int
        Questions a side.
    num_chunks : int
        Chunks in each prompt.
    new_tokens : int
        Length of each answer, tokens.

    Returns
    -------
    dict
        Medians in milliseconds, the paired difference, and what was run.
    """
    from rag_pipeline import EngineBackend, RagPipeline, SamplingOptions, resolve_llm

    folder = resolve_llm(model).path
    backend = EngineBackend.start(folder, max_total_tokens=16384)
    try:
        pipeline = RagPipeline(FixedRetriever(num_chunks, 800), backend, folder, top_k=num_chunks)
        sampling = SamplingOptions(max_new_tokens=new_tokens)
        params = sampling.to_params()
        bare, whole, alone = [], [], []
        prompt_tokens = 0
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
                bare.append(a)
                whole.append(b)
                alone.append(laid_out)
                prompt_tokens = len(ids)
    finally:
        backend.close()
    difference = [(b[0] - a[0]) * 1e3 for a, b in zip(bare, whole, strict=True)]
    # The model runs in other processes, so this process's CPU time is the pipeline's own and the
    # engine front's; unlike wall time it barely feels what else the machine does.
    cpu_difference = [(b[1] - a[1]) * 1e3 for a, b in zip(bare, whole, strict=True)]
    from importlib.metadata import version

    return {
        "n": repeats,
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
        "versions": {name: version(name) for name in ("sglang", "torch")},
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print one JSON object."""
    parser = OneLineParser(
        prog="python -m rag_eval.benchmarks.overhead", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=8)
    options = parser.parse_args(arguments)
    if options.repeats < 4:
        parser.error("--repeats must be at least 4")
    result = measure(
        model=options.model,
        repeats=options.repeats,
        num_chunks=options.chunks,
        new_tokens=options.new_tokens,
    )
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

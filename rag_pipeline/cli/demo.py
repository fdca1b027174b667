"""``rag-pipeline demo``: a real corpus, real questions, real SGLang; nothing to prepare."""

from __future__ import annotations

import dataclasses
from statistics import median
from typing import TYPE_CHECKING, Any

from rag_pipeline.cli.ask import AskOptions, ask_shown, open_pipeline, print_answer
from rag_pipeline.cli.console import emit_json, say, step, write
from rag_pipeline.cli.ingest import IngestOptions, ingest_paths, report_lines
from rag_pipeline.config import indexes_dir

if TYPE_CHECKING:
    from rag_pipeline import RagPipeline
    from retrievers.types import SearchHit

CORPUS = "pydoc-topics"
"""The Python language reference by topic, which every CPython carries (``pydoc_data.topics``)."""

QUESTIONS = (
    "What does the with statement do?",
    "What does the assert statement do?",
    "What is a lambda expression?",
)
"""What a model of 135M parameters can read out of a text. It fails at comparisons ("break and continue") and at what
does not happen ("an exception that no clause handles"), with every wording, order and number of chunks tried."""

FUSED_POLICIES = ("query:0.15", "query:0.05", "reuse")
COMPARED_CHUNKS = 12
"""As many chunks as a RAG request that is worth reusing holds: about 2,000 tokens with the question."""
ORDERS = 3
"""Orders of the same chunks, each with another one first; the median of their times is shown."""


def run_demo(*, model: str, json_output: bool) -> None:
    """Ingest, ask three questions, print the answers; a second run finds the index ready."""
    index = indexes_dir() / CORPUS
    say(f"Corpus: {CORPUS} (the Python language reference by topic). Index: {index}")
    report, loaded = ingest_paths(IngestOptions(paths=(CORPUS,), index=index, model=model))
    for line in report_lines(report, loaded):
        say(line)
    options = AskOptions(question=QUESTIONS[0], index=index, model=model)
    answers = []
    with open_pipeline(options) as pipeline:
        for question in QUESTIONS:
            answer = ask_shown(
                pipeline,
                dataclasses.replace(options, question=question),
                json_output=json_output,
            )
            answers.append({"question": question, **answer.to_json()})
            if not json_output:
                write(f"\n=== {question}\n\n")
                print_answer(answer)
        fusion = compare_policies(pipeline, QUESTIONS[0])
        threads = engine_threads(pipeline)
    if json_output:
        emit_json({"index": str(index), "answers": answers, "fusion": fusion, "threads": threads})
        return
    print_comparison(fusion, threads)
    say(
        f"\nAsk your own: rag-pipeline ask 'What does the pass statement do?' --index {index} --model {model}"
    )


class _Fixed:
    """A retriever that returns the same chunks, in the same order, for any query."""

    def __init__(self, hits: list[SearchHit]) -> None:
        self._hits = hits

    def search(self, query: str, *, k: int, where: Any = None) -> list[SearchHit]:
        """Return the first `k`; query and filter are not looked at."""
        del query, where
        return self._hits[:k]


def compare_policies(pipeline: RagPipeline, question: str) -> list[dict[str, Any]]:
    """Ask about chunks seen before, in other orders: full prefill against fusion.

    Returns
    -------
    list of dict
        ``policy``, ``ttft_s`` (median), ``usage`` and ``answer`` (of the last order) of each way, the
        exact one first.
    """
    from rag_pipeline import RagPipeline, SamplingOptions
    from rag_pipeline.protocol import PREFIX_POLICY

    hits = pipeline.retriever.search(question, k=COMPARED_CHUNKS)
    chunks = [hit.chunk for hit in hits]
    with step(f"Computing the KV of {len(chunks)} chunks once", total=len(chunks)) as advance:
        pipeline.warm(chunks, progress=lambda done: advance(done=done, total=len(chunks)))
    times: dict[str, list[float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    with step(f"Asking with them in {ORDERS} orders"):
        for order in range(2, ORDERS + 2):
            turned = [*hits[order:], *hits[:order]][::-1]
            again = RagPipeline(_Fixed(turned), pipeline.backend, pipeline.builder, top_k=len(hits))
            # The exact way comes last: it publishes the prompt, which would then be an exact prefix.
            for policy in (*FUSED_POLICIES, PREFIX_POLICY):
                asked = again.ask(
                    question, policy=policy, sampling=SamplingOptions(max_new_tokens=8)
                )
                times.setdefault(policy, []).append(asked.timing.ttft_s)
                rows[policy] = asked.to_json()
    return [
        {
            "policy": policy,
            "ttft_s": median(times[policy]),
            "usage": rows[policy]["usage"],
            "answer": rows[policy]["answer"],
        }
        for policy in (PREFIX_POLICY, *FUSED_POLICIES)
    ]


def engine_threads(pipeline: RagPipeline) -> int | None:
    """Threads that the engine computes with; None where it is not one of this process."""
    from rag_pipeline import EngineBackend
    from rag_pipeline.sglang_plugin import activation_of

    backend = pipeline.backend
    if not isinstance(backend, EngineBackend):
        return None
    return activation_of(backend.engine).threads


def print_comparison(rows: list[dict[str, Any]], threads: int | None) -> None:
    """Print time to first token and where the prompt's tokens came from, one line per policy."""
    exact = rows[0]
    tokens = exact["usage"]["prompt_tokens"]
    write(
        f"\n=== {tokens} prompt tokens, {COMPARED_CHUNKS} chunks seen before in another order, "
        f"{threads} thread{'' if threads == 1 else 's'}, median of {ORDERS}\n\n"
    )
    write(f"{'policy':10} {'first token':>12} {'speed-up':>9}   prompt tokens\n")
    for row in rows:
        usage = row["usage"]
        write(
            f"{row['policy']:10} {row['ttft_s']:10.2f} s "
            f"{exact['ttft_s'] / row['ttft_s']:8.1f}x   "
            f"exact prefix {usage['exact_prefix_tokens']}, reused {usage['reused_tokens']}, "
            f"recomputed {usage['recomputed_tokens']}, fresh {usage['fresh_tokens']}\n"
        )

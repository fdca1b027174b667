"""``rag-pipeline demo``: a real corpus, real questions, real SGLang; nothing to prepare."""

from __future__ import annotations

import dataclasses
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
    "What is the difference between break and continue?",
    "What happens when an exception is not handled by any except clause?",
)
FUSED_POLICIES = ("query", "reuse")


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
        fusion = compare_policies(pipeline, QUESTIONS[0], options.top_k)
    if json_output:
        emit_json({"index": str(index), "answers": answers, "fusion": fusion})
        return
    print_comparison(fusion)
    say(f"\nAsk your own: rag-pipeline ask 'What is a decorator?' --index {index} --model {model}")


class _Reordered:
    """A retriever whose chunks come in the opposite order: what prefix caching cannot serve."""

    def __init__(self, hits: list[SearchHit]) -> None:
        self._hits = hits[::-1]

    def search(self, query: str, *, k: int, where: Any = None) -> list[SearchHit]:
        """Return the same chunks for any query."""
        del query, where
        return self._hits[:k]


def compare_policies(pipeline: RagPipeline, question: str, top_k: int) -> list[dict[str, Any]]:
    """Ask once more about chunks seen before, in another order: full prefill against fusion.

    Returns
    -------
    list of dict
        ``policy``, ``ttft_s``, ``usage`` and ``answer`` of each way, the exact one first.
    """
    from rag_pipeline import RagPipeline, SamplingOptions

    hits = pipeline.retriever.search(question, k=top_k)
    chunks = [hit.chunk for hit in hits]
    with step("Computing the chunks' KV once", total=len(chunks)) as advance:
        pipeline.warm(chunks, progress=lambda done: advance(done=done, total=len(chunks)))
    again = RagPipeline(_Reordered(hits), pipeline.backend, pipeline.builder, top_k=top_k)
    rows: list[dict[str, Any]] = []
    # The exact way comes last: it publishes the prompt, which would then be an exact prefix.
    for policy in (*FUSED_POLICIES, "prefix"):
        answer = again.ask(question, policy=policy, sampling=SamplingOptions(max_new_tokens=32))
        body = answer.to_json()
        rows.append(
            {
                "policy": policy,
                "ttft_s": body["timing"]["ttft_s"],
                "usage": body["usage"],
                "answer": body["answer"],
            }
        )
    return rows[::-1]


def print_comparison(rows: list[dict[str, Any]]) -> None:
    """Print time to first token and where the prompt's tokens came from, a line a policy."""
    exact = rows[0]["ttft_s"]
    write("\n=== The same chunks in another order, one run each\n\n")
    write(f"{'policy':8} {'first token':>12} {'speed-up':>9}   prompt tokens\n")
    for row in rows:
        usage = row["usage"]
        write(
            f"{row['policy']:8} {row['ttft_s']:10.2f} s {exact / row['ttft_s']:8.1f}x   "
            f"exact prefix {usage['exact_prefix_tokens']}, reused {usage['reused_tokens']}, "
            f"recomputed {usage['recomputed_tokens']}, fresh {usage['fresh_tokens']}\n"
        )

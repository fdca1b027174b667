"""Several questions over the same documents: every program of the batch reuses their KV.

python examples/frontend_multi_document_qa.py http://127.0.0.1:30000 INDEX_DIR "Question?" ...
"""

from __future__ import annotations

import sys

import sglang as sgl

from rag_pipeline.frontend import RagEndpoint, chunks, usage
from rag_pipeline.prompts.builder import DEFAULT_CONTEXT_HEADER, DEFAULT_SYSTEM
from retrievers import Index


@sgl.function
def answer(s, documents, question):
    """Answer one question."""
    s += sgl.system(DEFAULT_SYSTEM)
    s += sgl.user(
        DEFAULT_CONTEXT_HEADER
        + chunks(documents)
        + f"Question: {question}\nAnswer in one sentence."
    )
    s += sgl.assistant(sgl.gen("answer", max_tokens=48))


def main(url: str, index_dir: str, *questions: str) -> None:
    """Answer every question over the documents of all."""
    backend = RagEndpoint(url, build_missing=True)
    retriever = Index.open(index_dir).retriever("bm25")
    # The same documents in every program, in the order that its question ranks them.
    found = {hit.chunk.id for question in questions for hit in retriever.search(question, k=2)}
    batch = []
    for question in questions:
        ranked = [hit for hit in retriever.search(question, k=50) if hit.chunk.id in found]
        batch.append({"documents": ranked, "question": question})
    for question, state in zip(
        questions, answer.run_batch(batch, backend=backend, temperature=0), strict=True
    ):
        used = usage(state, "answer")
        print(f"Q: {question}\nA: {state['answer'].strip()}")
        print(f"   {used.describe()}")


if __name__ == "__main__":
    main(*sys.argv[1:])

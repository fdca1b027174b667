"""A conversation that retrieves for every turn; a chunk that comes back is not computed again.

python examples/frontend_multi_turn.py http://127.0.0.1:30000 INDEX_DIR "Question?" "Next?" ...
"""

from __future__ import annotations

import sys

import sglang as sgl

from rag_pipeline.frontend import RagEndpoint, chunks, usage
from rag_pipeline.prompts.builder import DEFAULT_CONTEXT_HEADER, DEFAULT_SYSTEM
from retrievers import Index


@sgl.function
def conversation(s, retriever, questions):
    """Answer every question with its own documents."""
    s += sgl.system(DEFAULT_SYSTEM)
    for turn, question in enumerate(questions):
        documents = retriever.search(question, k=2)
        s += sgl.user(
            DEFAULT_CONTEXT_HEADER
            + chunks(documents)
            + f"Question: {question}\nAnswer in one sentence."
        )
        s += sgl.assistant(sgl.gen(f"answer{turn}", max_tokens=40))


def main(url: str, index_dir: str, *questions: str) -> None:
    """Hold the conversation and print what each turn cost."""
    backend = RagEndpoint(url, build_missing=True)
    retriever = Index.open(index_dir).retriever("bm25")
    state = conversation.run(
        retriever=retriever, questions=questions, backend=backend, temperature=0
    )
    for turn, question in enumerate(questions):
        used = usage(state, f"answer{turn}")
        print(f"Q: {question}\nA: {state[f'answer{turn}'].strip()}")
        print(f"   {used.describe()}")


if __name__ == "__main__":
    main(*sys.argv[1:])

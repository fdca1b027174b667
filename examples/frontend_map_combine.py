"""Ask each document by itself, in parallel, then all of them together with what was found.

python examples/frontend_map_combine.py http://127.0.0.1:30000 INDEX_DIR "Question?"
"""

from __future__ import annotations

import sys

import sglang as sgl

from rag_pipeline.frontend import RagEndpoint, chunks, usage
from rag_pipeline.prompts.builder import DEFAULT_CONTEXT_HEADER, DEFAULT_SYSTEM
from retrievers import Index


@sgl.function
def map_combine(s, documents, question):
    """Ask each document in a branch, then all together."""
    s += sgl.system(DEFAULT_SYSTEM)
    branches = s.fork(len(documents))
    for branch, document in zip(branches, documents, strict=True):
        branch += sgl.user(
            DEFAULT_CONTEXT_HEADER + chunks([document]) + f"In one sentence: {question}"
        )
        branch += sgl.assistant(sgl.gen("note", max_tokens=32))
    notes = "".join(f"- {branch['note'].strip()}\n" for branch in branches)
    s["map"] = [usage(branch, "note") for branch in branches]
    # The same chunks again, now side by side: their KV is moved, not computed.
    s += sgl.user(
        DEFAULT_CONTEXT_HEADER
        + chunks(documents)
        + f"Notes:\n{notes}Question: {question}\nAnswer in one sentence."
    )
    s += sgl.assistant(sgl.gen("answer", max_tokens=48))


def main(url: str, index_dir: str, question: str) -> None:
    """Print what each step cost, and the answer."""
    backend = RagEndpoint(url, build_missing=True)
    documents = Index.open(index_dir).retriever("bm25").search(question, k=3)
    state = map_combine.run(documents=documents, question=question, backend=backend, temperature=0)
    steps = [*(("map", used) for used in state["map"]), ("combine", usage(state, "answer"))]
    for step, used in steps:
        print(f"{step}: {used.describe()}")
    print(f"A: {state['answer'].strip()}")


if __name__ == "__main__":
    main(*sys.argv[1:])

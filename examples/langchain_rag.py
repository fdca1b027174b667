"""A LangChain chain over an index of ``rag-pipeline ingest``: streamed answer, sources, reuse.

python examples/langchain_rag.py http://127.0.0.1:30000/v1 INDEX_DIR "Question?"
"""

from __future__ import annotations

import sys

from rag_pipeline.langchain import ChatSGLangRag, RagRetriever, RagRunnable


def main(base_url: str, index_dir: str, question: str) -> None:
    """Stream one answer with its sources."""
    rag = RagRunnable(
        retriever=RagRetriever.from_index(index_dir, k=3),
        llm=ChatSGLangRag(base_url=base_url, max_tokens=48),
    )
    for piece in rag.stream(question):
        for document in piece.get("documents", ()):
            print(f"source: {document.metadata['title']} ({document.metadata['score']:.3f})")
        print(piece.get("answer", ""), end="", flush=True)
        if "rag" in piece:
            print(f"\n{piece['rag']['usage']}")


if __name__ == "__main__":
    main(*sys.argv[1:])

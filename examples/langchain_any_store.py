"""Any LangChain vector store in place of ours; put Milvus, Qdrant or pgvector where memory is.

python examples/langchain_any_store.py http://127.0.0.1:30000/v1 "Question?" FILE ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from rag_pipeline.langchain import ChatSGLangRag, RagEmbeddings, RagRunnable


def main(base_url: str, question: str, *files: str) -> None:
    """Answer two questions over the files."""
    store = InMemoryVectorStore(RagEmbeddings.load("all-minilm-l6-v2"))
    for name in files:
        paragraphs = Path(name).read_text("utf-8").split("\n\n")
        texts = [text.strip() for text in paragraphs if text.strip()]
        store.add_documents(
            [Document(page_content=text, metadata={"title": name}) for text in texts]
        )
    rag = RagRunnable(
        retriever=store.as_retriever(search_kwargs={"k": 3}),
        llm=ChatSGLangRag(base_url=base_url, max_tokens=48, policy="query", ratio=0.15),
    )
    for found in rag.batch([question, f"{question} Why?"], {"max_concurrency": 1}):
        print(found["answer"].strip())
        print(found["rag"]["usage"])


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Documents as text in a message, for requests that are not laid out in token ids here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.langchain.documents import document_title
from rag_pipeline.langchain.layout import block_document, is_document


def written(documents: Iterable[Document], template: str, header: str) -> str:
    """Write documents one behind the other; empty where there are none."""
    texts = [template.format(title=document_title(d), text=d.page_content) for d in documents]
    return f"{header}{''.join(texts)}" if texts else ""


def with_documents(
    messages: Sequence[BaseMessage], documents: Sequence[Document], template: str, header: str
) -> list[BaseMessage]:
    """Copies of messages whose documents are text.

    Parameters
    ----------
    messages : sequence of BaseMessage
        Documents that stand in them as content blocks are written where they stand.
    documents : sequence of Document
        Written before the text of the last human message.
    template, header : str
        How a document is written, and what stands in front of the first.

    Raises
    ------
    RagPipelineError
        Documents without a human message to stand in.
    """
    told = [_as_text(message, template) for message in messages]
    if not documents:
        return told
    place = next((i for i in reversed(range(len(told))) if isinstance(told[i], HumanMessage)), None)
    if place is None:
        raise RagPipelineError("documents need a human message to stand in; add one")
    text = written(documents, template, header) + str(told[place].text)
    told[place] = told[place].model_copy(update={"content": text})
    return told


def _as_text(message: BaseMessage, template: str) -> BaseMessage:
    content = message.content
    if isinstance(content, str) or not any(map(is_document, content)):
        return message
    blocks = [
        {"type": "text", "text": written([block_document(block)], template, "")}
        if isinstance(block, dict) and is_document(block)
        else block
        for block in content
    ]
    return message.model_copy(update={"content": blocks})

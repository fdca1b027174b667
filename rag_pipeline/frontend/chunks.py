"""What a program writes: chunks, trusted control tokens, and the question what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sglang.lang.ir import SglArgument, SglConstantText

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.frontend.marked_text import MarkedText
from rag_pipeline.frontend.turns import TRUNCATED_KEY
from rag_pipeline.prompts.builder import DEFAULT_CHUNK_TEMPLATE
from rag_pipeline.protocol import Usage, usage_from_meta
from rag_pipeline.types import NOTHING_CUT, Truncated


def chunks(documents: Iterable[Any], *, template: str = DEFAULT_CHUNK_TEMPLATE) -> Any:
    """Documents for a program's state, each tokenised alone so that its KV can be reused.

    Put what is the same for all questions before the first chunk, and the question behind the
    chunks: KV of a chunk is kept for the prompt's part before the first chunk.

    Parameters
    ----------
    documents : iterable of object
        Search hits or chunks of this project, LangChain documents, mappings with ``text`` (and
        ``title``, ``id``), or plain texts.
    template : str
        How a chunk is written; fields ``{title}`` and ``{text}``. The default is the one of
        ``rag-pipeline ask``.

    Returns
    -------
    SglExpr
        For ``s += chunks(docs)`` or ``sgl.user(header + chunks(docs) + question)``.

    Raises
    ------
    RagPipelineError
        Something that holds no text.
    """
    if isinstance(documents, SglArgument):
        # SGLang traces programs to find a common prefix, and stops at this error.
        raise TypeError("chunks are not known while a program is traced")
    if isinstance(documents, str | Mapping):
        raise RagPipelineError(
            f"chunks() was given one {type(documents).__name__}; give a list of documents"
        )
    text = MarkedText()
    for document in documents:
        title, body, name = _read(document)
        written = template.format(title=title, text=body)
        text = text + MarkedText.of(written, "chunk", name)
    return SglConstantText(text)


def control(text: str) -> Any:
    """Text of the program's author in which special tokens are control tokens.

    Everywhere else in a program they are ordinary characters, so that no document and no user
    can smuggle one in. The role helpers (``sgl.user`` and so on) need none of this.
    """
    return SglConstantText(MarkedText.of(text, "template"))


def usage(state: Any, name: str) -> Usage:
    """What happened to the prompt of a generation.

    Parameters
    ----------
    state : object
        A finished program, or the state inside it.
    name : str
        Name that was given to ``sgl.gen``.

    Returns
    -------
    Usage
        Tokens by kind.

    Raises
    ------
    RagPipelineError
        No generation has that name, or it failed.
    """
    meta = _meta_of(state, name)
    return usage_from_meta(meta, prompt_tokens=int(meta["prompt_tokens"]))


def truncated(state: Any, name: str) -> Truncated:
    """Oldest turns of a chat that were not sent with a generation, because the context had no room for them.

    Parameters
    ----------
    state, name : object, str
        As of :func:`usage`.

    Returns
    -------
    Truncated
        Turns, and about their tokens; zeros where all was sent.

    Raises
    ------
    RagPipelineError
        No generation has that name, or it failed.
    """
    told: Truncated = _meta_of(state, name).get(TRUNCATED_KEY, NOTHING_CUT)
    return told


def _meta_of(state: Any, name: str) -> Mapping[str, Any]:
    meta = state.get_meta_info(name)
    if not isinstance(meta, Mapping):
        raise RagPipelineError(
            f"there is no finished generation {name!r} in this program ({state.error() or 'not run'})"
        )
    return meta


def _read(document: Any) -> tuple[str, str, str | None]:
    """Title, text and name of whatever stands for a document."""
    if isinstance(document, str):
        return "", str.__str__(document), None
    chunk = getattr(document, "chunk", document)
    if isinstance(chunk, Mapping):
        title, text, name = chunk.get("title"), chunk.get("text"), chunk.get("id")
    elif hasattr(chunk, "page_content"):
        title, text = chunk.metadata.get("title"), chunk.page_content
        name = getattr(chunk, "id", None)
    else:
        title, text = getattr(chunk, "title", None), getattr(chunk, "text", None)
        name = getattr(chunk, "id", None)
    if not isinstance(text, str):
        raise RagPipelineError(
            f"a {type(document).__name__} holds no text; give search hits, chunks, LangChain "
            "documents, mappings with 'text', or texts"
        )
    return title if isinstance(title, str) else "", text, name if isinstance(name, str) else None

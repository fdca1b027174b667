"""The passages inside one record of a question-answering data set, by the record's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from retrievers.metadata import storable_metadata
from retrievers.types import Scalar


class Passage(NamedTuple):
    """A passage before it becomes a document; `key` is its own identifier where it has one."""

    format: str
    title: str
    text: str
    key: str | None = None
    metadata: Mapping[str, Scalar] = {}


SHAPES = (
    "{question, answers, ctxs: [{title, text}]}, HotpotQA or 2WikiMultihopQA {context: [[title, "
    "[sentence]]]}, SQuAD {data: [{paragraphs: [{context}]}]}, MuSiQue {paragraphs: "
    "[{paragraph_text}]}, corpus {id, contents} or {id?, text, title?, metadata?}"
)
"""For error messages: what :func:`passages_of` understands."""


def passages_of(record: object) -> Iterator[Passage] | None:
    """Find the passages of one record.

    Returns
    -------
    iterator of Passage or None
        ``None`` when the shape is not one of :data:`SHAPES`.

    Raises
    ------
    TypeError, KeyError, ValueError, AttributeError
        While iterating, when the shape is right and something inside it is not.
    """
    if not isinstance(record, dict):
        return None
    for fits, read in _SHAPES:
        if fits(record):
            return read(record)
    return None


def _ctxs(record: dict[str, Any]) -> Iterator[Passage]:
    for context in record["ctxs"]:
        yield Passage("ctxs", _text(context.get("title") or ""), _text(context["text"]))


def _hotpot(record: dict[str, Any]) -> Iterator[Passage]:
    context = record["context"]
    # The hub's variant stores two parallel columns instead of pairs.
    if isinstance(context, dict):
        context = zip(context["title"], context["sentences"], strict=True)
    for title, sentences in context:
        yield Passage("hotpotqa", _text(title), _join(sentences))


def _squad(record: dict[str, Any]) -> Iterator[Passage]:
    for article in record["data"]:
        title = _text(article.get("title") or "").replace("_", " ")
        for paragraph in article["paragraphs"]:
            yield Passage("squad", title, _text(paragraph["context"]))


def _musique(record: dict[str, Any]) -> Iterator[Passage]:
    for paragraph in record["paragraphs"]:
        title = _text(paragraph.get("title") or "")
        yield Passage("musique", title, _text(paragraph["paragraph_text"]))


def _generic(record: dict[str, Any]) -> Iterator[Passage]:
    title = record.get("title") or ""
    title = str(title) if isinstance(title, int | float) else _text(title)
    metadata = storable_metadata(record.get("metadata") or {})
    if "text" in record:
        text, name = _text(record["text"]), "jsonl"
    else:
        text, name = _text(record["contents"]), "corpus"
        if not title:
            # FlashRAG's convention: the title is the first line.
            first, _, rest = text.partition("\n")
            if rest.strip():
                title, text = first.strip().strip('"'), rest
    key = record.get("id", record.get("_id"))
    yield Passage(name, title, text, None if key is None else str(key), metadata)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {type(value).__name__}")
    return value


def _join(sentences: list[str]) -> str:
    """Join sentences; some data sets keep the blank before each, others drop it."""
    text = ""
    for sentence in sentences:
        blank = " " if text and not text[-1].isspace() and not sentence[:1].isspace() else ""
        text += blank + _text(sentence)
    return text


_Shape = tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], Iterator[Passage]]]
_SHAPES: tuple[_Shape, ...] = (
    (lambda r: isinstance(r.get("ctxs"), list), _ctxs),
    (lambda r: isinstance(r.get("context"), list | dict), _hotpot),
    (lambda r: isinstance(r.get("data"), list), _squad),
    (lambda r: isinstance(r.get("paragraphs"), list), _musique),
    (lambda r: "text" in r or "contents" in r, _generic),
)

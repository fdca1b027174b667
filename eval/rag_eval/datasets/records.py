"""Parsers of the public QA formats, one function per format: a record in, examples out.

Each parser raises ``KeyError``, ``TypeError`` or ``ValueError`` on a record that is not of its
format; :mod:`rag_eval.datasets.files` turns that into one line that names the record.

Sources of the formats: HotpotQA (Yang et al. 2018), 2WikiMultihopQA (Ho et al. 2020), SQuAD v1.1
(Rajpurkar et al. 2016), MuSiQue (Trivedi et al. 2022), FlashRAG (Jin et al. 2024), and the
``ctxs`` lists of FiD (Izacard and Grave 2021) that CacheBlend's inputs use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rag_eval.datasets.core import Example, Passage

Record = Mapping[str, Any]
Parser = Callable[[Record, str], Iterator[Example]]


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{field!r} is {type(value).__name__}, expected text")
    return value


def _answers(value: object, field: str) -> tuple[str, ...]:
    """One answer or a list of them; numbers are written out, empty ones dropped."""
    items = value if isinstance(value, list | tuple) else [value]
    texts = [str(item) for item in items if isinstance(item, str | int | float)]
    kept = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not kept:
        raise ValueError(f"{field!r} holds no answer")
    return kept


def _question(record: Record) -> str:
    question = _text(record["question"], "question").strip()
    if not question:
        raise ValueError("'question' is empty")
    return question


def _joined(sentences: list[str]) -> str:
    """Sentences as one text; HotpotQA's carry their leading space, 2WikiMultihopQA's do not."""
    glue = "" if any(sentence[:1] == " " for sentence in sentences[1:]) else " "
    return glue.join(sentences)


def parse_ctxs(record: Record, fallback_id: str) -> Iterator[Example]:
    """``{question, answers, ctxs[{title, text}]}`` with an optional ``isgold`` per context."""
    passages = []
    for context in record["ctxs"]:
        gold = context.get("isgold")
        passages.append(
            Passage(
                title=_text(context.get("title") or "", "ctxs.title"),
                text=_text(context["text"], "ctxs.text"),
                is_gold=None if gold is None else bool(gold),
            )
        )
    # FiD-style sets carry one answer under `answer` and aliases under `answers`.
    answers = record["answers"] if "answers" in record else record["answer"]
    yield Example(
        id=str(record.get("id", record.get("_id", fallback_id))),
        question=_question(record),
        answers=_answers(answers, "answers"),
        passages=tuple(passages),
    )


def parse_hotpot(record: Record, fallback_id: str) -> Iterator[Example]:
    """HotpotQA and 2WikiMultihopQA: ``context`` is a list of ``[title, [sentences]]``."""
    gold = {_text(fact[0], "supporting_facts") for fact in record.get("supporting_facts", [])}
    passages = tuple(
        Passage(
            title=_text(title, "context.title"),
            text=_joined(sentences),
            is_gold=(title in gold) if gold else None,
        )
        for title, sentences in record["context"]
    )
    yield Example(
        id=str(record.get("_id", record.get("id", fallback_id))),
        question=_question(record),
        answers=_answers(record["answer"], "answer"),
        passages=passages,
    )


def parse_musique(record: Record, fallback_id: str) -> Iterator[Example]:
    """MuSiQue: ``paragraphs`` with ``is_supporting``; unanswerable records are left out."""
    if not record.get("answerable", True):
        return
    passages = tuple(
        Passage(
            title=_text(paragraph.get("title") or "", "paragraphs.title"),
            text=_text(paragraph["paragraph_text"], "paragraphs.paragraph_text"),
            is_gold=bool(paragraph["is_supporting"]) if "is_supporting" in paragraph else None,
        )
        for paragraph in record["paragraphs"]
    )
    aliases = record.get("answer_aliases") or []
    yield Example(
        id=str(record.get("id", fallback_id)),
        question=_question(record),
        answers=_answers([record["answer"], *aliases], "answer"),
        passages=passages,
    )


def parse_flashrag(record: Record, fallback_id: str) -> Iterator[Example]:
    """FlashRAG: ``golden_answers``; contexts, where there are any, lie in ``metadata``."""
    metadata = record.get("metadata") or {}
    context = metadata.get("context") or {}
    titles = list(context.get("title", []))
    bodies = list(context.get("content", context.get("sentences", [])))
    if len(titles) != len(bodies):
        raise ValueError(f"'metadata.context' has {len(titles)} titles for {len(bodies)} texts")
    gold = set((metadata.get("supporting_facts") or {}).get("title", []))
    passages = tuple(
        Passage(
            title=_text(title, "metadata.context.title"),
            text=body if isinstance(body, str) else " ".join(s.strip() for s in body),
            is_gold=(title in gold) if gold else None,
        )
        for title, body in zip(titles, bodies, strict=True)
    )
    yield Example(
        id=str(record.get("id", fallback_id)),
        question=_question(record),
        answers=_answers(record["golden_answers"], "golden_answers"),
        passages=passages,
    )


def parse_squad_article(record: Record, fallback_id: str) -> Iterator[Example]:
    """SQuAD v1.1: one article; its paragraphs are the contexts of each of its questions.

    So the same paragraphs recur from question to question, as they do behind a retriever.
    """
    paragraphs = record["paragraphs"]
    texts = [_text(paragraph["context"], "paragraphs.context") for paragraph in paragraphs]
    title = str(record.get("title", "")).replace("_", " ")
    for number, paragraph in enumerate(paragraphs):
        for position, item in enumerate(paragraph["qas"]):
            passages = tuple(
                Passage(title=title, text=text, is_gold=index == number)
                for index, text in enumerate(texts)
            )
            yield Example(
                id=str(item.get("id", f"{fallback_id}.{number}.{position}")),
                question=_question(item),
                answers=_answers([answer["text"] for answer in item["answers"]], "answers"),
                passages=passages,
            )


def parser_of(record: Record) -> tuple[str, Parser] | None:
    """Name and parser of the format a record is in, told by the fields that only it has."""
    if "ctxs" in record:
        return "ctxs list", parse_ctxs
    if "golden_answers" in record:
        return "FlashRAG", parse_flashrag
    if "paragraphs" in record and "question" in record:
        return "MuSiQue", parse_musique
    if "paragraphs" in record:
        return "SQuAD v1.1", parse_squad_article
    if "context" in record and "answer" in record:
        return "HotpotQA / 2WikiMultihopQA", parse_hotpot
    return None

"""A RAG prompt as token ids with the place of every part: ``[system][chunk]...[chunk][question]``.

Every chunk is tokenised alone and has no number and no separator, so the same chunk gives the same
ids wherever it stands; that is what lets its KV be kept and used again. The system part is the
same for every question, so that all chunks can be computed behind one shared prefix.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.models.context_length import model_context_length
from rag_pipeline.models.decoding import repetition_penalty_of
from rag_pipeline.prompts.chat_template import template_parts
from rag_pipeline.prompts.document_order import RETRIEVED, check_document_order, ordered
from rag_pipeline.prompts.history import Turn, question_part, write_turn
from rag_pipeline.prompts.token_cache import TokenCache
from rag_pipeline.prompts.tokenizer import ModelTokenizer
from rag_pipeline.prompts.truncation import (
    CUT_SHARE,
    Truncation,
    check_truncation,
    estimated_tokens,
    first_that_fits,
    truncated,
)
from rag_pipeline.types import PromptLayout, Span
from retrievers.types import Chunk, SearchHit

# Of five wordings tried on four questions about Python's language reference, the only one after
# which the 135M-parameter default model ends each answer by itself instead of repeating it.
DEFAULT_SYSTEM = "You are a helpful assistant. Use the given text to answer the question."
DEFAULT_CONTEXT_HEADER = "Text:\n\n"
DEFAULT_CHUNK_TEMPLATE = "{title}\n{text}\n\n"
DEFAULT_QUESTION_TEMPLATE = "Question: {question}\nAnswer in one sentence."

_MOST_CHARACTERS = 32
"""Characters of a question per token of the context, several times what ordinary text has."""

ECHO_CHARACTERS = 80
"""Length of a question by which its repetition is told."""


class PromptBuilder:
    """Lays out prompts for one model.

    Parameters
    ----------
    tokenizer : ModelTokenizer, Path or str
        The model's tokenizer, or the model's folder.
    system_prompt : str
        System message; put at the head of the user message when the model's chat template has no
        system role.
    context_header : str
        Text of the user message before the first chunk.
    chunk_template : str
        How a chunk is written; fields ``{title}`` and ``{text}``.
    question_template : str
        End of the user message; field ``{question}``.
    context_length : int, optional
        Most tokens of prompt and answer together; None reads it from the model's folder.
    chunk_cache_size : int
        Number of chunks whose token ids are kept.
    cut_share : float
        Part of the context that is cut at once from a conversation that does not fit, above 0 to 1.
    document_order : str
        Where documents stand: ``retrieved``, ``best_last``, ``both_ends``, or a static attention method such as
        ``power``, which puts the best where the question reads them (:mod:`.document_order`).

    Raises
    ------
    RagPipelineError
        A template without its field, an unknown field, a share that cannot be cut, or an unknown order.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer | Path | str,
        *,
        system_prompt: str = DEFAULT_SYSTEM,
        context_header: str = DEFAULT_CONTEXT_HEADER,
        chunk_template: str = DEFAULT_CHUNK_TEMPLATE,
        question_template: str = DEFAULT_QUESTION_TEMPLATE,
        context_length: int | None = None,
        chunk_cache_size: int = 4096,
        cut_share: float = CUT_SHARE,
        document_order: str = RETRIEVED,
    ) -> None:
        check_truncation("auto", cut_share)
        check_document_order(document_order)
        _check_template("chunk_template", chunk_template, needed="text", allowed=("title", "text"))
        _check_template(
            "question_template", question_template, needed="question", allowed=("question",)
        )
        self.repetition_penalty = 1.0
        if not isinstance(tokenizer, ModelTokenizer):
            folder = Path(tokenizer)
            tokenizer = ModelTokenizer.load(folder)
            self.repetition_penalty = repetition_penalty_of(folder)
            if context_length is None:
                context_length = model_context_length(folder)
        if context_length is None:
            raise RagPipelineError("context_length is missing; give it with a tokenizer object")
        if context_length < 1:
            raise RagPipelineError(f"context_length is {context_length}; it must be at least 1")
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.system_prompt = system_prompt.strip()
        self.context_header = context_header
        self._chunk_template = chunk_template
        self._question_template = question_template
        self._cut_share = cut_share
        self._document_order = document_order
        self._texts = TokenCache(tokenizer, chunk_cache_size)
        self._head, self._tail = self._template_parts(self.system_prompt, context_header)
        self._system_ids = tuple(tokenizer.encode_runs(self._head))

    def echo(self, question: str) -> str:
        """Text at which an answer ends: the question over again; see :func:`echo_of`."""
        return echo_of(self._question_template.format(question=question))

    @property
    def system_ids(self) -> tuple[int, ...]:
        """Token ids of the system part, the prefix that all prompts share."""
        return self._system_ids

    @property
    def closing(self) -> tuple[tuple[str, bool], ...]:
        """Runs ``(text, is_template)`` behind the question: what opens the answer."""
        return tuple(self._tail)

    def forget_texts(self) -> None:
        """Keep no text of a chunk: some were deleted, and nothing says which."""
        self._texts.clear()

    def chunk_text(self, chunk: Chunk) -> str:
        """Return the text of `chunk` as it stands in a prompt."""
        return self._chunk_template.format(title=chunk.title, text=chunk.text)

    def chunk_ids(self, chunk: Chunk) -> tuple[int, ...]:
        """Token ids of `chunk` as it stands in a prompt, at any place of it.

        Parameters
        ----------
        chunk : Chunk
            Only its title and text matter.

        Returns
        -------
        tuple of int
            Ids of the rendered chunk tokenised alone, special-token strings as ordinary text.
        """
        return self._texts.ids(self.chunk_text(chunk))

    def build(
        self,
        question: str,
        hits: Sequence[SearchHit],
        *,
        max_new_tokens: int,
        context_length: int | None = None,
        history: Sequence[Turn] = (),
        rules: str = "",
        truncation: Truncation = "auto",
        document_order: str | None = None,
    ) -> PromptLayout:
        """Lay out one prompt.

        Parameters
        ----------
        question : str
            The user's question; outer white space is removed.
        hits : sequence of SearchHit
            Retrieved chunks, in the order that ``retrieved`` lets them stand in.
        max_new_tokens : int
            Room to leave for the answer, tokens.
        context_length : int, optional
            Overrides the builder's limit, for a backend with a smaller one.
        history : sequence
            Earlier turns of the conversation (:func:`~.history.turns_of`), the oldest first; they stand behind the
            chunks, before the question.
        rules : str
            Stands in front of both, and is never cut.
        truncation : str
            ``auto`` cuts the oldest turns of a history that does not fit (:mod:`.truncation`); ``disabled`` refuses it.
        document_order : str, optional
            Overrides the builder's.

        Returns
        -------
        PromptLayout
            Chunks are taken best first, each that still fits; the others are in `dropped`. Turns are cut for chunks
            until those have half of the context, and further only for the question. What was cut is in `truncated`.

        Raises
        ------
        RagPipelineError
            Empty question, one that does not fit even without chunks, or an unknown order.
        """
        order = self._document_order if document_order is None else document_order
        check_document_order(order)
        question = question.strip()
        if not question:
            raise RagPipelineError("the question is empty; give at least one word")
        check_truncation(truncation, self._cut_share)
        limit = min(self.context_length, context_length or self.context_length)
        alone = len(question) + len(rules)
        if truncation == "disabled":
            alone += sum(len(message.text) for turn in history for message in turn)
        if alone > _MOST_CHARACTERS * limit:
            # Before it is tokenised, which takes the longer the longer it is.
            raise RagPipelineError(
                f"the question does not fit: {alone} characters, of at most {_MOST_CHARACTERS} "
                f"per token of the context of {limit}; shorten it"
            )
        note = self.tokenizer.date_note()
        asked = self._question_template.format(question=question)
        lengths = [estimated_tokens(write_turn(turn), self.tokenizer.encode) for turn in history]
        for_chunks = 0
        if history and truncation == "auto":
            wanted = sum(len(self.chunk_ids(hit.chunk)) for hit in hits)
            for_chunks = min(wanted, limit // 2)

        def lay_out(cut: int) -> tuple[str, list[int], int]:
            text = note + question_part(asked, history[cut:], rules)
            ids = self.tokenizer.encode_runs([(text, False), *self._tail])
            return text, ids, limit - max_new_tokens - len(self._system_ids) - len(ids)

        (question_text, question_ids, room), cut = first_that_fits(
            lengths,
            lay_out,
            lambda made: made[2] >= for_chunks,
            context_length=limit,
            truncation=truncation,
            share=self._cut_share,
        )
        if room < 0:
            raise RagPipelineError(
                f"the question does not fit: {len(question_ids)} tokens with "
                f"{len(self._system_ids)} of the system prompt and {max_new_tokens} for the answer "
                f"exceed the context of {limit}; shorten it or let the answer have fewer tokens"
            )
        kept, dropped = self.choose(hits, room, order, behind=len(question_ids))
        pieces = [self._system_ids, *(self.chunk_ids(hit.chunk) for hit in kept), question_ids]
        edges = list(accumulate((len(piece) for piece in pieces), initial=0))
        spans = [Span(start=a, end=b) for a, b in pairwise(edges)]
        return PromptLayout(
            input_ids=tuple(token for piece in pieces for token in piece),
            system_span=spans[0],
            chunk_spans=tuple(
                Span(start=span.start, end=span.end, chunk_id=hit.chunk.id)
                for span, hit in zip(spans[1:-1], kept, strict=True)
            ),
            question_span=spans[-1],
            text="".join(
                [
                    *(text for text, _ in self._head),
                    *(self.chunk_text(hit.chunk) for hit in kept),
                    question_text,
                    *(text for text, _ in self._tail),
                ]
            ),
            chunks=tuple(kept),
            dropped=tuple(dropped),
            truncated=truncated(lengths, cut),
        )

    def asked(self, question: str) -> str:
        """Write a question as it stands at the end of a prompt."""
        return self._question_template.format(question=question)

    def choose(
        self, hits: Sequence[SearchHit], room: int, order: str | None = None, *, behind: int
    ) -> tuple[list[SearchHit], list[SearchHit]]:
        """Choose the chunks of a prompt and put them in order.

        Parameters
        ----------
        hits : sequence of SearchHit
            Retrieved chunks.
        room : int
            Tokens that there is place for.
        order : str, optional
            Overrides the builder's.
        behind : int
            Tokens behind the chunks.

        Returns
        -------
        tuple
            Those that stand in the prompt, in its order, and those that do not fit, best first.
        """
        kept, dropped = self._fit(hits, room)
        places = ordered(
            self._document_order if order is None else order,
            [hit.score for hit in kept],
            [len(self.chunk_ids(hit.chunk)) for hit in kept],
            before=len(self._system_ids),
            behind=behind,
        )
        return [kept[place] for place in places], dropped

    def _fit(self, hits: Sequence[SearchHit], room: int) -> tuple[list[SearchHit], list[SearchHit]]:
        lengths = [len(self.chunk_ids(hit.chunk)) for hit in hits]
        best_first = sorted(range(len(hits)), key=lambda i: -hits[i].score)
        chosen = {best_first[i] for i in fitting([lengths[i] for i in best_first], room)}
        kept = [hit for i, hit in enumerate(hits) if i in chosen]
        return kept, [hits[i] for i in best_first if i not in chosen]

    def _template_parts(
        self, system_prompt: str, header: str
    ) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
        """Find the runs ``(text, is_template)`` before the first chunk and behind the question."""
        if system_prompt:
            rendered = template_parts(self.tokenizer, ["system", "user"])
            if rendered is not None:
                before, between, after = rendered
                head = [(before, True), (system_prompt, False), (between, True), (header, False)]
                return head, [(after, True)]
            # No system role: the instruction leads the user message.
            header = f"{system_prompt}\n\n{header}"
        rendered = template_parts(self.tokenizer, ["user"])
        if rendered is not None:
            before, after = rendered
            return [(before, True), (header, False)], [(after, True)]
        bos = self.tokenizer.bos_token or ""  # a base model: plain text, with a cue to answer
        return [(bos, True), (header, False)], [("\nAnswer:", False)]


def echo_of(question_text: str) -> str:
    """What a model writes that begins the prompt's question again instead of ending its answer.

    Small models do; generation stops there. Only this very question is meant, so an answer may hold
    other questions.
    """
    return "\n" + question_text.strip().splitlines()[0][:ECHO_CHARACTERS]


def fitting(lengths: Sequence[int], room: int) -> list[int]:
    """Choose what goes into a prompt: best first, each that still fits.

    One that is too long by itself keeps none of the others out.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each, best first.
    room : int
        Tokens that there is place for.

    Returns
    -------
    list of int
        Places in `lengths`, ascending.
    """
    chosen = []
    for place, length in enumerate(lengths):
        if length <= room:
            chosen.append(place)
            room -= length
    return chosen


def _check_template(name: str, template: str, *, needed: str, allowed: tuple[str, ...]) -> None:
    try:
        fields = {
            field for _, field, _, _ in string.Formatter().parse(template) if field is not None
        }
    except ValueError as error:
        raise RagPipelineError(f"{name} is not a format string ({error}): {template!r}") from error
    unknown = fields - set(allowed)
    if unknown or needed not in fields:
        raise RagPipelineError(
            f"{name} {template!r} must use {{{needed}}} and may use "
            f"{', '.join('{' + field + '}' for field in allowed)} only"
        )

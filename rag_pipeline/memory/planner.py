"""From the messages of a conversation to the prompts that answer from its memory; a pure function of their content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory.config import MemoryConfig
from rag_pipeline.memory.conversation import Conversations, TextVectors, View
from rag_pipeline.memory.layout import Question, plain_candidate, window_candidate
from rag_pipeline.memory.methods import create_method
from rag_pipeline.memory.plan import Chain, MemoryPlan, Range, Utterance
from rag_pipeline.memory.rendering import Renderer, checked
from retrievers import storable_text

if TYPE_CHECKING:
    from rag_pipeline.memory.clustering import Vectors
    from rag_pipeline.prompts.tokenizer import ModelTokenizer

BLOCKS_EARLY = 2
"""How many blocks before a history outgrows the prompt its records are begun."""


class Planner:
    """Plans prompts and records for conversations.

    Everything follows from the content of the history: the same messages give the same ids after a restart, and
    the ids of a prefix stay when the history grows, as long as its clustering does. Safe for several threads. What is
    kept between calls is bounded and only saves time.

    Parameters
    ----------
    config : MemoryConfig
        Method, budget, episodes.
    tokenizer : ModelTokenizer
        The model's.
    encode : callable
        Texts to unit vectors, float32 ``(len(texts), dim)``, such as ``Embedder.encode_documents``; asked only by
        methods that have episodes or retrieve.
    context_length : int
        Most tokens of prompt and answer together.

    Raises
    ------
    RagPipelineError
        A method that is not known, or a budget that does not fit the context, in one line.
    """

    def __init__(
        self,
        config: MemoryConfig,
        tokenizer: ModelTokenizer,
        encode: Callable[[list[str]], Vectors],
        *,
        context_length: int,
    ) -> None:
        self.method = create_method(config)
        self.config = self.method.config
        self.context_length = context_length
        self.method.check_room(context_length)
        self._renderer = Renderer(tokenizer)
        self._vectors = TextVectors(encode)
        self._conversations = Conversations(self._renderer, self.config, self._vectors)

    def plan(
        self,
        system: str,
        history: Sequence[Utterance],
        question: str,
        *,
        max_new_tokens: int = 128,
        query: str = "",
    ) -> MemoryPlan:
        """Plan one answer.

        Parameters
        ----------
        system : str
            System prompt; may be empty.
        history : sequence of Utterance
            All finished messages, the oldest first.
        question : str
            The new user message; its tokens are never cut.
        max_new_tokens : int
            Room for the answer.
        query : str
            What the question is compared with the conversation by, where documents stand in it; itself where empty.

        Raises
        ------
        RagPipelineError
            A question that does not fit, an empty one, or a role that is not known.
        """
        view = self._view(system, history)
        asked = self._question(view, question, max_new_tokens, query)
        fallback = window_candidate(view, asked)
        if self._is_verbatim(view, asked):
            candidates = [plain_candidate(view, asked, [(0, view.num_tokens)])]
        else:
            made = self.method.candidates(view, asked)
            candidates = [one for one in made if one.prefix_len + one.told <= asked.room]
        return MemoryPlan(
            candidates=tuple(candidates) or (fallback,),
            fallback=fallback,
            ahead=self._ahead(view, asked),
            history_tokens=view.num_tokens,
            prefix_len=len(view.prefix_ids),
        )

    def ahead(self, system: str, history: Sequence[Utterance]) -> tuple[Chain, ...]:
        """Chains that are worth building behind an answer, in order."""
        return self._ahead(self._view(system, history), None)

    def utterance_ranges(self, system: str, history: Sequence[Utterance]) -> list[Range]:
        """True positions of each message, for evaluation; an empty range for an empty message."""
        kept = [bool(said.text.strip()) for said in history]
        view = self._view(system, history)
        prefix = len(view.prefix_ids)
        ranges, end, message = [], prefix, 0
        for there in kept:
            start = end
            if there:
                end = prefix + view.message_range(message)[1]
                message += 1
            ranges.append((start, end))
        return ranges

    def episodes(self, system: str, history: Sequence[Utterance]) -> list[int]:
        """Episode of each whole segment in the newest version, for evaluation; for methods that have episodes."""
        view = self._view(system, history)
        return view.labels(view.versions()[0])

    def _view(self, system: str, history: Sequence[Utterance]) -> View:
        told = [checked(said) for said in history]
        told = [said for said in told if said.text]
        return self._conversations.view(storable_text(system), told)

    def _question(self, view: View, question: str, max_new_tokens: int, query: str) -> Question:
        text = storable_text(question).strip()
        if not text:
            raise RagPipelineError("the question is empty; give at least one word")
        ids = self._renderer.question_ids(view.last_role, text)
        room = self.context_length - max_new_tokens - len(ids)
        if room < len(view.prefix_ids):
            raise RagPipelineError(
                f"the question does not fit: {len(ids)} tokens with {len(view.prefix_ids)} of the system prompt and "
                f"{max_new_tokens} for the answer exceed the context of {self.context_length}; shorten it or let the "
                "answer have fewer tokens"
            )
        return Question(
            view=view,
            text=storable_text(query).strip() or text,
            ids=ids,
            room=room,
            encode=lambda asked: self._vectors.of([asked])[0],
        )

    def _is_verbatim(self, view: View, question: Question) -> bool:
        tokens = view.num_tokens
        fits = len(view.prefix_ids) + tokens <= question.room
        return fits and tokens <= self.config.verbatim_limit and self.method.keeps_verbatim

    def _ahead(self, view: View, question: Question | None) -> tuple[Chain, ...]:
        early = BLOCKS_EARLY * self.config.block_tokens
        if view.num_tokens + early <= self.config.verbatim_limit:
            return ()
        room = self.context_length - len(view.prefix_ids)
        return tuple(
            chain
            for chain in self.method.ahead(view, question)
            if chain[-1].peak_tokens - len(view.prefix_ids) < room
        )

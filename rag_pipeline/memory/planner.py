"""From the messages of a conversation to the prompts that answer from its memory; a pure function of their content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rag_pipeline.memory.config import MemoryConfig
from rag_pipeline.memory.plan import MemoryPlan, Range, Utterance
from rag_pipeline.prompts.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Encode = Callable[[list[str]], NDArray[np.float32]]
    """Texts to vectors of unit length, ``(len(texts), dim)``, such as ``Embedder.encode_documents``."""


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
        Texts to unit vectors, float32 ``(len(texts), dim)``; only asked by methods that have episodes or retrieve.
    context_length : int
        Most tokens of prompt and answer together.

    Raises
    ------
    RagPipelineError
        A budget and a block that do not fit the context, in one line.
    """

    def __init__(
        self,
        config: MemoryConfig,
        tokenizer: ModelTokenizer,
        encode: Encode,
        *,
        context_length: int,
    ) -> None:
        raise NotImplementedError

    def plan(
        self,
        system: str,
        history: Sequence[Utterance],
        question: str,
        *,
        max_new_tokens: int = 128,
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

        Raises
        ------
        RagPipelineError
            A question that does not fit, an empty one, or a role that is not known.
        """
        raise NotImplementedError

    def ahead(self, system: str, history: Sequence[Utterance]) -> MemoryPlan:
        """Plan what to build behind an answer, without a question: `candidates` are empty."""
        raise NotImplementedError

    def utterance_ranges(self, system: str, history: Sequence[Utterance]) -> list[Range]:
        """True positions of each message's text, for evaluation."""
        raise NotImplementedError

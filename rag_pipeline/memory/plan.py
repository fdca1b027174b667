"""The nouns of a conversation's memory: what was said, what one answer may be made from, what is built for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rag_pipeline.protocol import (
    LEFT_ALONE,
    FusionRequest,
    GenerationRequest,
    MemoryFields,
    MemoryLoad,
    MemoryStore,
    SamplingOptions,
)

Range = tuple[int, int]
"""Half-open range of true positions: tokens counted from the prompt's start as if nothing had been evicted."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """A finished message of a conversation.

    Parameters
    ----------
    role : str
        ``user`` or ``assistant``.
    text : str
        What was said. People with names who talk to each other have the name in the text.
    """

    role: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One request that makes one record: the record before, a block of the history, and a probe.

    Parameters
    ----------
    id : str
        Memory id of the record that it makes.
    previous : str
        Memory id of the record that it loads; empty for none.
    prefix_ids, slot_ids, block_ids, probe_ids : tuple of int
        Token ids of the parts of its prompt, in order.
    budget : int
        Slots per layer and KV head.
    rule : str
        Retention rule with its parameters.
    block : int
        Which block of the history it adds, from 0.
    episode : int
        Of which episode, for reports.
    own, own_share : tuple of (int, int), float
        As of :class:`~rag_pipeline.protocol.MemoryStore`.
    """

    id: str
    previous: str
    prefix_ids: tuple[int, ...]
    slot_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    probe_ids: tuple[int, ...]
    budget: int
    rule: str
    block: int
    episode: int
    own: tuple[Range, ...] = ()
    own_share: float = 1.0

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Token ids of its prompt."""
        return (*self.prefix_ids, *self.slot_ids, *self.block_ids, *self.probe_ids)

    @property
    def forward_tokens(self) -> int:
        """Tokens that it computes when the record before and the prefix are there."""
        return len(self.block_ids) + len(self.probe_ids)

    @property
    def peak_tokens(self) -> int:
        """Tokens that its prompt holds in the pool."""
        return len(self.prefix_ids) + len(self.slot_ids) + self.forward_tokens

    def request(self, spans: Sequence[Range] = ()) -> GenerationRequest:
        """Write the request.

        Parameters
        ----------
        spans : sequence of (int, int)
            True positions whose share that stays the report tells.
        """
        start = len(self.prefix_ids)
        slots = start + len(self.slot_ids)
        memory = MemoryFields(
            load=(MemoryLoad(start=start, end=slots, id=self.previous),) if self.previous else (),
            store=MemoryStore(
                end=slots + len(self.block_ids),
                budget=self.budget,
                rule=self.rule,
                own=self.own,
                own_share=self.own_share,
            ),
            spans=tuple(spans),
        )
        return GenerationRequest(
            input_ids=self.input_ids,
            fusion=FusionRequest(prefix_len=start, memory=memory),
            sampling=SamplingOptions(max_new_tokens=1),
        )


class Chain(Sequence[Step]):
    """The steps that make one record, the oldest block first; a step is laid out when it is asked for.

    Attributes
    ----------
    ids : sequence of str
        Memory id of each step, without laying it out.
    episode : int
        Which episode the record is of, for reports.
    """

    ids: Sequence[str]
    episode: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to lay out the prompt of an answer: ``[prefix][slots][repeated messages][tail][question]``.

    Parameters
    ----------
    input_ids : tuple of int
        Token ids of the prompt.
    fusion : FusionRequest
        What it asks of the engine.
    needs : tuple of str
        Memory ids that must be there; none for a prompt without a memory. What is missing is prefilled as a sliding
        window.
    chains : tuple of Chain
        The steps that make each of `needs`, in the same order.
    verbatim : tuple of (int, int)
        True positions of the history's tokens that stand in the prompt as they are, whatever a record holds.
    prefix_len, slots, repeated_len, tail_len : int
        Tokens of the parts; the rest is the question.
    episodes : tuple of int
        Which episodes it answers from, best first.
    """

    input_ids: tuple[int, ...]
    fusion: FusionRequest = LEFT_ALONE
    needs: tuple[str, ...] = ()
    chains: tuple[Chain, ...] = ()
    verbatim: tuple[Range, ...] = ()
    prefix_len: int = 0
    slots: int = 0
    repeated_len: int = 0
    tail_len: int = 0
    episodes: tuple[int, ...] = ()

    @property
    def told(self) -> int:
        """Tokens of the history in the prompt."""
        return self.slots + self.repeated_len + self.tail_len

    def request(
        self, sampling: SamplingOptions | None = None, spans: Sequence[Range] = ()
    ) -> GenerationRequest:
        """Write the request.

        Parameters
        ----------
        sampling : SamplingOptions, optional
            How the answer is decoded.
        spans : sequence of (int, int)
            True positions whose kept share the report tells; only a prompt with a memory reports one.
        """
        fusion = self.fusion
        if spans and fusion.memory is not None:
            fusion = replace(fusion, memory=replace(fusion.memory, spans=tuple(spans)))
        return GenerationRequest(
            input_ids=self.input_ids, fusion=fusion, sampling=sampling or SamplingOptions()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """How one question of one conversation may be answered, and what is worth building.

    Parameters
    ----------
    candidates : tuple of Candidate
        Best first: the newest records, then older ones. Never empty. Each fits the context.
    fallback : Candidate
        The prompt without any record: a sliding window of the same budget, or the whole history where that fits.
    ahead : tuple of Chain
        What is worth building now, in order; each chain up to its last step.
    history_tokens : int
        Tokens of the whole history.
    prefix_len : int
        Tokens in front of the history.
    """

    candidates: tuple[Candidate, ...]
    fallback: Candidate
    ahead: tuple[Chain, ...] = ()
    history_tokens: int = 0
    prefix_len: int = 0

    @property
    def build_tokens(self) -> int:
        """Tokens that building all of `ahead` from nothing computes; lays out every step."""
        steps = {step.id: step.forward_tokens for chain in self.ahead for step in chain}
        return sum(steps.values())

"""A memory as the doors of this project use it: when a conversation needs it, when an answer waits for it, what is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rag_pipeline.memory import Utterance
from rag_pipeline.protocol import FusionRequest, SamplingOptions, fusion_report, memory_report

if TYPE_CHECKING:
    from concurrent.futures import Future

    from rag_pipeline.generation import Backend
    from rag_pipeline.memory import Chain, Memory, MemoryConfig, MemoryPlan, Prepared
    from rag_pipeline.prompts.history import HistoryMessage
    from rag_pipeline.prompts.tokenizer import ModelTokenizer

EMBEDDER = "all-minilm-l6-v2"
"""Embeds what is said, where no index has an embedder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What was said.

    Parameters
    ----------
    system : str
        Instructions.
    history : tuple of Utterance
        Earlier messages, the oldest first.
    question : str
        The new message, as it stands in the prompt.
    asked : str
        What of it the user has said, where documents stand in it too: later requests bring no more. All of it where empty.
    """

    system: str
    history: tuple[Utterance, ...]
    question: str
    asked: str = ""


@dataclass(frozen=True, kw_only=True)
class RememberedTurn:
    """A turn whose prompt was laid out with a memory."""

    memory: Memory
    prepared: Prepared
    asked: Asked

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.prepared.candidate.input_ids

    @property
    def fusion(self) -> FusionRequest:
        """What the prompt asks of the engine."""
        return self.prepared.candidate.fusion

    def facts(self, meta_info: Mapping[str, Any]) -> dict[str, Any]:
        """What a client is told, with the engine's report on the answer."""
        config, candidate = self.memory.planner.config, self.prepared.candidate
        told = memory_report(fusion_report(meta_info))
        return {
            "method": config.method,
            "budget_tokens": config.budget_tokens,
            "history_tokens": self.prepared.plan.history_tokens,
            "slots": candidate.slots,
            "repeated_tokens": candidate.repeated_len,
            "tail_tokens": candidate.tail_len,
            "loaded": told.get("loaded", 0),
            "missed": told.get("missed", 0),
        }

    def ended(self, answer: str | None) -> None:
        """Build ahead, with the answer where it is known."""
        asked = self.asked
        said = [*asked.history, Utterance("user", asked.asked or asked.question)]
        if answer:
            said.append(Utterance("assistant", answer))
        self.memory.after(asked.system, said)


def utterances(turns: Iterable[Iterable[HistoryMessage]]) -> tuple[Utterance, ...]:
    """Messages of turns as a memory takes them."""
    return tuple(Utterance(said.role, said.text) for turn in turns for said in turn)


@dataclass(frozen=True, kw_only=True)
class PlannedTurn:
    """A turn that is answered from a memory, before its prompt is chosen.

    Parameters
    ----------
    memory : Memory
        Of the conversation.
    asked : Asked
        What was said.
    plan : MemoryPlan
        Of the turn.
    missing : sequence of Chain
        What the answer must wait for.
    """

    memory: Memory
    asked: Asked
    plan: MemoryPlan
    missing: Sequence[Chain]

    def build(self) -> list[Future[bool]]:
        """Begin what is missing; the answer waits for these."""
        return [self.memory.builder.build(chain, urgent=True) for chain in self.missing]


def prepare_turn(planned: PlannedTurn, sampling: SamplingOptions) -> RememberedTurn:
    """Choose the prompt of an answer, of what is there now; `sampling` as in the plan."""
    prepared = planned.memory.prepare_planned(planned.plan, sampling)
    return RememberedTurn(memory=planned.memory, prepared=prepared, asked=planned.asked)


def plan_turn(memory: Memory, asked: Asked, sampling: SamplingOptions) -> PlannedTurn | None:
    """Plan an answer; None for a conversation that is short enough as it is.

    What the next turns of such a one may need is built behind it.

    Raises
    ------
    RagPipelineError
        A question that does not fit.
    """
    config = memory.planner.config
    plan = memory.planner.plan(
        asked.system,
        asked.history,
        asked.question,
        max_new_tokens=sampling.max_new_tokens,
        query=asked.asked,
    )
    if plan.history_tokens <= config.most_told_tokens:
        memory.after(asked.system, asked.history)
        return None
    return PlannedTurn(memory=memory, asked=asked, plan=plan, missing=awaited(memory, plan))


def open_memory(config: MemoryConfig, backend: Backend, tokenizer: ModelTokenizer) -> Memory:
    """Make a memory of the conversations with a backend's model.

    Parameters
    ----------
    config : MemoryConfig
        Method and budget.
    backend : Backend
        Builds the records; not closed by the memory.
    tokenizer : ModelTokenizer
        Of its model.

    Raises
    ------
    RagPipelineError
        A budget that the backend's context has no room for.
    """
    from rag_pipeline.memory import Memory, Planner
    from rag_pipeline.models import resolve_embedder
    from retrievers import Embedder

    embedder = Embedder(resolve_embedder(EMBEDDER).path, name=EMBEDDER)
    planner = Planner(
        config, tokenizer, embedder.encode_documents, context_length=backend.context_length
    )
    # A server by URL is not asked: that is its administrator's. What a step makes again is the same record.
    return Memory(planner, backend, existing=getattr(backend, "memories", None))


def awaited(memory: Memory, plan: MemoryPlan) -> Sequence[Chain]:
    """Chains that an answer must wait for: those of a conversation of which no record is there.

    Such a conversation began before it had a memory. A sliding window would forget all that is before it, without a word;
    to compute it once takes about as long as to prefill it.
    """
    needs = [one.needs for one in plan.candidates]
    records = memory.builder.records
    if not needs[0] or any(all(map(records.is_known, one)) for one in needs):
        return ()
    there = records.find([name for one in needs for name in one])
    if any(there.issuperset(one) for one in needs):
        return ()
    return min(plan.candidates, key=lambda one: len(one.needs)).chains

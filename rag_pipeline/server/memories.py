"""Memories of the conversations that a server answers: one per tenant and configuration, built behind the answers."""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rag_pipeline.memory import (
    Memory,
    MemoryConfig,
    Planner,
    Prepared,
    Utterance,
    parse_memory,
)
from rag_pipeline.protocol import (
    FusionRequest,
    GenerationPiece,
    GenerationRequest,
    SamplingOptions,
)
from rag_pipeline.protocol.cache_order import CacheOrder
from rag_pipeline.server.turns import Turns
from rag_pipeline.sglang_plugin.http.access import namespaced
from rag_pipeline.sglang_plugin.http.chat_memory import AskedChat

if TYPE_CHECKING:
    from rag_pipeline.prompts.tokenizer import ModelTokenizer
    from rag_pipeline.server.embedders import EmbedderPool
    from rag_pipeline.server.tenants import Tenant
    from rag_pipeline.sglang_plugin.http.served_engine import ServedEngine

MOST_MEMORIES = 64
"""Tenants and configurations with a memory of their own; the one that was not used for longest is planned anew."""
_ANSWER_TOKENS = 512
"""Room for an answer whose length nobody says; at most a quarter of the context."""
_TAIL_BLOCKS = 2
"""Blocks behind a memory that stand in the prompt as they are: a history that is not longer needs none."""
_EXISTING_S = 20.0

logger = logging.getLogger(__name__)


class MemoryBackend:
    """The server's engine for the builds of one namespace, from threads beside the event loop.

    Parameters
    ----------
    engine : ServedEngine
        Behind the server.
    loop : asyncio.AbstractEventLoop
        The server's.
    salt : str
        Namespace that records are kept in; empty for the operator's.
    turns : Turns
        Shared by all namespaces: one step at a time, and whoever has just had one waits behind the others.
    """

    def __init__(
        self, engine: ServedEngine, loop: asyncio.AbstractEventLoop, salt: str, turns: Turns
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._salt = salt
        self._turns = turns

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.context_length

    def generate(self, request: GenerationRequest) -> Generator[GenerationPiece, None, None]:
        """Yield the answer when it is whole; an answer of a build is one token."""
        with self._turns.turn():
            future = asyncio.run_coroutine_threadsafe(self._whole(request), self._loop)
            try:
                pieces = future.result()
            finally:
                future.cancel()
        yield from pieces

    async def agenerate(self, request: GenerationRequest) -> AsyncGenerator[GenerationPiece, None]:
        """As :meth:`generate`, in the server's event loop."""
        for piece in await self._whole(request):
            yield piece

    def close(self) -> None:
        """Nothing: the engine is the server's."""

    def existing(self, ids: Sequence[str]) -> Collection[str]:
        """Ask the engine which records it has; none where it does not tell in time."""
        order = CacheOrder(
            action="memories", ticket=secrets.token_hex(8), keys=tuple(ids), salt=self._salt
        )
        asked = asyncio.run_coroutine_threadsafe(
            self._engine.order(order, timeout_s=_EXISTING_S), self._loop
        )
        told = asked.result()
        return frozenset(told.get("memories", ()))

    async def _whole(self, request: GenerationRequest) -> list[GenerationPiece]:
        return [
            piece
            async for piece in self._engine.generate(
                request,
                params=request.sampling.to_params(),
                http_request=None,
                stream=False,
                cache_salt=self._salt or None,
            )
        ]


@dataclass(kw_only=True)
class Remembered:
    """A conversation on its way through the engine."""

    memories: Memories
    memory: Memory
    prepared: Prepared
    system: str
    said: list[Utterance]
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.prepared.candidate.input_ids

    @property
    def fusion(self) -> FusionRequest:
        """What the prompt asks of the engine."""
        return self.prepared.candidate.fusion

    def note(self, meta_info: Mapping[str, Any]) -> None:
        """Take in what the engine reported."""
        self.memory.note(self.prepared, meta_info)

    def ended(self, answer: str | None) -> None:
        """Build ahead, with the answer where it is known: the next request brings it."""
        self.memories.forget(self.rid)
        said = [*self.said, Utterance("assistant", answer)] if answer else self.said
        self.memory.after(self.system, said)


class Memories:
    """All memories of one server. Used in its event loop.

    Parameters
    ----------
    engine : ServedEngine
        Whose KV they are.
    tokenizer : ModelTokenizer
        Of its model.
    embedders : EmbedderPool
        The default one embeds what is said.
    default : MemoryConfig or None
        For conversations whose request says nothing; None for none.
    """

    def __init__(
        self,
        engine: ServedEngine,
        tokenizer: ModelTokenizer,
        embedders: EmbedderPool,
        default: MemoryConfig | None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._embedders = embedders
        self._default = default
        self._turns = Turns()
        self._made: OrderedDict[tuple[str, MemoryConfig], Memory] = OrderedDict()
        self._under_way: dict[str, Remembered] = {}
        self._left_alone: Counter[str] = Counter()
        engine.on_report(self._take_report)

    def config(self, wish: Any) -> MemoryConfig | None:
        """What a request's wish comes to; None for no memory.

        Raises
        ------
        RagPipelineError
            A wish that is not allowed.
        """
        return parse_memory(wish, self._default)

    def may_apply(self, wish: Any) -> bool:
        """See :class:`~rag_pipeline.sglang_plugin.http.chat_memory.ChatMemory`."""
        return self.config(wish) is not None

    def left_alone(self, reason: str) -> None:
        """Count a conversation that no memory can be of."""
        self._left_alone[reason] += 1

    async def remember(self, chat: AskedChat) -> Remembered | None:
        """Lay out a conversation of SGLang's own chat route; None where it is short enough as it is."""
        config = self.config(chat.wish)
        if config is None:
            return None
        tenant: Tenant | None = chat.scope.get("state", {}).get("rag_tenant")
        salt = str(namespaced(tenant.salt if tenant else "", chat.cache_salt) or "")
        history = [Utterance(role, text) for role, text in chat.history if text.strip()]
        return await self.prepare(
            config,
            salt,
            chat.system,
            history,
            chat.question,
            max_new_tokens=chat.max_new_tokens
            or min(_ANSWER_TOKENS, self._engine.context_length // 4),
        )

    async def prepare(
        self,
        config: MemoryConfig,
        salt: str,
        system: str,
        history: Sequence[Utterance],
        question: str,
        *,
        max_new_tokens: int,
        told: str = "",
        always: bool = False,
    ) -> Remembered | None:
        """Lay out one answer of a conversation.

        Parameters
        ----------
        config : MemoryConfig
            Method and budget.
        salt : str
            Namespace of the conversation's records.
        system, history, question : str, sequence of Utterance, str
            The conversation.
        max_new_tokens : int
            Room for the answer.
        told : str
            What the next request will bring as this question, where it is not all of it; the question where empty.
        always : bool
            Lay a short conversation out too.

        Returns
        -------
        Remembered or None
            None where the history is short enough as it is; what it may need soon is built all the same.
        """
        tail = _TAIL_BLOCKS * config.block_tokens
        characters = sum(len(said.text) for said in history)
        if not always and characters < config.budget_tokens:
            return None  # a token has a character at least, in any text worth a memory
        memory = await asyncio.to_thread(self._memory, salt, config, asyncio.get_running_loop())
        sampling = SamplingOptions(max_new_tokens=max_new_tokens)
        prepared = await memory.aprepare(system, history, question, sampling=sampling)
        length = prepared.plan.history_tokens
        if not always and length <= config.verbatim_limit + tail:
            if length > config.verbatim_limit:
                memory.after(system, history)
            return None
        if length > config.verbatim_limit and not prepared.candidate.needs:
            # Nothing is built yet, as of a conversation that begins in the middle: a window would forget all before it.
            prepared = await memory.aprepare(system, history, question, sampling=sampling, wait=True)
        made = Remembered(
            memories=self,
            memory=memory,
            prepared=prepared,
            system=system,
            said=[*history, Utterance("user", told or question)],
        )
        self._under_way[made.rid] = made
        return made

    def forget(self, rid: str) -> None:
        """Expect no report on a request any more."""
        self._under_way.pop(rid, None)

    def facts(self) -> dict[str, Any]:
        """Counts of all memories together, for people and metrics."""
        together: Counter[str] = Counter()
        for memory in self._made.values():
            together.update(_flat(memory.stats().to_json()))
        return {
            "method": self._default.method if self._default else "off",
            "memories": len(self._made),
            **together,
            "left_alone": dict(self._left_alone),
        }

    def close(self) -> None:
        """End all builds."""
        while self._made:
            self._made.popitem()[1].close()

    def _memory(self, salt: str, config: MemoryConfig, loop: asyncio.AbstractEventLoop) -> Memory:
        key = (salt, config)
        memory = self._made.get(key)
        if memory is None:
            backend = MemoryBackend(self._engine, loop, salt, self._turns)
            planner = Planner(
                config,
                self._tokenizer,
                self._embedders.get().encode_queries,
                context_length=backend.context_length,
            )
            memory = self._made[key] = Memory(planner, backend, existing=backend.existing)
        self._made.move_to_end(key)
        while len(self._made) > MOST_MEMORIES:
            self._made.popitem(last=False)[1].close()
        return memory

    def _take_report(self, rid: str, meta_info: Mapping[str, Any]) -> None:
        remembered = self._under_way.get(rid)
        if remembered is not None:
            remembered.note(meta_info)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}_")
        else:
            flat[f"{prefix}{name}"] = value
    return flat

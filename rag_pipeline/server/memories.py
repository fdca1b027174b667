"""Memories of the conversations that a server answers: one per tenant and configuration, built behind the answers."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rag_pipeline.errors import EngineError
from rag_pipeline.memory import (
    Memory,
    MemoryConfig,
    Planner,
    Utterance,
    parse_memory,
)
from rag_pipeline.memory.methods import create_method
from rag_pipeline.opened_memory import Asked, RememberedTurn, plan_turn, prepare_turn
from rag_pipeline.protocol import SamplingOptions
from rag_pipeline.server.memory_backend import MemoryBackend
from rag_pipeline.server.turns import Turns
from rag_pipeline.sglang_plugin.http.access import namespaced
from rag_pipeline.sglang_plugin.http.chat_memory import AskedChat

if TYPE_CHECKING:
    from rag_pipeline.prompts.tokenizer import ModelTokenizer
    from rag_pipeline.server.embedders import EmbedderPool
    from rag_pipeline.server.tenants import Tenant
    from rag_pipeline.sglang_plugin.http.served_engine import ServedEngine

MOST_MEMORIES = 64
"""Namespaces and configurations with a memory of their own. Beyond, of the tenant with most of them the one that was not used
for longest is planned anew."""
STEP_S = 300.0
"""Longest that one step takes, its wait in the engine's queue included: as long as SGLang lets a batch take."""
_UNDER_WAY = 4096
"""Requests whose report is waited for."""
_FRAME_TOKENS = 16
"""More than a chat template writes around a message."""
_ANSWER_TOKENS = 512
"""Room for an answer whose length nobody says; at most a quarter of the context."""


@dataclass(frozen=True, kw_only=True)
class Remembered(RememberedTurn):
    """A turn on its way through the server's engine."""

    memories: Memories
    rid: str

    def ended(self, answer: str | None) -> None:
        """Build ahead, and expect no report any more."""
        self.memories.forget(self.rid)
        super().ended(answer)


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
    run : callable
        ``await run(tenant, function)`` runs blocking work beside the event loop, tenants taking turns.
    """

    def __init__(
        self,
        engine: ServedEngine,
        tokenizer: ModelTokenizer,
        embedders: EmbedderPool,
        default: MemoryConfig | None,
        run: Callable[[str, Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._embedders = embedders
        self._default = default
        self._run = run
        self._turns = Turns()
        self._tenant_turns: dict[str, Turns] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._made: OrderedDict[tuple[str, str, MemoryConfig], Memory] = OrderedDict()
        self._under_way: OrderedDict[str, Remembered] = OrderedDict()
        self._left_alone: Counter[str] = Counter()
        engine.on_report(self._take_report)

    def check(self) -> None:
        """Refuse a default memory that the engine has no room for; called when the engine runs.

        Raises
        ------
        RagPipelineError
            Otherwise every long conversation would be refused, of clients that have asked for no memory.
        """
        if self._default is not None:
            create_method(self._default).check_room(self._engine.context_length)

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
        asked = Asked(
            system=chat.system,
            history=tuple(Utterance(role, text) for role, text in chat.history),
            question=chat.question,
        )
        longest = min(_ANSWER_TOKENS, self._engine.context_length // 4)
        return await self.prepare(
            config,
            chat.scope["state"]["rag_tenant"],
            asked,
            SamplingOptions(max_new_tokens=chat.max_new_tokens or longest),
            cache_salt=chat.cache_salt or "",
            rid=chat.rid,
        )

    async def prepare(
        self,
        config: MemoryConfig,
        tenant: Tenant,
        asked: Asked,
        sampling: SamplingOptions,
        *,
        cache_salt: str = "",
        rid: str | None = None,
    ) -> Remembered | None:
        """Lay out one answer of a conversation.

        Parameters
        ----------
        config : MemoryConfig
            Method and budget.
        tenant : Tenant
            Whose conversation it is.
        asked : Conversation
            What was said.
        sampling : SamplingOptions
            How it is decoded; room for the answer is left.
        cache_salt : str
            Namespace that the client names, inside the tenant's.
        rid : str, optional
            Id that the client gives its request.

        Returns
        -------
        Remembered or None
            None where the history is short enough as it is; what it may need soon is built all the same.

        Raises
        ------
        RagPipelineError
            A question that does not fit.
        """
        if _most_tokens(asked.history) <= config.budget_tokens:
            return None
        salt = str(namespaced(tenant.salt, cache_salt) or "") if tenant.salt else cache_salt
        loop = asyncio.get_running_loop()
        planned = await self._run(
            tenant.name,
            lambda: plan_turn(self._memory(tenant.name, salt, config, loop), asked, sampling),
        )
        if planned is None:
            return None
        await asyncio.gather(*map(asyncio.wrap_future, planned.build()))
        turn = await self._run(tenant.name, lambda: prepare_turn(planned, sampling))
        # Two of one id would have each other's report, so a second one under way has its own.
        if not rid or rid in self._under_way:
            rid = uuid.uuid4().hex
        made = Remembered(
            memory=turn.memory, prepared=turn.prepared, asked=asked, memories=self, rid=rid
        )
        self._under_way[made.rid] = made
        while len(self._under_way) > _UNDER_WAY:
            # Of clients that went away before their answer began.
            self._under_way.popitem(last=False)
        return made

    def forget(self, rid: str) -> None:
        """Expect no report on a request any more."""
        self._under_way.pop(rid, None)

    def facts(self, salt: str = "") -> dict[str, Any]:
        """Counts of the memories of one tenant together; of all with an empty salt."""
        with self._lock:
            mine = [
                memory
                for (_, kept_in, _), memory in self._made.items()
                if not salt or kept_in == salt or kept_in.startswith(f"{salt}/")
            ]
        told = [memory.stats().to_flat_json() for memory in mine]
        names = told[0] if told else ()
        together = {
            name: (max if "peak" in name else sum)(one[name] for one in told) for name in names
        }
        return {
            "method": self._default.method if self._default else "off",
            "memories": len(told),
            **together,
            **({} if salt else {"left_alone": dict(self._left_alone)}),
        }

    def close(self) -> None:
        """End all builds, without waiting for the step that runs; conversations have windows from now on."""
        self._closed = True
        with self._lock:
            made = list(self._made.values())
        for memory in made:
            memory.close(wait=False)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the server stops")

    def _memory(
        self, tenant: str, salt: str, config: MemoryConfig, loop: asyncio.AbstractEventLoop
    ) -> Memory:
        dropped = []
        with self._lock:
            key = (tenant, salt, config)
            memory = self._made.get(key)
            if memory is None:
                turns = self._tenant_turns.setdefault(tenant, Turns())
                backend = MemoryBackend(
                    self._engine,
                    loop,
                    salt,
                    (turns, self._turns),
                    self._check_open,
                    step_s=STEP_S,
                )
                planner = Planner(
                    config,
                    self._tokenizer,
                    lambda texts: self._embedders.get().encode_queries(texts),  # may load it
                    context_length=backend.context_length,
                )
                memory = self._made[key] = Memory(planner, backend, existing=backend.existing)
            self._made.move_to_end(key)
            while len(self._made) > MOST_MEMORIES:
                dropped.append(self._made.pop(self._least_wanted(key)))
        for one in dropped:
            one.close(wait=False)
        return memory

    def _least_wanted(self, beside: tuple[str, str, MemoryConfig]) -> tuple[str, str, MemoryConfig]:
        """Of the tenant with most memories the one that was not used for longest."""
        counts = Counter(tenant for tenant, _, _ in self._made)
        most = max(counts.values())
        return next(key for key in self._made if counts[key[0]] == most and key != beside)

    def _take_report(self, meta_info: Mapping[str, Any]) -> None:
        remembered = self._under_way.pop(str(meta_info.get("id")), None)
        if remembered is not None:
            remembered.memory.note(remembered.prepared, meta_info)


def _most_tokens(history: Sequence[Utterance]) -> int:
    """More tokens than a history has, without a tokenizer: a token is a byte at least, a message has a frame."""
    return sum(len(said.text.encode()) + _FRAME_TOKENS for said in history)

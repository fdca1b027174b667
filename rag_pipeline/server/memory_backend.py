"""The server's engine as the memories of its conversations use it: for steps and questions, from threads beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from chunk_cache import tenant_mark
from rag_pipeline.errors import EngineError
from rag_pipeline.protocol import GenerationPiece, GenerationRequest
from rag_pipeline.protocol.cache_order import memories_order
from rag_pipeline.server.turns import Turns

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.http.served_engine import ServedEngine

_EXISTING_S = 20.0
"""Longest wait for the engine to say which records it has."""


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
    turns : sequence of Turns
        Those of the tenant, then those that all tenants share: one step at a time, and whoever has just had one waits
        behind the others, in however many namespaces and configurations.
    check : callable
        Called while a step waits for its turn; gives up by raising.
    step_s : float
        Seconds that one step may take once it has its turn. All tenants wait behind it, so one that the engine never
        ends must not hold them.
    """

    def __init__(
        self,
        engine: ServedEngine,
        loop: asyncio.AbstractEventLoop,
        salt: str,
        turns: Sequence[Turns],
        check: Callable[[], None],
        *,
        step_s: float,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._salt = salt
        self._turns = turns
        self._check = check
        self._step_s = step_s

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.context_length

    def generate(self, request: GenerationRequest) -> Generator[GenerationPiece, None, None]:
        """Yield the answer when it is whole; an answer of a build is one token.

        Raises
        ------
        EngineError
            The engine has not ended the step in time; it is aborted there.
        """
        with ExitStack() as held:
            for turns in self._turns:
                held.enter_context(turns.turn(self._check))
            self._check()
            future = asyncio.run_coroutine_threadsafe(self._whole(request), self._loop)
            try:
                pieces = future.result(self._step_s)
            except TimeoutError:
                raise EngineError(f"the engine has not ended it in {self._step_s:g} s") from None
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
        """Ask the engine which records it has.

        Raises
        ------
        EngineError
            It does not answer in time.
        """
        order = memories_order(ids, tenant_mark(self._salt.partition("/")[0]))
        asked = self._engine.order(order, timeout_s=_EXISTING_S)
        told = asyncio.run_coroutine_threadsafe(asked, self._loop).result()
        return frozenset(told["present"])

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

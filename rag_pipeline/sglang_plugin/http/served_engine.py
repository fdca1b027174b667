"""The engine behind SGLang's HTTP server, as routes in the same process use it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from rag_pipeline.errors import EngineError, one_line
from rag_pipeline.protocol import AbortedError, GenerationPiece, GenerationRequest, StreamReader
from rag_pipeline.protocol.cache_order import (
    CACHE_KEY,
    CacheOrder,
    CacheOrderError,
    read_answer,
)
from rag_pipeline.sglang_plugin.activation import Activation, activation_of

__all__ = ["RefusedRequestError", "ServedEngine", "activation_in", "carry_out"]

STATE_TIMEOUT_S = 20.0
"""Longest wait for the scheduler's own report; it answers between two batches."""

ORDER_TIMEOUT_S = 300.0
"""Longest wait for an order to the chunk cache: a check reads every record of a disk."""
_MISSED = 3
"""Reports without an answer after which nobody will give one; a late report of another question is one."""

_MAX_REASON = 500
"""Characters of the engine's reason that a refusal carries."""


class RefusedRequestError(EngineError):
    """The engine did not take or did not finish a request; `status` is the HTTP status for it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServedEngine:
    """The engine behind SGLang's HTTP server, for routes that run in the server's event loop.

    Parameters
    ----------
    incremental : bool
        Whether SGLang streams only what is new (``--incremental-streaming-output``).
    """

    def __init__(self, *, incremental: bool) -> None:
        self._incremental = incremental
        self.last_state: dict[str, Any] | None = None
        """What :meth:`state` returned last; None before the first report."""

    @property
    def _manager(self) -> Any:
        from sglang.srt.entrypoints.http_server import get_global_state

        return get_global_state().tokenizer_manager

    @property
    def incremental(self) -> bool:
        """Whether each piece of a stream of SGLang's own routes holds only what is new."""
        return self._incremental

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together that the engine admits."""
        return int(self._manager.max_req_input_len)

    async def generate(
        self,
        request: GenerationRequest,
        *,
        params: dict[str, Any],
        http_request: Any,
        stream: bool,
        cache_salt: str | None = None,
        rid: str | None = None,
    ) -> AsyncGenerator[GenerationPiece, None]:
        """Generate for one HTTP request.

        Parameters
        ----------
        request : GenerationRequest
            Token ids, spans and policy; its sampling options are not used.
        params : dict of str to object
            SGLang's sampling parameters.
        http_request : object
            The request being answered: SGLang reads the tenant from it and notices when it is gone.
        stream : bool
            Yield pieces as they come; else one piece.
        cache_salt : str, optional
            Namespace of its KV, where no request of a tenant is being answered.
        rid : str, optional
            Id for the request.

        Raises
        ------
        RefusedRequestError
            With the status to answer.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        manager, rid = self._manager, rid or uuid.uuid4().hex
        reader = StreamReader(incremental=self._incremental)
        try:
            obj = GenerateReqInput(
                input_ids=list(request.input_ids),
                sampling_params=params,
                stream=stream,
                rid=rid,
                kv_hints=request.fusion.to_kv_hints(),
                cache_salt=cache_salt,
            )
            async for message in manager.generate_request(obj, http_request):
                yield reader.read(message)
        except AbortedError as error:
            line = one_line(
                error.reason or "the engine aborted the request; send it again", _MAX_REASON
            )
            raise RefusedRequestError(line, error.status or 503) from None
        except EngineError:
            raise
        except ValueError as error:  # SGLang's word for a request that it does not admit
            status = int(getattr(error, "status_code", 400))
            raise RefusedRequestError(one_line(error, _MAX_REASON), status) from error
        finally:
            if reader.finish is None:
                manager.abort_request(rid)

    @staticmethod
    def on_report(listen: Callable[[Mapping[str, Any]], None]) -> None:
        """Have every ``meta_info`` that carries fusion's report told, in the server's event loop."""
        from rag_pipeline.sglang_plugin.fusion.forward.report import LISTENERS

        LISTENERS.append(listen)

    async def state(self) -> dict[str, Any]:
        """What the scheduler processes report about themselves, in the shape of ``/server_info``.

        Raises
        ------
        EngineError
            When they do not answer in time.
        """
        from sglang.version import __version__

        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                states = await self._manager.get_internal_state()
        except TimeoutError:
            raise EngineError(
                f"the scheduler did not report within {STATE_TIMEOUT_S:.0f} s; it is busy or has died"
            ) from None
        self.last_state = {"internal_states": states, "version": __version__}
        return self.last_state

    async def order(
        self, order: CacheOrder, *, timeout_s: float = ORDER_TIMEOUT_S
    ) -> dict[str, Any]:
        """Have the scheduler processes carry out an order to the chunk cache, and wait for the answer.

        Raises
        ------
        CacheOrderError
            With a line and an HTTP status: of the refusal, or 503 where no answer came in time or fusion is not there.
        """
        return await carry_out(self._manager, order, timeout_s=timeout_s)


async def carry_out(
    manager: Any, order: CacheOrder, *, timeout_s: float = ORDER_TIMEOUT_S
) -> dict[str, Any]:
    """Have the scheduler processes behind a tokenizer manager carry out an order; see :meth:`ServedEngine.order`."""
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager.auto_create_handle_loop()
    pause, without = 0.02, 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                # It is queued behind others' questions for the state, and each gets its own answer.
                reports = await manager.get_internal_state_communicator(
                    GetInternalStateReq(rid=order.encode())
                )
                states = [report.internal_state for report in reports]
                answer = read_answer(states, order.ticket)
                if answer is not None:
                    return answer
                without += not all(CACHE_KEY in state for state in states)
                if without > _MISSED:
                    raise CacheOrderError(
                        "the engine keeps no chunk KV: fusion is not active in it", 503
                    )
                await asyncio.sleep(pause)
                pause = min(1.0, 2 * pause)
    except TimeoutError:
        raise CacheOrderError(
            f"the engine did not carry out {order.action} within {timeout_s:.0f} s; it goes on with it: "
            "look later whether it has",
            503,
        ) from None


class _Info:
    """Gives :func:`activation_of` the report of a server in this process."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._info = info

    def get_server_info(self) -> dict[str, Any]:
        return self._info


def activation_in(info: dict[str, Any]) -> Activation:
    """Read the facts of the plugin from :meth:`ServedEngine.state`."""
    return activation_of(_Info(info))

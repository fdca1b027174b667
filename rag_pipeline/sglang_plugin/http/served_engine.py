"""The engine behind SGLang's HTTP server, as routes in the same process use it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from rag_pipeline.errors import EngineError, one_line
from rag_pipeline.protocol import AbortedError, GenerationPiece, GenerationRequest, StreamReader
from rag_pipeline.sglang_plugin.activation import Activation, activation_of

__all__ = ["RefusedRequestError", "ServedEngine", "activation_in"]

STATE_TIMEOUT_S = 20.0
"""Longest wait for the scheduler's own report; it answers between two batches."""

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

        Raises
        ------
        RefusedRequestError
            With the status to answer.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        manager, rid = self._manager, uuid.uuid4().hex
        reader = StreamReader(incremental=self._incremental)
        try:
            obj = GenerateReqInput(
                input_ids=list(request.input_ids),
                sampling_params=params,
                stream=stream,
                rid=rid,
                kv_hints=request.fusion.to_kv_hints(),
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


class _Info:
    """Gives :func:`activation_of` the report of a server in this process."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._info = info

    def get_server_info(self) -> dict[str, Any]:
        return self._info


def activation_in(info: dict[str, Any]) -> Activation:
    """Read the facts of the plugin from :meth:`ServedEngine.state`."""
    return activation_of(_Info(info))

"""Backend on an SGLang engine in this process."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from rag_pipeline.errors import EngineError, one_line
from rag_pipeline.generation.loop_runner import LoopRunner
from rag_pipeline.protocol import FUSION_KEY, GenerationPiece, GenerationRequest, StreamReader
from rag_pipeline.protocol.cache_order import memories_order

_END = object()

SILENCE_S = 2.0
"""Silence after which the engine's processes are checked; a long prefill is silent too."""

_POLL_S = 0.2

ABORT_WAIT_S = 10.0
"""Longest wait for the engine to confirm an abort; the loop must turn until then."""


ORDER_WAIT_S = 20.0
"""Longest wait for the engine to say which memories it has; it answers between two batches."""


class EngineBackend:
    """Generates with an in-process ``sglang.Engine``.

    Parameters
    ----------
    engine : object
        A running engine; the caller shuts it down. :meth:`start` makes one that :meth:`close`
        shuts down.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._owned = False
        self._runner = LoopRunner(engine.loop)
        self._incremental = bool(engine.server_args.incremental_streaming_output)
        # The manager starts its reader on the first request, and hooks SIGTERM when that comes
        # from the main thread; do it now, while this is still the thread that made the engine.
        if threading.current_thread() is threading.main_thread():
            asyncio.set_event_loop(engine.loop)
            engine.tokenizer_manager.auto_create_handle_loop()
        # The smaller of the model's context and the KV pool; the scheduler refuses a prompt of
        # this length, which leaves at least one token for the answer.
        self._context_length = int(engine.tokenizer_manager.max_req_input_len)

    @classmethod
    def start(cls, model_path: Path | str, **server_args: Any) -> EngineBackend:
        """Start an engine with the plugin active.

        Parameters
        ----------
        model_path : Path or str
            Folder in Hugging Face format.
        **server_args
            SGLang's server arguments.

        Returns
        -------
        EngineBackend
            Owns the engine: :meth:`close` shuts it down.

        Raises
        ------
        EngineError
            One line with the engine's own reason.
        """
        from rag_pipeline.sglang_plugin import create_engine

        backend = cls(create_engine(str(model_path), **server_args))
        backend._owned = True
        return backend

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together that this engine admits."""
        return self._context_length

    def generate(self, request: GenerationRequest) -> Generator[GenerationPiece, None, None]:
        """Yield pieces as they come; closing the generator aborts the request."""
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        rid = uuid.uuid4().hex
        with self._runner:
            task = self._runner.submit(self._pump(request, rid, items.put))
            ended = False
            try:
                while (item := self._next(items)) is not _END:
                    yield item
                ended = True
            finally:
                if not ended:
                    self._runner.submit(self._abort(rid))
                    with contextlib.suppress(queue.Empty):
                        while items.get(timeout=ABORT_WAIT_S) is not _END:
                            pass
                    task.cancel()  # does nothing unless the engine is stuck
            task.result()

    async def agenerate(self, request: GenerationRequest) -> AsyncGenerator[GenerationPiece, None]:
        """Yield as :meth:`generate` does, without blocking the caller's event loop."""
        here = asyncio.get_running_loop()
        items: asyncio.Queue[Any] = asyncio.Queue()
        rid = uuid.uuid4().hex

        def put(item: Any) -> None:
            # The caller's loop may be gone when a stream is dropped at exit.
            with contextlib.suppress(RuntimeError):
                here.call_soon_threadsafe(items.put_nowait, item)

        with self._runner:
            task = self._runner.submit(self._pump(request, rid, put))
            ended = False
            try:
                while (item := await self._anext(items)) is not _END:
                    yield item
                ended = True
            finally:
                if not ended:
                    self._runner.submit(self._abort(rid))
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(ABORT_WAIT_S):
                            while await items.get() is not _END:
                                pass
                    task.cancel()
            task.result()

    def finish_builds(self, timeout_s: float) -> bool:
        """Wait until no missing chunk is left to compute.

        Chunks that a prompt had and the store had not are computed when the engine is idle; a
        process that ends at once would ask for them again the next time.

        Parameters
        ----------
        timeout_s : float
            Longest wait, seconds.

        Returns
        -------
        bool
            Whether all are done.
        """
        deadline = time.monotonic() + timeout_s
        with self._runner:
            while self._runner.submit(self._pending_builds()).result():
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_S)
        return True

    def memories(self, ids: Sequence[str]) -> frozenset[str]:
        """Of memory ids, those whose records the engine has, in memory or in a folder.

        Raises
        ------
        EngineError
            The engine keeps no records, or does not answer in time.
        """
        from rag_pipeline.sglang_plugin.http.served_engine import carry_out

        order = memories_order(ids)
        with self._runner:
            answer = carry_out(self.engine.tokenizer_manager, order, timeout_s=ORDER_WAIT_S)
            return frozenset(self._runner.submit(answer).result()["present"])

    def close(self) -> None:
        """Shut down an engine made by :meth:`start`."""
        if self._owned:
            self._owned = False
            self.engine.shutdown()

    def _next(self, items: queue.SimpleQueue[Any]) -> Any:
        while True:
            try:
                return items.get(timeout=SILENCE_S)
            except queue.Empty:
                self._check_alive()

    async def _anext(self, items: asyncio.Queue[Any]) -> Any:
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    return await items.get()
            except TimeoutError:
                self._check_alive()

    def _check_alive(self) -> None:
        """Raise where a process of the engine has died: no piece would ever come."""
        import psutil

        for pid in self.engine.get_all_child_pids():
            try:
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    continue
            except psutil.NoSuchProcess:
                pass
            raise EngineError(
                f"a process of the engine (pid {pid}) has died, the answer is lost; "
                "start the engine again, with a smaller max_total_tokens if memory ran out"
            )

    async def _pending_builds(self) -> int:
        states = await self.engine.tokenizer_manager.get_internal_state()
        return sum(int((state.get(FUSION_KEY) or {}).get("pending", 0)) for state in states)

    async def _abort(self, rid: str) -> None:
        self.engine.tokenizer_manager.abort_request(rid)

    async def _pump(self, request: GenerationRequest, rid: str, put: Callable[[Any], None]) -> None:
        """Move pieces from the engine to `put`; runs on the engine's loop."""
        done = False
        try:
            stream = await self.engine.async_generate(
                input_ids=list(request.input_ids),
                sampling_params=request.sampling.to_params(),
                stream=True,
                rid=rid,
                kv_hints=request.fusion.to_kv_hints(),
            )
            reader = StreamReader(incremental=self._incremental)
            async for message in stream:
                put(reader.read(message))
                done = reader.finish is not None
        except EngineError:
            raise
        except ValueError as error:  # SGLang's word for a request it does not admit
            raise EngineError(f"the engine refused the request: {one_line(error)}") from error
        finally:
            if not done:
                self.engine.tokenizer_manager.abort_request(rid)
            put(_END)

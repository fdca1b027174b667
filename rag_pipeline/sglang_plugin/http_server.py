"""SGLang's own HTTP server, started with this project's routes in its own app.

No second server and no second process: the routes use the tokenizer manager that SGLang's routes use.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import sys
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_pipeline.errors import EngineError
from rag_pipeline.generation.base import delta, extra_fields, finish_reason
from rag_pipeline.sglang_plugin import launch_hooks, startup
from rag_pipeline.sglang_plugin.activation import Activation, activation_of
from rag_pipeline.sglang_plugin.http_access import AccessRules
from rag_pipeline.types import GenerationPiece, GenerationRequest

__all__ = ["RefusedRequestError", "ServedEngine", "ServerFacts", "run_http_server"]

STATE_TIMEOUT_S = 20.0
"""Longest wait for the scheduler's own report; it answers between two batches."""


class RefusedRequestError(EngineError):
    """The engine did not take or did not finish a request; `status` is the HTTP status for it."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerFacts:
    """What the flags came to: where the server listens, and what guards it."""

    host: str
    port: int
    has_api_key: bool
    model_name: str


class ServedEngine:
    """The engine behind SGLang's HTTP server, for routes that run in the server's event loop.

    Parameters
    ----------
    incremental
        Whether SGLang streams only what is new (``--incremental-streaming-output``).
    """

    def __init__(self, *, incremental: bool) -> None:
        self._incremental = incremental

    @property
    def _manager(self) -> Any:
        from sglang.srt.entrypoints.http_server import get_global_state

        return get_global_state().tokenizer_manager

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
        request
            Token ids, spans and policy; its sampling options are not used.
        params
            SGLang's sampling parameters.
        http_request
            The request being answered: SGLang reads the tenant from it and notices when it is gone.
        stream
            Yield pieces as they come; else one piece.

        Raises
        ------
        RefusedRequestError
            With the status to answer.
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        manager, rid = self._manager, uuid.uuid4().hex
        done, seen = False, 0
        try:
            obj = GenerateReqInput(
                input_ids=list(request.input_ids),
                sampling_params=params,
                stream=stream,
                rid=rid,
                **extra_fields(request),
            )
            async for out in manager.generate_request(obj, http_request):
                meta = out["meta_info"]
                kind, message = finish_reason(meta)
                done = kind is not None
                if kind == "abort":
                    raise _aborted(meta, message)
                text, seen = delta(out["text"], seen, incremental=self._incremental, final=done)
                yield GenerationPiece(text=text, meta_info=meta)
        except EngineError:
            raise
        except ValueError as error:  # SGLang's word for a request that it does not admit
            status = int(getattr(error, "status_code", 400))
            raise RefusedRequestError(_one_line(error), status) from error
        finally:
            if not done:
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
        return {"internal_states": states, "version": __version__}


class _Info:
    """Gives :func:`activation_of` the report of a server in this process."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._info = info

    def get_server_info(self) -> dict[str, Any]:
        return self._info


def activation_in(info: dict[str, Any]) -> Activation:
    """Read the facts of the plugin from :meth:`ServedEngine.state`."""
    return activation_of(_Info(info))


def run_http_server(
    model_path: Path,
    words: Sequence[str],
    *,
    attach: Callable[[Any, ServedEngine, ServerFacts], None],
    rules: AccessRules,
    on_ready: Callable[[ServerFacts], None],
) -> None:
    """Serve until told to stop.

    Parameters
    ----------
    model_path
        Folder in Hugging Face format.
    words
        Further flags, as ``sglang serve`` takes them; they win over the CPU defaults.
    attach
        Called with SGLang's FastAPI app before it listens, to add routes.
    rules
        Keys and namespaces.
    on_ready
        Called when the engine has answered its warm-up and the plugin has proved to be active.

    Raises
    ------
    EngineError
        One line: a flag that SGLang does not know, a port in use, an engine that did not start.
    """
    startup._check_folder(str(model_path))
    with startup._fault_file() as fault_file:
        fast = startup.prepare()
        try:
            server_args = _parse(model_path, words)
            _launch(server_args, fast=fast, attach=attach, rules=rules, on_ready=on_ready)
        except EngineError:
            raise
        except (Exception, SystemExit) as error:
            raise EngineError(startup._reason(fault_file, error, str(model_path))) from error
        finally:
            _end_children()


def _parse(model_path: Path, words: Sequence[str]) -> Any:
    import sglang.srt.plugins
    from sglang.srt.server_args import prepare_server_args

    sglang.srt.plugins.load_plugins()
    launch_hooks.ensure_applied()
    given = ["--model-path", str(model_path), *words]
    with _argparse_in_one_line():
        server_args = prepare_server_args([*given, *_default_words(words)])
    for name, value in _missing_defaults(words).items():
        if value is True:  # as a word, one of these is called deprecated on every start
            setattr(server_args, name, value)
    for name, wanted in (("tokenizer_worker_num", 1), ("enable_http2", False), ("nnodes", 1)):
        if getattr(server_args, name) != wanted:
            raise EngineError(
                f"--{name.replace('_', '-')} is {getattr(server_args, name)}; the RAG routes live in "
                f"SGLang's one HTTP process: leave it at {wanted}"
            )
    if server_args.grpc_mode or server_args.smg_grpc_mode or server_args.encoder_only:
        raise EngineError(
            "gRPC and encoder-only servers have no HTTP routes; leave out that flag, or use `sglang serve`"
        )
    startup._check_port({"host": server_args.host, "port": server_args.port})
    return server_args


def _default_words(words: Sequence[str]) -> list[str]:
    """Flags of the CPU defaults that the caller did not give."""
    flags: list[str] = []
    for name, value in _missing_defaults(words).items():
        if value is not True:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def _missing_defaults(words: Sequence[str]) -> dict[str, Any]:
    given = {word.split("=", 1)[0] for word in words if word.startswith("--")}
    defaults = startup.cpu_defaults({})
    return {k: v for k, v in defaults.items() if f"--{k.replace('_', '-')}" not in given}


@contextmanager
def _argparse_in_one_line() -> Iterator[None]:
    """Argparse prints a page of usage before the one line that matters."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise EngineError("`sglang serve --help` lists SGLang's own flags") from None
        lines = said.getvalue().strip().splitlines() or ["flags that SGLang does not take"]
        reason = lines[-1].partition("error: ")[2] or lines[-1]
        raise EngineError(f"{reason}; `sglang serve --help` lists SGLang's flags") from None


def _launch(
    server_args: Any,
    *,
    fast: bool,
    attach: Callable[[Any, ServedEngine, ServerFacts], None],
    rules: AccessRules,
    on_ready: Callable[[ServerFacts], None],
) -> None:
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.engine import Engine

    from rag_pipeline.sglang_plugin import http_access, plugin_is_off

    http_access.register(rules)
    engine = ServedEngine(incremental=bool(server_args.incremental_streaming_output))
    facts = ServerFacts(
        host=str(server_args.host),
        port=int(server_args.port),
        has_api_key=bool(server_args.api_key),
        model_name=str(server_args.served_model_name or Path(server_args.model_path).name),
    )
    attach(http_server.app, engine, facts)

    def ready() -> None:
        if not plugin_is_off() and startup._plugin_allowed():
            _verify(engine)
        on_ready(facts)

    with startup._no_process_kill({}) as extra:
        for name, value in extra.items():
            setattr(server_args, name, value)
        http_server.launch_server(
            server_args,
            run_scheduler_process_func=startup._child(Engine.run_scheduler_process_func, fast=fast),
            run_detokenizer_process_func=startup._child(
                Engine.run_detokenizer_process_func, fast=fast
            ),
            launch_callback=ready,
        )


def _verify(engine: ServedEngine) -> None:
    """End the server when the plugin is not active in its scheduler; runs in SGLang's warm-up thread."""
    loop = engine._manager.event_loop
    try:
        info = asyncio.run_coroutine_threadsafe(engine.state(), loop).result()
        facts = activation_in(info)
        fault = "" if facts.active and not facts.unapplied else "the plugin is not active in it"
    except EngineError as error:
        fault = str(error)
    if fault:
        sys.stderr.write(
            f"error: the engine started, but {fault}; reinstall rag-pipeline and sglang together, or "
            "set RAG_PIPELINE_PLUGIN=off to run stock SGLang\n"
        )
        sys.stderr.flush()
        _end_children()
        os._exit(1)


def _end_children() -> None:
    """End the engine's processes; the server is going.

    SGLang kills every child, the standard library's resource tracker too, which then complains.
    """
    # Not imported for this: the start may have failed before it was.
    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    state = server.get_global_state() if server is not None else None
    watchdog = getattr(state and state.tokenizer_manager, "_subprocess_watchdog", None)
    if watchdog is not None:
        watchdog.stop()  # it would call the end of the scheduler a crash
    startup._stop_children()


def _aborted(meta: Any, message: str | None) -> RefusedRequestError:
    reason = meta.get("finish_reason")
    status = reason.get("status_code") if isinstance(reason, dict) else None
    return RefusedRequestError(
        _one_line(message or "the engine aborted the request; send it again"), int(status or 503)
    )


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:500]

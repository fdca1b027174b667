"""SGLang's own HTTP server, started with this project's routes in its own app.

No second server and no second process: the routes use the tokenizer manager that SGLang's routes use.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag_pipeline.errors import EngineError, RagPipelineError
from rag_pipeline.sglang_plugin.cpu.detect import accelerator_present
from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_hooks, verify_targets
from rag_pipeline.sglang_plugin.http import access as http_access
from rag_pipeline.sglang_plugin.http import chat_memory
from rag_pipeline.sglang_plugin.http.flags import ServerKeys, read_flags
from rag_pipeline.sglang_plugin.http.protocol import HttpLimits, limited_protocol
from rag_pipeline.sglang_plugin.http.served_engine import ServedEngine, activation_in
from rag_pipeline.sglang_plugin.http.stop import GracefulStop, handle_sigint, handle_sigterm
from rag_pipeline.sglang_plugin.launch import startup
from rag_pipeline.sglang_plugin.off_switch import plugin_is_off

__all__ = ["HttpLimits", "ServerFacts", "ServerKeys", "run_http_server"]

ENGINE_NICE = 5
"""Added to the nice value of an engine that computes on the server's own cores.

Its passes use every core all the time. What the HTTP process does takes milliseconds, and at the same priority
it waits for as long as it runs. At ten times the capacity, on two cores, the 99th percentile of refusals was
0.06 to 1.4 s, and 0.04 s with this.
"""

_CONFIG = "uvicorn.config.Config.__init__"
_HANDLERS = "sglang.srt.managers.tokenizer_manager.SignalHandler"
_INTERRUPTED = 130
"""Exit code of a second Ctrl-C."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerFacts:
    """What the flags came to: where the server listens, and what guards it."""

    host: str
    port: int
    model_name: str
    closed: Mapping[str, str] = field(default_factory=dict)
    """Routes that need a flag which was not given, by path."""


def run_http_server(
    model_path: Path,
    words: Sequence[str],
    *,
    attach: Callable[[Any, ServedEngine, ServerFacts], Any],
    keys: ServerKeys,
    limits: HttpLimits,
    on_ready: Callable[[ServerFacts], None],
) -> None:
    """Serve until told to stop.

    Parameters
    ----------
    model_path : Path
        Folder in Hugging Face format.
    words : sequence of str
        Further flags, as ``sglang serve`` takes them; they win over the CPU defaults.
    attach : callable
        Called with SGLang's FastAPI app before anything starts, to add routes. What it returns is served:
        the guard around that app, with a :class:`.http_stop.Door`'s attributes.
    keys : ServerKeys
        Not among the words, which SGLang shows.
    limits : HttpLimits
        Of connections, and of the time that a header, a body and a stop may take.
    on_ready : callable
        Called when the engine has answered its warm-up and the plugin has proved to be active. A RagPipelineError that it
        raises ends the server, with that line.

    Raises
    ------
    EngineError
        One line: a flag that SGLang does not know, a port in use, an engine that did not start.
    """
    startup.check_model_folder(str(model_path))
    with startup.record_faults() as fault_file:
        fast = startup.prepare()
        try:
            startup.check_tiers()
            server_args = read_flags(model_path, words, keys)
            _launch(server_args, fast=fast, attach=attach, limits=limits, on_ready=on_ready)
        except RagPipelineError:
            raise
        except (Exception, SystemExit) as error:
            raise EngineError(startup.fault_reason(fault_file, error, str(model_path))) from error
        finally:
            _end_children()


def _launch(
    server_args: Any,
    *,
    fast: bool,
    attach: Callable[[Any, ServedEngine, ServerFacts], Any],
    limits: HttpLimits,
    on_ready: Callable[[ServerFacts], None],
) -> None:
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.engine import Engine

    engine = ServedEngine(incremental=bool(server_args.incremental_streaming_output))
    facts = ServerFacts(
        host=str(server_args.host),
        port=int(server_args.port),
        model_name=str(server_args.served_model_name or Path(server_args.model_path).name),
        closed=http_access.closed_routes(server_args),
    )
    _register(http_server.app, attach(http_server.app, engine, facts), limits)

    def ready() -> None:
        # In SGLang's warm-up thread, which would lose an error and let the server go on.
        try:
            if not plugin_is_off() and startup.plugin_allowed():
                _verify(engine)
            on_ready(facts)
        except RagPipelineError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()
            _end_children()
            os._exit(1)

    schedule = Engine.run_scheduler_process_func
    if not (plugin_is_off() or accelerator_present()):
        schedule = functools.partial(_give_way, schedule)
    with startup.no_process_kill({}) as extra:
        for name, value in extra.items():
            setattr(server_args, name, value)
        http_server.launch_server(
            server_args,
            run_scheduler_process_func=startup.wrap_child(schedule, fast=fast),
            run_detokenizer_process_func=startup.wrap_child(
                Engine.run_detokenizer_process_func, fast=fast
            ),
            launch_callback=ready,
        )


def _give_way(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a process's entry function behind the HTTP process; threads that it starts inherit it."""
    with contextlib.suppress(OSError):  # a container that forbids it
        os.nice(ENGINE_NICE)
    return function(*args, **kwargs)


def _register(app: Any, guard: Any, limits: HttpLimits) -> None:
    """Hook what SGLang does with the app, its keys and signals; a hook that is not there is no server."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    def configure(config: Any, served: Any, *args: Any, **options: Any) -> Any:
        if served is not app:
            return None
        options |= {
            "http": limited_protocol(limits),
            "timeout_graceful_shutdown": int(limits.stop_s),
        }
        return (config, guard, *args), options

    stop = GracefulStop(
        guard,
        limit_s=limits.stop_s,
        last_resort=_end_now,
        end_background=guard.end_background,
    )
    hooks: list[tuple[HookTarget, Callable[..., Any]]] = [
        (
            HookTarget(
                path=_CONFIG,
                kind="before",
                why="the guard is around the whole app, and SGLang passes uvicorn no limits",
                params=("app", "http", "timeout_graceful_shutdown"),
            ),
            configure,
        ),
        (
            HookTarget(
                path=f"{_HANDLERS}.sigterm_handler",
                kind="around",
                why="SGLang drains without a limit and goes on accepting",
            ),
            handle_sigterm(stop),
        ),
        (
            HookTarget(
                path=f"{_HANDLERS}.__init__",
                kind="after",
                why="SGLang has no handler of Ctrl-C; its engine would be killed with what it has not written",
                params=("tokenizer_manager",),
            ),
            handle_sigint(functools.partial(_end_now, _INTERRUPTED)),
        ),
    ]
    rows = [*http_access.register(), *(row for row, _ in hooks)]
    verify_targets(rows)
    add_hooks(hooks)
    HookRegistry.apply_hooks()
    rows += chat_memory.registered
    missing = [row.path for row in rows if row.path not in HookRegistry._patched]
    if missing:
        raise EngineError(f"SGLang did not take the hook on {', '.join(missing)}; its log says why")


def _end_now(code: int = 1) -> None:
    """End this process when its shutdown hangs, or nobody wants to wait for it."""
    try:
        _end_children()
    finally:
        os._exit(code)


def _verify(engine: ServedEngine) -> None:
    """Refuse a server whose scheduler the plugin is not active in; runs in SGLang's warm-up thread."""
    loop = engine._manager.event_loop
    try:
        info = asyncio.run_coroutine_threadsafe(engine.state(), loop).result()
        facts = activation_in(info)
        fault = "" if facts.active and not facts.unapplied else "the plugin is not active in it"
    except EngineError as error:
        fault = str(error)
    if fault:
        raise EngineError(
            f"the engine started, but {fault}; reinstall rag-pipeline and sglang together, or "
            "set RAG_PIPELINE_PLUGIN=off to run stock SGLang"
        )


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
    startup.stop_children()

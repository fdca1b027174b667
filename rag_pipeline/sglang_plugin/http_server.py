"""SGLang's own HTTP server, started with this project's routes in its own app.

No second server and no second process: the routes use the tokenizer manager that SGLang's routes use.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin import launch_hooks, startup
from rag_pipeline.sglang_plugin.http_access import AccessRules
from rag_pipeline.sglang_plugin.served_engine import ServedEngine, activation_in

__all__ = ["ServerFacts", "run_http_server"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerFacts:
    """What the flags came to: where the server listens, and what guards it."""

    host: str
    port: int
    has_api_key: bool
    model_name: str


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

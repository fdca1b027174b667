"""Start a real SGLang engine: fast where that is safe, verified always, one line when it fails."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chunk_cache import TIERS, check_remote
from rag_pipeline.config import VERBOSE_VARIABLE
from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.launch import fork_server, launch_hooks
from rag_pipeline.sglang_plugin.launch.fault_report import FAULT_FILE, run_and_report
from rag_pipeline.sglang_plugin.launch.noise import lock_bars_by_thread
from rag_pipeline.sglang_plugin.launch.orderly_stop import end_schedulers
from rag_pipeline.sglang_plugin.off_switch import plugin_is_off

if TYPE_CHECKING:
    import sglang

__all__ = [
    "CPU_DEFAULTS",
    "check_model_folder",
    "check_port",
    "check_tiers",
    "cpu_defaults",
    "create_engine",
    "fault_reason",
    "log_level",
    "no_process_kill",
    "plugin_allowed",
    "prepare",
    "record_faults",
    "stop_children",
    "wrap_child",
]

CPU_DEFAULTS: dict[str, Any] = {
    "attention_backend": "rag_cpu",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "max_total_tokens": 16384,
    "sleep_on_idle": True,
    # One forward of a long prompt may take minutes on few or busy cores; SGLang would call 300 s a hang
    # and end the engine.
    "watchdog_timeout": 3600.0,
}
"""What :func:`create_engine` fills in on the CPU platform where the caller says nothing. SGLang's own
``max_total_tokens`` would take most of the memory of the machine for KV, and its idle scheduler would
keep a whole core busy polling."""


def prepare() -> bool:
    """Apply the start-up cuts to this process. Call before SGLang is imported, or gain less.

    Returns
    -------
    bool
        Whether a fork server is used. False with ``RAG_PIPELINE_FAST_START=off``,
        ``RAG_PIPELINE_PLUGIN=off``, where an accelerator may be, or off Linux.
    """
    wanted = not plugin_is_off() and fork_server.fast_start_wanted()
    if wanted:
        # FlashInfer has no CPU kernels; SGLang imports it wherever it is installed.
        os.environ.setdefault("SGLANG_IS_FLASHINFER_AVAILABLE", "false")
        # OpenMP's waiting threads spin by default. With more runnable threads than cores each step
        # then waits for a thread that is not running.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        fork_server.start()
    launch_hooks.use_fork_server(wanted)
    lock_bars_by_thread()
    return wanted


def cpu_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return ``given`` with the CPU defaults under it, if this project's CPU platform is active."""
    from sglang.srt.platforms import current_platform

    from rag_pipeline.sglang_plugin.cpu.platform import RagCpuPlatform

    if not isinstance(current_platform, RagCpuPlatform):
        return given
    return {**CPU_DEFAULTS, "log_level": log_level(), **given}


def log_level() -> str:
    """How much SGLang says: errors, or all with ``--verbose``."""
    return "info" if os.environ.get(VERBOSE_VARIABLE) == "1" else "error"


def create_engine(model_path: str, **server_args: Any) -> sglang.Engine:
    """Start an in-process SGLang engine and prove that the plugin is active in it.

    Parameters
    ----------
    model_path : str
        Folder with a model in Hugging Face format.
    **server_args : object
        Any of SGLang's server arguments; they win over :data:`CPU_DEFAULTS`.

    Returns
    -------
    sglang.Engine
        Running; call its ``shutdown()``.

    Raises
    ------
    EngineError
        One line: the folder is missing, an argument is unknown, a port is in use, or the engine or
        the plugin did not start, with the scheduler's own reason.
    """
    check_model_folder(model_path)
    check_port(server_args)
    terminate = signal.getsignal(signal.SIGTERM)
    with record_faults() as fault_file:
        fast = prepare()
        try:
            import sglang.srt.plugins
            from sglang.srt.server_args import ServerArgs

            check_tiers()
            sglang.srt.plugins.load_plugins()
            launch_hooks.ensure_applied()
            arguments = cpu_defaults(server_args)
            _check_names(ServerArgs, arguments)
            arguments.setdefault("log_level", log_level())
            with no_process_kill(arguments) as arguments:
                engine = _engine_class(fast)(model_path=model_path, **arguments)
        except EngineError:
            raise
        except (Exception, SystemExit) as error:
            stop_children()
            raise EngineError(fault_reason(fault_file, error, model_path)) from error
    _verify(engine)
    _keep_handler(terminate)
    return engine


def _keep_handler(terminate: Any) -> None:
    """Give SIGTERM back to a caller that handles it.

    SGLang's handler leaves a note for a loop that runs only while a call waits for an answer, so the
    process would not end. A caller without a handler keeps SGLang's, which ends the children too.
    """
    if callable(terminate) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)


def _engine_class(fast: bool) -> Callable[..., Any]:
    from sglang.srt.entrypoints.engine import Engine

    config = FusionConfig.from_env()
    has_tiers = bool(config.store_dir or config.remote) and not plugin_is_off()

    class ReportingEngine(Engine):  # type: ignore[misc]
        """Stock engine; its scheduler leaves a note when it fails, and writes what waits for its tiers when it ends."""

        run_scheduler_process_func = staticmethod(
            wrap_child(Engine.run_scheduler_process_func, fast=fast)
        )
        run_detokenizer_process_func = staticmethod(
            wrap_child(Engine.run_detokenizer_process_func, fast=fast)
        )

        def shutdown(self) -> None:
            if has_tiers:
                end_schedulers(self)
            super().shutdown()

    return ReportingEngine


def wrap_child(function: Callable[..., Any], *, fast: bool) -> Callable[..., Any]:
    """Entry function of a child process that leaves a note when it fails; picklable for the fork server if `fast`."""
    reporting = functools.partial(run_and_report, function)
    return fork_server.WithEnvironment(reporting) if fast else reporting


def _verify(engine: Any) -> None:
    """Raise unless the scheduler says that every hook of the table is in place."""
    from rag_pipeline.sglang_plugin.activation import activation_of

    if plugin_is_off() or not plugin_allowed():
        return
    facts = activation_of(engine)
    if not facts.active or facts.unapplied:
        engine.shutdown()
        fault = f"without {', '.join(facts.unapplied)}" if facts.active else "without the plugin"
        raise EngineError(
            f"the engine started {fault}; reinstall rag-pipeline and sglang together, or set "
            "RAG_PIPELINE_PLUGIN=off to run stock SGLang."
        )


def plugin_allowed() -> bool:
    """Whether SGLang's own white list leaves this plugin in."""
    names = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    return not names or "rag_pipeline" in names


def check_model_folder(model_path: str) -> None:
    """Raise :class:`.EngineError` unless the folder has a ``config.json`` that can be read."""
    config = Path(model_path) / "config.json"
    if not config.is_file():
        raise EngineError(
            f"no model at {model_path!r} ({config.name} not found); give a folder in Hugging Face "
            "format, or a name that rag_pipeline.models.resolve_llm knows."
        )
    try:
        json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{config} cannot be read ({error}); download the model again."
        ) from error


def check_tiers() -> None:
    """Raise :class:`.EngineError` where a tier below memory cannot work here, whoever answers.

    The engine would say so in its log, after a minute, and serve without it. After :func:`prepare`: a storage backend is
    SGLang's, which is imported for it.
    """
    config = FusionConfig.from_env()
    if plugin_is_off() or not config.enabled:
        return
    try:
        if config.store_dir:
            TIERS.get(config.tier).check_usable(config.store_dir)
        if config.remote:
            check_remote(config.remote)
    except ValueError as error:
        raise EngineError(f"a tier of chunk KV cannot be used: {error}") from None
    except OSError:  # a disk that fails now may not later: the engine tries, and says so
        return


def check_port(server_args: dict[str, Any]) -> None:
    """Raise :class:`.EngineError` where the arguments name a port that cannot be bound."""
    port = server_args.get("port")
    if port is None:
        return
    host = str(server_args.get("host", "127.0.0.1"))
    try:
        with socket.create_server((host, int(port))):
            return
    except (OSError, OverflowError, ValueError, TypeError) as error:
        raise EngineError(
            f"port {port} on {host} cannot be used ({error}); choose another port."
        ) from error


def _check_names(server_args_class: Any, arguments: dict[str, Any]) -> None:
    known = set(getattr(server_args_class, "__struct_fields__", ()) or ()) or set(
        getattr(server_args_class, "__dataclass_fields__", ())
    )
    unknown = sorted(set(arguments) - known) if known else []
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise EngineError(f"SGLang has no server argument {', '.join(unknown)}{hint}")


@contextmanager
def record_faults() -> Iterator[Path]:
    """A file in which a dying scheduler leaves its reason."""
    with tempfile.TemporaryDirectory(prefix="rag-pipeline-") as folder:
        path = Path(folder) / "fault"
        before = os.environ.get(FAULT_FILE)
        os.environ[FAULT_FILE] = str(path)
        try:
            yield path
        finally:
            if before is None:
                os.environ.pop(FAULT_FILE, None)
            else:
                os.environ[FAULT_FILE] = before


_launching = False


def _on_child_failure(signum: int, frame: Any) -> None:
    """A scheduler failed: while starting, raise; later, do what SGLang does (end the process tree)."""
    if _launching:
        raise RuntimeError("a scheduler process failed while starting")
    from sglang.srt.utils import kill_process_tree

    kill_process_tree(os.getpid())


@contextmanager
def no_process_kill(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """While starting, a failing scheduler raises here instead of killing the caller's process."""
    global _launching
    # Outside the main thread SGLang registers no handler, and Python would refuse one.
    in_main = threading.current_thread() is threading.main_thread()
    if "custom_sigquit_handler" in arguments or not in_main:
        yield arguments
        return
    _launching = True
    before = signal.getsignal(signal.SIGQUIT)
    try:
        yield {**arguments, "custom_sigquit_handler": _on_child_failure}
    except BaseException:
        if signal.getsignal(signal.SIGQUIT) is _on_child_failure:
            signal.signal(signal.SIGQUIT, before)
        raise
    finally:
        _launching = False


def stop_children() -> None:
    """End the engine's processes after a failed start."""
    for process in multiprocessing.active_children():
        if process.name != "ForkServer":
            process.kill()
            process.join(timeout=5)


def fault_reason(fault_file: Path, error: BaseException, model_path: str) -> str:
    """One line on why the start failed: the scheduler's note, or else the error's first line."""
    try:
        text = fault_file.read_text().splitlines()[0]
    except (OSError, IndexError):
        code = error.code if isinstance(error, SystemExit) else None
        lines = str(error if code is None else code).strip().splitlines()
        text = lines[0] if lines else repr(error)
    return f"SGLang did not start with {model_path!r}: {text}"

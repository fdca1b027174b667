"""What the running engine says about itself, told by its scheduler process.

The parent process cannot prove anything: the hooks run in the scheduler. So a hook on SGLang's own
"internal state" request adds a block there, and :func:`activation_of` reads it from an in-process
engine or from a server's ``/server_info``.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from rag_pipeline.errors import EngineError
from rag_pipeline.protocol import FUSION_KEY
from rag_pipeline.sglang_plugin.hook_table import (
    HookTarget,
    PluginRefused,
    add_hooks,
    hooked_targets,
    unapplied_targets,
)

__all__ = ["ACTIVATION_KEY", "Activation", "activation_of", "register"]

ACTIVATION_KEY = "rag_pipeline"
"""Where the block stands in each of SGLang's ``internal_states``."""

_STATE = (
    "sglang.srt.managers.scheduler_components.internal_state."
    "SchedulerInternalStateController.get_internal_state"
)
_SCHEDULER_INIT = "sglang.srt.managers.scheduler.Scheduler.__init__"


@dataclass(frozen=True, kw_only=True, slots=True)
class Activation:
    """Facts about a running engine.

    Parameters
    ----------
    active : bool
        Whether the plugin runs in the scheduler. When False, everything that only the plugin can
        know is empty.
    platform, device_name : str
        Class of SGLang's platform object, and its name.
    attention_backend, attention_class : str
        Name the engine resolved, and class of the object that computes.
    hooks : tuple of str
        Dotted paths that are hooked in the scheduler process.
    unapplied : tuple of str
        Paths that should be hooked and are not; empty in a healthy engine.
    plugin_version, sglang_version, torch_version : str
        As installed where the scheduler runs.
    scheduler_pid : int
        Process that answered.
    threads : int
        torch threads of the scheduler.
    num_schedulers : int
        How many scheduler processes answered (data-parallel replicas).
    fusion_on : bool
        Whether requests may be fused in all of them.
    fusion_off_reason : str
        Why not; empty where it is on.
    self_check : str
        What fusion's self-check at start found: ``passed: ...`` with the errors measured, ``failed:
        ...``, or ``not run``.
    """

    active: bool
    platform: str = ""
    device_name: str = ""
    attention_backend: str = ""
    attention_class: str = ""
    hooks: tuple[str, ...] = ()
    unapplied: tuple[str, ...] = ()
    plugin_version: str = ""
    sglang_version: str = ""
    torch_version: str = ""
    scheduler_pid: int = 0
    threads: int = 0
    num_schedulers: int = 0
    fusion_on: bool = False
    fusion_off_reason: str = ""
    self_check: str = "not run"

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON types."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def scheduler_block(scheduler: Any) -> dict[str, Any]:
    """Describe the calling scheduler process, as JSON types."""
    from importlib.metadata import version

    import torch
    from sglang.srt.platforms import current_platform

    backend = scheduler.tp_worker.model_runner.attn_backend
    missing = unapplied_targets()
    return {
        "active": True,
        "platform": f"{type(current_platform).__module__}.{type(current_platform).__qualname__}",
        "device_name": current_platform.device_name,
        "attention_class": f"{type(backend).__module__}.{type(backend).__qualname__}",
        "hooks": sorted({row.path for row in hooked_targets() if row.path not in missing}),
        "unapplied": missing,
        "plugin_version": version("rag-pipeline"),
        "sglang_version": version("sglang"),
        "torch_version": torch.__version__,
        "scheduler_pid": os.getpid(),
        "threads": torch.get_num_threads(),
    }


def _add_block(result: Any, controller: Any, *args: Any, **kwargs: Any) -> Any:
    result.internal_state[ACTIVATION_KEY] = scheduler_block(controller.scheduler)
    return result


def _refuse_half_active(*args: Any, **kwargs: Any) -> None:
    """Stop the scheduler before it loads a model if SGLang could not apply a hook."""
    missing = unapplied_targets()
    if missing:
        raise PluginRefused(
            f"SGLang did not apply rag-pipeline's hook(s) on {', '.join(missing)}; the log above "
            "has the reason. Run without the plugin (RAG_PIPELINE_PLUGIN=off) or report it."
        )


def register() -> None:
    """Add this module's hooks; called by the plugin's entry point."""
    add_hooks(
        [
            (
                HookTarget(
                    path=_STATE,
                    kind="after",
                    why="the scheduler reports platform, backend, hooks and versions",
                    params=("recv_req",),
                ),
                _add_block,
            ),
            (
                HookTarget(
                    path=_SCHEDULER_INIT,
                    kind="before",
                    why="refuse to start when a hook was not applied",
                    params=("server_args", "port_args"),
                ),
                _refuse_half_active,
            ),
        ]
    )


def activation_of(engine: Any, *, timeout_s: float = 30.0) -> Activation:
    """Ask a running engine what it is.

    Parameters
    ----------
    engine : object
        An ``sglang.Engine`` of this process, or the base URL of a server (``http://host:port``).
    timeout_s : float
        For a URL: how long to wait.

    Returns
    -------
    Activation
        ``active=False`` when the engine runs without this plugin.

    Raises
    ------
    EngineError
        When the server cannot be reached or does not answer like SGLang.
    """
    is_url = isinstance(engine, str)
    info = _server_info(engine, timeout_s) if is_url else engine.get_server_info()
    states = info.get("internal_states")
    if not isinstance(states, list) or not states:
        raise EngineError(
            f"{engine!r} does not answer like SGLang: no internal_states in its info."
        )
    blocks = [state.get(ACTIVATION_KEY) for state in states]
    name = str(states[0].get("attention_backend") or "")
    if any(block is None for block in blocks):
        return Activation(
            active=False,
            attention_backend=name,
            sglang_version=str(info.get("version", "")),
            num_schedulers=len(states),
        )
    first = dict(blocks[0])
    first["unapplied"] = tuple(sorted({path for block in blocks for path in block["unapplied"]}))
    first["hooks"] = tuple(first["hooks"])
    return Activation(
        **first, **_fusion_facts(states), attention_backend=name, num_schedulers=len(states)
    )


def _fusion_facts(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What fusion says of itself; the first scheduler where it is off speaks for all."""
    blocks = [state[FUSION_KEY] for state in states if state.get(FUSION_KEY)]
    if len(blocks) < len(states):
        # Its hooks are registered only where it is switched on.
        return {"fusion_on": False, "fusion_off_reason": "switched off by configuration"}
    block = next((b for b in blocks if not b["on"]), blocks[0])
    return {
        "fusion_on": bool(block["on"]),
        "fusion_off_reason": str(block["off_reason"]),
        "self_check": str(block["self_check"]),
    }


def _server_info(url: str, timeout_s: float) -> dict[str, Any]:
    import httpx

    address = url.rstrip("/")
    try:
        answer = httpx.get(f"{address}/server_info", timeout=timeout_s)
        answer.raise_for_status()
        info = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise EngineError(
            f"no SGLang server answers at {address}/server_info ({type(error).__name__}: {error}); "
            "start one with 'rag-pipeline serve', or correct the URL."
        ) from error
    if not isinstance(info, dict):
        raise EngineError(f"{address}/server_info does not answer like SGLang: no JSON object.")
    return info

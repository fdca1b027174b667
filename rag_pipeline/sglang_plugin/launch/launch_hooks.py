"""Hooks of the launching process: fork server instead of spawn, when :mod:`.startup` prepared one."""

from __future__ import annotations

import multiprocessing
from typing import Any

from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_hooks

__all__ = ["ensure_applied", "register", "use_fork_server"]

_SET_ENVS = "sglang.srt.entrypoints.engine._set_envs_and_config"
_wanted = False


def use_fork_server(wanted: bool) -> None:
    """Say whether the next engine of this process starts its children from a fork server."""
    global _wanted
    _wanted = wanted


def _set_start_method(result: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang has just forced ``spawn``; its children start from the fork server if there is one."""
    if _wanted:
        multiprocessing.set_start_method("forkserver", force=True)


def register() -> None:
    """Register the hook, in the process that prepared a fork server only."""
    if not _wanted:
        return
    add_hooks(
        [
            (
                HookTarget(
                    path=_SET_ENVS,
                    kind="after",
                    why="children share one import instead of importing SGLang each",
                    params=("server_args",),
                ),
                _set_start_method,
            )
        ]
    )


def ensure_applied() -> None:
    """Apply the hook now if SGLang loaded its plugins before a fork server was prepared."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    if _wanted and _SET_ENVS not in HookRegistry._patched:
        if _SET_ENVS not in HookRegistry._hooks:
            register()
        HookRegistry.apply_hooks()

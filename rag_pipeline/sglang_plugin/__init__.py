"""Everything that touches SGLang's internals; unmodified SGLang finds it through two entry points.

``sglang.srt.platforms: rag_cpu`` is :func:`activate_platform`, ``sglang.srt.plugins: rag_pipeline``
is :func:`register`. SGLang calls both in every process it starts, so nothing heavy is imported here.

``RAG_PIPELINE_PLUGIN=off`` switches both off: the engine is then stock SGLang.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rag_pipeline.lazy import lazy_names
from rag_pipeline.sglang_plugin.off_switch import OFF_SWITCH, plugin_is_off

if TYPE_CHECKING:
    from rag_pipeline.sglang_plugin.activation import Activation, activation_of
    from rag_pipeline.sglang_plugin.fusion.config import CONFIG_VARIABLE as FUSION_VARIABLE
    from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
    from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_targets, verify_targets
    from rag_pipeline.sglang_plugin.launch.startup import create_engine

__all__ = [
    "FUSION_VARIABLE",
    "OFF_SWITCH",
    "Activation",
    "FusionConfig",
    "HookTarget",
    "activate_platform",
    "activation_of",
    "add_targets",
    "create_engine",
    "plugin_is_off",
    "register",
    "verify_targets",
]

_HOMES = {
    "FUSION_VARIABLE": "fusion.config:CONFIG_VARIABLE",
    "Activation": "activation",
    "activation_of": "activation",
    "FusionConfig": "fusion.config",
    "HookTarget": "hook_table",
    "add_targets": "hook_table",
    "verify_targets": "hook_table",
    "create_engine": "launch.startup",
}


def activate_platform() -> str | None:
    """Entry point ``sglang.srt.platforms``: name the CPU platform, or decline.

    Returns
    -------
    str or None
        ``module:class`` of the platform where there is no accelerator and
        ``SGLANG_USE_CPU_ENGINE`` is not set; otherwise None, and SGLang picks its own.
    """
    if plugin_is_off():
        return None
    from rag_pipeline.sglang_plugin.cpu.detect import accelerator_present

    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or accelerator_present():
        return None
    from rag_pipeline.sglang_plugin.launch import noise

    # SGLang asks for its platform before it imports the modules that warn.
    noise.install()
    return "rag_pipeline.sglang_plugin.cpu.platform:RagCpuPlatform"


def register() -> None:
    """Entry point ``sglang.srt.plugins``: register this project's hooks in the calling process.

    Raises
    ------
    SystemExit
        When a hook target is gone from the installed SGLang. See :mod:`.hook_table` for why this
        is not an ``Exception``.
    """
    if plugin_is_off():
        return
    from rag_pipeline.sglang_plugin.hook_table import fail_hard, verify_targets

    with fail_hard():
        from rag_pipeline.sglang_plugin import activation, fusion, integrity, request_check
        from rag_pipeline.sglang_plugin.http import chat_window
        from rag_pipeline.sglang_plugin.launch import launch_hooks, noise
        from rag_pipeline.sglang_plugin.tpla import loading as tpla

        noise.hide_bars()
        activation.register()
        launch_hooks.register()
        fusion.register()
        integrity.register()
        request_check.register()
        chat_window.register()
        tpla.register()
        verify_targets()


__getattr__, __dir__ = lazy_names(__name__, _HOMES)

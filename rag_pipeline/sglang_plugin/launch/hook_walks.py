"""Hooks of methods without SGLang's walk over all modules, which is most of the time that hooks take.

Once a callable is hooked, SGLang looks through every name of every loaded module for the copies that
``from X import Y`` has made of it: a second and more of each process's start with some thirty hooks, since
Transformers and SGLang load ten thousand modules. A method is never imported by itself but found in its class, so
for methods in this project's table the walk is left out. A test makes the walks and finds nothing.
"""

from __future__ import annotations

import functools
from typing import Any

from rag_pipeline.sglang_plugin.hook_table import hooked_targets

__all__ = ["leave_out"]


def leave_out() -> None:
    """Leave out the walks of this project's methods in this process; call before SGLang applies the hooks."""
    import sglang.srt.plugins.hook_registry as hook_registry

    walk = hook_registry._propagate_patch
    if getattr(walk, "leaves_out", None):
        return

    @functools.wraps(walk)
    def propagate(original: Any, wrapped: Any, source_module: Any) -> int:
        if isinstance(source_module, type):
            name = getattr(original, "__name__", "")
            path = f"{source_module.__module__}.{source_module.__qualname__}.{name}"
            if any(row.path == path for row in hooked_targets()):
                return 0
        found: int = walk(original, wrapped, source_module)
        return found

    propagate.leaves_out = True  # type: ignore[attr-defined]
    hook_registry._propagate_patch = propagate

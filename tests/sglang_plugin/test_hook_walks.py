"""What is left out when SGLang applies this project's hooks would have found nothing, and is done for all others."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from rag_pipeline.sglang_plugin import hook_table
from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_targets, hooked_targets
from rag_pipeline.sglang_plugin.launch import hook_walks


@pytest.fixture
def propagate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Any, Any], int]:
    """SGLang's function with ours around it."""
    from sglang.srt.plugins import hook_registry

    plain = getattr(hook_registry._propagate_patch, "__wrapped__", hook_registry._propagate_patch)
    monkeypatch.setattr(hook_registry, "_propagate_patch", plain)
    hook_walks.leave_out()
    once = hook_registry._propagate_patch
    hook_walks.leave_out()
    assert hook_registry._propagate_patch is once
    assert once is not plain
    return once


def test_no_loaded_module_holds_a_method_that_is_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler  # noqa: F401
    from sglang.srt.plugins import hook_registry
    from sglang.srt.plugins.hook_registry import HookRegistry

    import rag_pipeline.sglang_plugin as plugin
    from rag_pipeline.sglang_plugin.http import access

    monkeypatch.setattr(HookRegistry, "register", lambda *args: None)
    monkeypatch.setattr(hook_registry, "_propagate_patch", hook_registry._propagate_patch)
    monkeypatch.setattr(hook_table, "_TARGETS", {})
    plugin.register()
    access.register()
    methods = {}
    for row in hooked_targets():
        holder, _, name = row.path.rpartition(".")
        owner = pkgutil.resolve_name(holder)
        if isinstance(owner, type):
            assert row.path == f"{owner.__module__}.{owner.__qualname__}.{name}"
            method = getattr(owner, name)
            methods[id(getattr(method, "__wrapped__", method))] = row.path
            methods[id(method)] = row.path
    assert len(methods) > 20
    held = [
        f"{module.__name__}.{name} is {methods[id(value)]}"
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, value in list(vars(module).items())
        if id(value) in methods
    ]
    assert held == []


class Held:
    def ours(self) -> int:
        return 1

    def theirs(self) -> int:
        return 2


def other() -> int:
    return 3


def test_only_methods_of_the_table_are_left_out(
    propagate: Callable[[Any, Any, Any], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[Any, HookTarget] = {}
    monkeypatch.setattr("rag_pipeline.sglang_plugin.hook_table._TARGETS", rows)
    for path in (f"{__name__}.Held.ours", f"{__name__}.other"):
        add_targets([HookTarget(path=path, kind="after", why="a test")])
    module = ModuleType("holds_copies")
    copies = {"ours": Held.ours, "theirs": Held.theirs, "other": other}
    vars(module).update(copies)
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def new() -> int:
        return 4

    assert propagate(Held.ours, new, Held) == 0
    assert module.ours is Held.ours
    # Another plugin's method, and a function: as SGLang does it.
    assert propagate(Held.theirs, new, Held) == 1
    assert module.theirs is new
    assert propagate(other, new, ModuleType("elsewhere")) >= 1
    assert module.other is new

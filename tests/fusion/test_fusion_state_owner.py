"""The fields of a request's state have one writer: its own methods."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rag_pipeline.sglang_plugin
from chunk_cache.policies import create_policy
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.request.awaited import Awaited
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.request.state_view import StateView

PLUGIN = Path(rag_pipeline.sglang_plugin.__file__).parent
OWNERS = {
    PLUGIN / "fusion" / "request" / name for name in ("state.py", "state_view.py", "awaited.py")
}
PARTS = (RequestState, StateView, Awaited)
FIELDS = {name.removeprefix("_") for part in PARTS for name in part.__slots__} | {
    name for part in PARTS for name, value in vars(part).items() if isinstance(value, property)
}
MUTATORS = frozenset(
    [
        "append",
        "clear",
        "discard",
        "extend",
        "insert",
        "pop",
        "popitem",
        "remove",
        "reverse",
        "setdefault",
        "sort",
        "update",
    ]
)


def states(function: ast.AST) -> set[str]:
    """Names of a function that hold a request's state: by annotation, by what they are made of, or by their own name."""
    names = {"state"}
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and node.annotation is not None:
            if "RequestState" in ast.unparse(node.annotation):
                names.add(node.arg)
        elif isinstance(node, ast.Assign | ast.NamedExpr | ast.AnnAssign) and node.value:
            value = node.value
            made = isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2]
            if made in ("RequestState", "state_of") or ast.unparse(value).endswith(".state"):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def is_of_state(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is a field of a state, or something below one: ``x.state.report.fallback``."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        base = node.value
        if isinstance(node, ast.Attribute) and node.attr.removeprefix("_") in FIELDS:
            holds = isinstance(base, ast.Name) and base.id in names
            if holds or (isinstance(base, ast.Attribute) and base.attr == "state"):
                return True
        node = base
    return False


def writes(source: str) -> Iterator[str]:
    """Lines of a module that write to a field of a request's state."""
    tree = ast.parse(source)
    names = states(tree)
    for node in ast.walk(tree):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            targets = [node]
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in MUTATORS:
                targets = [called.value]
        if any(is_of_state(target, names) for target in targets):
            yield f"{node.lineno}: {ast.unparse(node)}"


def test_nothing_but_the_state_writes_its_fields():
    files = [path for path in sorted(PLUGIN.rglob("*.py")) if path not in OWNERS]
    assert len(files) > 40
    found = [
        f"{path.relative_to(PLUGIN)}:{line}"
        for path in files
        for line in writes(path.read_text("utf-8"))
    ]
    assert not found, f"write through a method of RequestState: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "state.row_layers += 3",
        "item.entry.state.row_layers += 3",
        "state.turns_end, state.turn = 3, 4",
        "state.spans.append(3)",
        "state.report.fallback = 'x'",
        "state.recomputed[3] = 4",
        "state.fetches = ()",
        "del entry.state.spans",
        "def f(one: RequestState | None):\n    one.epoch = 3",
        "found = state_of(req)\nfound.captures.remove(3)",
        "one = entry.state\none._attempt.epoch = 3",
    ],
)
def test_a_write_is_seen(source):
    assert list(writes(source))


@pytest.mark.parametrize(
    "source",
    ["print(state.row_layers)", "state.give_up('x')", "state.other = 3", "report.fallback = 'x'"],
)
def test_what_is_no_write_is_left_alone(source):
    assert not list(writes(source))


def test_a_field_cannot_be_assigned_at_all():
    state = RequestState(FusionRequest(), create_policy("reuse"), [1, 2, 3])
    with pytest.raises(AttributeError):
        state.row_layers = 3.0
    state.charge(2, 1.5)
    assert state.row_layers == 3.0

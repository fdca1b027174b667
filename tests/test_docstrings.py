"""Docstrings in NumPy's style: each entry of a Parameters or Attributes section names its type.

ruff holds the rest of the style (rules D): sections, underlines, and that every parameter is there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rag_pipeline", "chunk_cache", "kernels/rag_kernels", "retrievers", "eval/rag_eval")
SECTIONS = ("Parameters", "Other Parameters", "Attributes")
OTHER_STYLES = re.compile(r"^\s*(?:(?:Args|Arguments|Returns|Raises|Yields):\s*$|:param |:returns?:)", re.M)  # fmt: skip


def entries(docstring: str) -> Iterator[str]:
    """First lines of the entries of parameter sections."""
    lines = docstring.splitlines()
    section = ""
    for place, line in enumerate(lines):
        below = lines[place + 1].strip() if place + 1 < len(lines) else ""
        if below and set(below) == {"-"}:
            section = line.strip()
        elif section in SECTIONS and line.strip("- ") and not line.startswith(" "):
            yield line.strip()


def faults(text: str) -> list[str]:
    """Entries without a type, and signs of another style, in the source of a module."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node) or ""
        name = getattr(node, "name", "module")
        found += [
            f"{name}: {entry}"
            for entry in entries(docstring)
            if " : " not in entry and not entry.startswith("*")
        ]
        found += [f"{name}: {sign.strip()}" for sign in OTHER_STYLES.findall(docstring)]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_parameters_name_their_types(package: str) -> None:
    files = [path.relative_to(ROOT) for path in sorted((ROOT / package).rglob("*.py"))]
    wrong = [
        f"{path}: {fault}" for path in files for fault in faults((ROOT / path).read_text("utf-8"))
    ]
    assert wrong == []


def test_another_style_would_be_noticed() -> None:
    untyped = '"""Do.\n\nParameters\n----------\nname\n    Which.\nsize : int\n    How large.\n"""'
    assert faults(untyped) == ["module: name"]
    assert faults('"""Do.\n\nArgs:\n    name: Which.\n"""') == ["module: Args:"]
    assert faults('"""Do.\n\n:param name: Which.\n"""') == ["module: :param"]

"""ARCHITECTURE.md lists every folder, docs/modules.md every module, by the first line of its docstring.

``python tests/test_architecture.py`` writes both lists anew.
"""

from __future__ import annotations

import ast
import re
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "ARCHITECTURE.md"
MODULES = ROOT / "docs" / "modules.md"
START = "<!-- folders: written by `python tests/test_architecture.py` -->"
END = "<!-- end of folders -->"
ROOTS = ("rag_pipeline", "chunk_cache", "kernels/rag_kernels", "retrievers", "eval/rag_eval")
MOST_LINES = 250
HEAD = """# Modules

One line per module, by folder: the first line of its docstring. `python tests/test_architecture.py` writes
this page; do not edit it. [ARCHITECTURE.md](../ARCHITECTURE.md) has the pictures.
"""


def first_line(path: Path) -> str:
    """First line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return docstring.splitlines()[0] if docstring else ""


def folders() -> list[tuple[Path, list[Path]]]:
    """Folders with their modules, in the order of the packages."""
    files = [path for root in ROOTS for path in (ROOT / root).rglob("*.py")]
    found = groupby(sorted(files, key=_order), key=lambda path: path.parent)
    return [(folder, list(members)) for folder, members in found]


def _order(path: Path) -> tuple[int, str, str]:
    relative = path.relative_to(ROOT)
    rank = next(i for i, root in enumerate(ROOTS) if str(relative).startswith(root))
    return (rank, str(relative.parent), path.name)


def folder_lines() -> str:
    """One line per folder: what its ``__init__`` says it is for."""
    return "\n".join(
        f"- `{folder.relative_to(ROOT)}/` — {first_line(folder / '__init__.py')}"
        for folder, _ in folders()
    )


def modules_page() -> str:
    """One line per module, below its folder."""
    parts = [HEAD]
    for folder, members in folders():
        lines = [f"- `{path.name}` — {first_line(path)}" for path in members]
        parts.append("\n".join([f"**{folder.relative_to(ROOT)}/**", "", *lines, ""]))
    return "\n".join(parts)


def test_every_folder_has_its_line() -> None:
    text = DOCUMENT.read_text("utf-8")
    listed = text.split(START)[1].split(END)[0]
    assert listed.strip() == folder_lines(), "run `python tests/test_architecture.py`"


def test_every_module_has_its_line() -> None:
    assert MODULES.read_text("utf-8") == modules_page(), "run `python tests/test_architecture.py`"


def test_the_architecture_is_read_in_ten_minutes() -> None:
    assert len(DOCUMENT.read_text("utf-8").splitlines()) <= MOST_LINES


def test_files_that_the_architecture_names_exist() -> None:
    """A name with a suffix is a file; short ones stand below the plugin or its fusion."""
    plugin = ROOT / "rag_pipeline" / "sglang_plugin"
    named = re.findall(r"\b[\w/]+\.(?:py|md)\b", DOCUMENT.read_text("utf-8"))
    assert named
    for name in named:
        places = (ROOT, ROOT / "docs", plugin, plugin / "fusion")
        assert any((place / name).exists() for place in places), f"no file {name}"


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text("utf-8").partition(START)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{START}\n{folder_lines()}\n{END}{after}", "utf-8")
    MODULES.write_text(modules_page(), "utf-8")

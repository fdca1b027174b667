"""ARCHITECTURE.md lists every module with the first line of its docstring, and stays true.

``python tests/test_architecture.py`` writes the list anew.
"""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "ARCHITECTURE.md"
START = "<!-- modules: written by `python tests/test_architecture.py` -->"
END = "<!-- end of modules -->"
ROOTS = ("rag_pipeline", "chunk_cache", "kernels/rag_kernels", "retrievers", "eval/rag_eval")


def module_lines() -> str:
    """One line a module: its path below its folder and what it is for."""
    files = [path for root in ROOTS for path in sorted((ROOT / root).rglob("*.py"))]
    lines = []
    for folder, members in groupby(sorted(files, key=_order), key=lambda path: path.parent):
        lines.append(f"\n**{folder.relative_to(ROOT)}/**\n")
        for path in members:
            docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            lines.append(f"- `{path.name}` — {docstring.splitlines()[0] if docstring else ''}")
    return "\n".join(lines) + "\n"


def _order(path: Path) -> tuple[int, str, str]:
    relative = path.relative_to(ROOT)
    rank = next(i for i, root in enumerate(ROOTS) if str(relative).startswith(root))
    return (rank, str(relative.parent), path.name)


def test_every_module_has_its_line() -> None:
    text = DOCUMENT.read_text("utf-8")
    listed = text.split(START)[1].split(END)[0]
    assert listed.strip() == module_lines().strip(), "run `python tests/test_architecture.py`"


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text("utf-8").partition(START)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{START}\n{module_lines()}\n{END}{after}", "utf-8")

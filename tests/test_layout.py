"""The public surface and the import arrows, frozen: a change here is a change of contract."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "rag_pipeline": ROOT / "rag_pipeline",
    "chunk_cache": ROOT / "chunk_cache",
    "retrievers": ROOT / "retrievers",
    "rag_kernels": ROOT / "kernels" / "rag_kernels",
    "rag_eval": ROOT / "eval" / "rag_eval",
}
MAY_IMPORT = {
    "rag_kernels": set(),
    "chunk_cache": {"rag_kernels"},
    "retrievers": set(),
    "rag_pipeline": {"rag_kernels", "chunk_cache", "retrievers"},
    "rag_eval": {"rag_kernels", "chunk_cache", "retrievers", "rag_pipeline"},
}
# The command line starts evaluation commands by name; it is the one place that looks upwards.
UPWARD_DOOR = "rag_pipeline/cli/"


def imported_modules(
    source: Path, *, top_level_only: bool = False, without_annotations: bool = False
) -> set[str]:
    """Absolute module names imported by a file: anywhere, when it is imported, or anywhere but for annotations."""
    tree = ast.parse(source.read_text("utf-8"))
    nodes: list[ast.AST] = [tree]
    names: set[str] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        )
        if not (top_level_only and lazy) and not (
            (top_level_only or without_annotations) and typing_only
        ):
            nodes.extend(ast.iter_child_nodes(node))
    return names


def files_of(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def test_no_lazy_name_is_that_of_a_module_beside_it() -> None:
    """Importing the module would put it in the place of the name, depending on who imports what first."""
    lazy = 0
    for package, folder in PACKAGES.items():
        door = importlib.import_module(package)
        if not hasattr(door, "__getattr__"):
            continue
        lazy += 1
        modules = {path.stem for path in folder.iterdir() if path.name != "__init__.py"}
        taken = [name for name in door.__all__ if name in modules]
        for name in taken:
            assert inspect.ismodule(getattr(door, name)), f"{package}.{name} is a module, too"
    assert lazy >= 2


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_imports_point_one_way(package: str) -> None:
    forbidden = set(PACKAGES) - MAY_IMPORT[package] - {package}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of(package)
        for name in imported_modules(path)
        if name.split(".")[0] in forbidden
        and not str(path.relative_to(ROOT)).startswith(UPWARD_DOOR)
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["rag_pipeline", "rag_eval"])
def test_chunk_cache_is_entered_by_its_doors(package: str) -> None:
    """What others use of it stands in the ``__init__`` of a package; its modules may move."""
    root = PACKAGES["chunk_cache"]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of(package)
        for name in imported_modules(path)
        if name.split(".")[0] == "chunk_cache" and not root.joinpath(*name.split(".")[1:]).is_dir()
    ]
    assert wrong == []


def place_of(path: Path, root: Path) -> str:
    """Folder of a module below the root of its package; where the folder has folders, the module itself."""
    has_folders = any(path.parent.glob("*/__init__.py"))
    return (path if has_folders else path.parent).relative_to(root).as_posix()


def circles_of_folders(package: str) -> list[set[str]]:
    """Groups of a package's folders that reach each other by top-level imports."""
    root = PACKAGES[package]
    modules = {
        ".".join((package, *path.relative_to(root).with_suffix("").parts)): path
        for path in files_of(package)
    }
    folder = {
        name.removesuffix(".__init__"): place_of(path, root) for name, path in modules.items()
    }
    reach: dict[str, set[str]] = {place: set() for place in folder.values()}
    for path in modules.values():
        here = place_of(path, root)
        found = imported_modules(path, top_level_only=True) & folder.keys()
        reach[here] |= {folder[name] for name in found} - {here}
    for middle in reach:
        for start in reach:
            if middle in reach[start]:
                reach[start] |= reach[middle]
    circles: list[set[str]] = []
    for place in reach:
        circle = {other for other in reach[place] if place in reach[other]}
        if circle and circle not in circles:
            circles.append(circle)
    return circles


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_folders_form_no_circle(package: str) -> None:
    assert circles_of_folders(package) == []


FUSION_ORDER = (
    "request",
    "runtime",
    "builds",
    "conversations",
    "memory",
    "forward",
    "admission",
    "management",
)


def test_arrows_between_the_rooms_of_fusion_point_one_way() -> None:
    """Also those that a function draws when it runs; only annotations may name what lies above."""
    root = PACKAGES["rag_pipeline"] / "sglang_plugin" / "fusion"
    wrong = [
        f"{path.relative_to(root)} imports {name}"
        for rank, room in enumerate(FUSION_ORDER)
        for path in (root / room).glob("*.py")
        for name in imported_modules(path, without_annotations=True)
        for above in FUSION_ORDER[rank + 1 :]
        if name.startswith(f"rag_pipeline.sglang_plugin.fusion.{above}.")
    ]
    assert wrong == []


PIPELINE_ORDER = (
    {"errors", "interrupts", "lazy", "notices", "parent_death", "whole_file"},
    {"config", "protocol"},
    {"models", "types"},
    {"prompts"},
    {"conversion", "memory"},
    {"erasure"},
    {"sglang_plugin"},
    {"generation"},
    {"opened_memory"},
    {"chat_session", "question_run"},
    {"pipeline"},
    {"frontend", "langchain", "server"},
    {"cli"},
)


def test_arrows_between_the_folders_of_the_pipeline_point_one_way() -> None:
    """What is imported with a module lies in its own folder or on a lower step, and no folder is without a step."""
    root = PACKAGES["rag_pipeline"]
    step = {name: number for number, names in enumerate(PIPELINE_ORDER) for name in names}
    found: set[str] = set()
    wrong = []
    for path in files_of("rag_pipeline"):
        here = path.relative_to(root).with_suffix("").parts[0]
        if here == "__init__":
            continue
        found.add(here)
        for name in imported_modules(path, top_level_only=True):
            package, _, rest = name.partition(".")
            there = rest.partition(".")[0]
            if package == "rag_pipeline" and there != here and step[there] >= step[here]:
                wrong.append(f"{path.relative_to(root)} imports {name}")
    assert found == step.keys()
    assert wrong == []


def test_only_the_plugin_touches_sglang() -> None:
    """`rag_pipeline.sglang_plugin` owns SGLang's internals; `frontend` may use its public API."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in PACKAGES
        for path in files_of(package)
        for name in imported_modules(path)
        if name.startswith("sglang.srt")
        and PACKAGES["rag_pipeline"] / "sglang_plugin" not in path.parents
        and PACKAGES["rag_eval"] / "benchmarks" not in path.parents
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["retrievers", "chunk_cache"])
def test_no_sglang_below_the_pipeline(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of(package)
        for name in imported_modules(path)
        if name.split(".")[0] == "sglang"
    ]
    assert wrong == []


def modules_loaded_by(code: str) -> set[str]:
    """Top-level modules in ``sys.modules`` after running `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_retrievers_import_neither_torch_nor_sglang() -> None:
    loaded = modules_loaded_by("import retrievers, retrievers.types")
    assert not loaded & {"torch", "sglang", "transformers", "faiss", "sentence_transformers"}


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["ingest", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """A plain Python start-up plus typer: none of the libraries that take seconds."""
    loaded = modules_loaded_by(
        "import contextlib, io\n"
        "from rag_pipeline.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        f"    code = main({arguments!r})\n"
        "assert code == 0 and 'Usage' in out.getvalue(), (code, out.getvalue())"
    )
    heavy = {"torch", "sglang", "transformers", "faiss", "sentence_transformers", "numpy", "scipy"}
    assert not loaded & heavy


def test_hugging_face_kernels_is_not_shadowed() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "eval" / "__init__.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.__file__); kernels.get_kernel"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "site-packages" in done.stdout


def test_top_level_packages_ship_type_information() -> None:
    for package, folder in PACKAGES.items():
        assert (folder / "py.typed").is_file(), package
        assert importlib.util.find_spec(package) is not None


def test_constraints_name_no_registry() -> None:
    text = (ROOT / "constraints.txt").read_text("utf-8")
    assert "://" not in text
    assert "--index-url" not in text.replace("--no-emit-index-url", "")

"""The pages of ``docs/``: what they tell a reader to type exists, and their links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import json
import re
import shlex
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, get_args, get_origin, get_type_hints

import pytest
import typer

from rag_pipeline.cli.app import app
from rag_pipeline.config.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
ALL_PAGES = sorted((ROOT / "docs").rglob("*.md"))
"""With those below ``extending/``, whose examples have a test of their own."""
GENERATED = {"modules"}
WANTED = {
    "concepts", "configuration", "langchain", "frontend",
    "server", "evaluation", "operations", "troubleshooting", "decisions", "extending", "modules",
}  # fmt: skip
GROUP: Any = typer.main.get_command(app)
OWN_PARSERS = {
    "eval": "rag_eval.fidelity",
    "eval gate": "rag_eval.gate.command",
    "eval conversation": "rag_eval.conversation.command",
    "eval tpla": "rag_eval.tpla.command",
    "tpla calibrate": "rag_eval.tpla.calibrate_command",
    "bench ttft": "rag_eval.benchmarks.ttft",
    "bench throughput": "rag_eval.benchmarks.throughput",
    "bench store": "rag_eval.benchmarks.store",
    "bench tiers": "rag_eval.benchmarks.tiers",
    "simulate tiers": "rag_eval.simulator.command",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    body: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [
        Block(page.name, text.count("\n", 0, match.start()) + 2, match[1], match[2])
        for match in found
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language in ("", "sh")]


def commands(text: str, program: str) -> list[list[str]]:
    """Command lines of a program, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        match = re.match(rf"(?:\w+=\S+ )*{re.escape(program)} (.*)", line.strip())
        if match:
            found.append(shlex.split(match[1], comments=True))
    return found


LINES = [(block, words) for block in SHELL for words in commands(block.body, "rag-pipeline")]


def test_every_page_is_there() -> None:
    assert {page.stem for page in PAGES} >= WANTED


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_its_imports_resolve(block: Block) -> None:
    tree = ast.parse(block.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module
            assert node.level == 0
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def keywords_of(tree: ast.AST) -> list[tuple[str, set[str]]]:
    """Names called directly in a block, with the keywords they are given."""
    return [
        (node.func.id, {word.arg for word in node.keywords if word.arg})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]


def parameters_of(called: Any) -> set[str]:
    """Keywords that a call takes, those of ``**options: Unpack[Options]`` among them."""
    taken = set(inspect.signature(called).parameters)
    function = called.__init__ if inspect.isclass(called) else called
    for hint in get_type_hints(function).values():
        if get_origin(hint) is Unpack:
            taken |= set(get_type_hints(get_args(hint)[0]))
    return taken


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_keywords_of_our_own_names_exist(block: Block) -> None:
    tree = ast.parse(block.body)
    ours: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(
            ("rag_pipeline", "retrievers")
        ):
            module = importlib.import_module(str(node.module))
            ours |= {alias.name: getattr(module, alias.name) for alias in node.names}
    for name, given in keywords_of(tree):
        if name not in ours:
            continue
        known = parameters_of(ours[name])
        fields = getattr(ours[name], "model_fields", {})
        known |= set(fields) | {field.alias for field in fields.values() if field.alias}
        assert given <= known, f"{name} has no {given - known}"


def parse(words: list[str]) -> None:
    """Let the command's own parser read the words, without running the command."""
    own = next((n for n in (2, 1) if " ".join(words[:n]) in OWN_PARSERS), 0)
    if own:
        check_own_parser(" ".join(words[:own]), words[own:])
        return
    command, place = GROUP, []
    if words[0] == "--config":
        words = words[2:]
    while getattr(command, "commands", None):
        assert words[0] in command.commands, f"no command {' '.join([*place, words[0]])}"
        place.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    command.make_context(" ".join(place), list(words))


def check_own_parser(name: str, words: list[str]) -> None:
    """Each option stands in the command's help, which its own parser writes."""
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown), pytest.raises(SystemExit) as stopped:
        importlib.import_module(OWN_PARSERS[name]).main(["--help"])
    assert stopped.value.code == 0
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word)}\b", shown.getvalue()), f"{name} has no {word}"


@pytest.mark.parametrize(("block", "words"), LINES, ids=lambda value: str(value)[:60])
def test_commands_are_accepted_by_their_parser(block: Block, words: list[str]) -> None:
    parse([*words])


def test_a_wrong_option_would_be_noticed() -> None:
    for wrong in (["ask", "q", "--index", "i", "--topk", "3"], ["nope"], ["bench ttft --nope"]):
        with pytest.raises((AssertionError, typer.BadParameter.__mro__[1])):
            parse(" ".join(wrong).split())


def test_inline_commands_exist() -> None:
    """``rag-pipeline X`` in running text names a command."""
    for page in PAGES:
        for named in re.findall(r"`rag-pipeline ([a-z]+)", page.read_text("utf-8")):
            assert named in GROUP.commands, f"{page.name}: {named}"


def test_toml_blocks_are_accepted_as_settings(tmp_path: Path) -> None:
    found = [block for block in BLOCKS if block.language == "toml"]
    assert found
    for block in found:
        file = tmp_path / f"{block.line}.toml"
        file.write_text(block.body)
        tomllib.loads(block.body)
        load_settings(file, environ={})


def test_json_blocks_are_json() -> None:
    for block in (block for block in BLOCKS if block.language == "json"):
        json.loads(block.body)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [*ALL_PAGES, *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"))],
    ids=lambda page: page.name,
)  # fmt: skip
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name}: {target}"


def test_pages_are_short() -> None:
    """One page each: a reader finds the place to look, and the rest is in the docstrings."""
    for page in ALL_PAGES:
        lines = page.read_text("utf-8").splitlines()
        assert len(lines) <= 150 or page.stem in GENERATED, page.name


ALONE = [block for block in PYTHON if not re.search(r"127\.0\.0\.1|my-index", block.body)]


@pytest.mark.parametrize("block", ALONE, ids=str)
def test_python_that_needs_no_server_runs(
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.body, str(block), "exec"), {"__name__": "docs"})
    assert capsys.readouterr().out


def test_bodies_of_curl_are_what_the_routes_take() -> None:
    from rag_pipeline.server.schemas import ChatRequest, SearchRequest

    models: dict[str, Any] = {
        "/v1/rag/chat/completions": ChatRequest,
        "/v1/rag/search": SearchRequest,
    }
    seen = set()
    for block in (block for block in BLOCKS if block.language == "sh"):
        for words in commands(re.sub(r"\n\s+(?!curl)", " ", block.body), "curl"):
            (url,) = [word for word in words if word.startswith("http://127.0.0.1:30000")]
            route = url.removeprefix("http://127.0.0.1:30000")
            if "-d" in words:
                body = json.loads(words[words.index("-d") + 1])
                if route in models:
                    models[route].model_validate(body)
            seen.add(route)
    assert seen >= {*models, "/v1/rag/documents", "/v1/rag/health"}

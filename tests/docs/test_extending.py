"""The pages on extending: each example is installed as a distribution of its own, found by its name, and run."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "extending").glob("*.md"))
MOST_LINES = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A page: its table of facts, the entry points, the module, and the use of it."""

    name: str
    facts: dict[str, str]
    entry_points: dict[str, dict[str, str]]
    module: str
    source: str
    use: str


def read_page(path: Path) -> Page:
    text = path.read_text("utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    source, use = (body for language, body in blocks if language == "python")
    tables = [tomllib.loads(body) for language, body in blocks if language == "toml"]
    named = re.match(r"# (\w+)\.py\n", source)
    assert named, "the first line of the example names its file"
    return Page(
        name=path.stem,
        facts=dict(re.findall(r"^\| ([\w -]+) \| `?([^`|]+?)`? \|$", text, flags=re.MULTILINE)),
        entry_points=tables[0]["project"]["entry-points"] if tables else {},
        module=named[1],
        source=source,
        use=use,
    )


ALL = [read_page(path) for path in PAGES]


def found(place: str) -> Any:
    """What ``package.module:name`` stands for."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def is_there(page: Page) -> bool:
    places = [page.facts[key] for key in ("contract", "registry", "needs") if key in page.facts]
    try:
        for place in places:
            found(place)
    except (ImportError, AttributeError):
        return False
    return True


READY = [page for page in ALL if is_there(page)]

CHECK = """
import contextlib, importlib, io, json, sys
pages = json.loads(sys.argv[1])
outcomes = {}
for page in pages:
    said = io.StringIO()
    try:
        for name, registry, contract in page["names"]:
            at = [getattr(importlib.import_module(m), n) for m, n in (registry, contract)]
            assert issubclass(at[0].get(name), at[1]), f"{name} is no {contract[1]}"
        with contextlib.redirect_stdout(said):
            exec(compile(page["use"], page["name"], "exec"), {"__name__": "use"})
        outcomes[page["name"]] = ["", said.getvalue()]
    except Exception as error:
        outcomes[page["name"]] = [f"{type(error).__name__}: {error}", said.getvalue()]
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Fault and output of each page: one fresh process with all examples installed, as by pip."""
    site = tmp_path_factory.mktemp("site")
    info = site / "examples_of_the_docs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: examples-of-the-docs\nVersion: 1\n"
    )
    groups = configparser.ConfigParser(delimiters=("=",))
    tasks = []
    for page in READY:
        (site / f"{page.module}.py").write_text(page.source, "utf-8")
        for group, names in page.entry_points.items():
            groups[group] = {**groups[group], **names} if group in groups else names
        registry, contract = (
            page.facts.get(key, "").split(":") for key in ("registry", "contract")
        )
        names = [name for offered in page.entry_points.values() for name in offered]
        tasks.append(
            {
                "name": page.name,
                "use": page.use,
                "names": [[name, registry, contract] for name in names],
            }
        )
    with (info / "entry_points.txt").open("w") as file:
        groups.write(file)
    paths = [site, ROOT, ROOT / "kernels", ROOT / "eval"]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, json.dumps(tasks)],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("work"),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_the_example_works_from_a_distribution_of_its_own(
    page: Page, outcomes: dict[str, list[str]]
) -> None:
    if page not in READY:
        pytest.skip(f"{page.facts} is not all there")
    fault, said = outcomes[page.name]
    assert not fault
    assert said, "the example shows nothing"


@pytest.mark.parametrize("page", READY, ids=lambda page: page.name)
def test_the_page_names_the_group_of_its_registry(page: Page) -> None:
    if "registry" not in page.facts:
        assert page.facts["entry-point group"] == "none"
        assert not page.entry_points
        return
    group = found(page.facts["registry"]).group
    assert page.facts["entry-point group"] == group
    assert list(page.entry_points) == [group]
    for value in page.entry_points[group].values():
        assert value.startswith(f"{page.module}:")


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_examples_are_short(page: Page) -> None:
    assert page.source.count("\n") < MOST_LINES


def test_the_index_lists_every_page_with_its_group() -> None:
    index = (ROOT / "docs" / "extending.md").read_text("utf-8")
    for page in READY:
        (line,) = [row for row in index.splitlines() if f"(extending/{page.name}.md)" in row]
        assert page.facts["entry-point group"] in line

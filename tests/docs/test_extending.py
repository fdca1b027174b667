"""The pages on extending: each example is installed as a distribution of its own, found by its name, and run."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from extension_pages import PAGES, Page, install, read_page

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 60


ALL = [read_page(path) for path in PAGES]


def found(place: str) -> Any:
    """What ``package.module:name`` stands for."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


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
    install(ALL, site)
    tasks = []
    for page in ALL:
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
    fault, said = outcomes[page.name]
    assert not fault
    assert said, "the example shows nothing"


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
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
    for page in ALL:
        (line,) = [row for row in index.splitlines() if f"(extending/{page.name}.md)" in row]
        assert page.facts["entry-point group"] in line

"""Files that share an engine or a server run one after the other in one process, and it ends with the last of them.

An engine takes half a minute of both cores to start and a GiB or more for as long as it lives. With
this the suite can run in several processes (``pytest-xdist --dist loadgroup``): none of them starts what
another has, and none keeps what nobody asks for any more.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

_GROUP: pytest.StashKey[str] = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every item the group of its file; groups come one after the other, the long ones first."""
    shared: dict[Path, set[str]] = {}
    starts_engine: set[Path] = set()
    for item in items:
        shared.setdefault(item.path, set()).update(_ended_with_the_session(item))
        if item.get_closest_marker("engine") is not None:
            starts_engine.add(item.path)
    groups = group(shared)

    def order(item: pytest.Item) -> tuple[bool, bool, str]:
        name = groups[item.path]
        return not shared[item.path], item.path not in starts_engine, name

    # Stable: within a group the files and their tests keep their order.
    items.sort(key=order)
    for item in items:
        item.stash[_GROUP] = groups[item.path]
        item.add_marker(pytest.mark.xdist_group(groups[item.path]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to run where pytest-xdist does not tell its scheduler the groups: an engine would start twice."""
    if getattr(session.config.option, "loadgroup", False):
        for item in session.items:
            if not item.nodeid.endswith(f"@{item.stash[_GROUP]}"):
                raise pytest.UsageError("this pytest and this pytest-xdist know no groups together")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    """End what the session's fixtures hold once the last item of a group is done."""
    done = yield
    if nextitem is not None and nextitem.stash[_GROUP] != item.stash[_GROUP]:
        # What pytest itself does at the end of a session; the next item sets up anew what it needs.
        item.session._setupstate.teardown_exact(None)
        # What its servers deleted is not to go from the engine that the next group starts: a notice
        # stays in force for minutes, and an engine without a tokenizer takes every text for meant.
        shutil.rmtree(Path(os.environ["RAG_PIPELINE_HOME"]) / "erased", ignore_errors=True)
    return done


def _ended_with_the_session(item: pytest.Item) -> Iterable[str]:
    """The suite's own fixtures of this item that live as long as the session and have something to end."""
    found = getattr(item, "_fixtureinfo", None)
    for name, definitions in (found.name2fixturedefs if found else {}).items():
        used = definitions[-1]
        if used.scope == "session" and used.baseid and inspect.isgeneratorfunction(used.func):
            yield f"{used.baseid}::{name}"


def group(shared: dict[Path, set[str]]) -> dict[Path, str]:
    """A name for every file, the same for files that something shared links, by way of others too."""
    groups: list[tuple[set[Path], set[str]]] = []
    for path, names in shared.items():
        files, linked = {path}, set(names)
        apart = []
        for other in groups:
            if other[1] & linked:
                files |= other[0]
                linked |= other[1]
            else:
                apart.append(other)
        groups = [*apart, (files, linked)]
    return {path: min(files).stem for files, _ in groups for path in files}

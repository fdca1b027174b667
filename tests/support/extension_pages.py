"""The examples of ``docs/extending``: read from their pages, and installed as one distribution of somebody else's."""

from __future__ import annotations

import configparser
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "extending").glob("*.md"))


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


def install(pages: Sequence[Page], site: Path) -> None:
    """Write the modules of the examples and the entry points that they offer, as pip lays them out."""
    info = site / "examples_of_the_docs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: examples-of-the-docs\nVersion: 1\n"
    )
    groups = configparser.ConfigParser(delimiters=("=",))
    for page in pages:
        (site / f"{page.module}.py").write_text(page.source, "utf-8")
        for group, names in page.entry_points.items():
            groups[group] = {**groups[group], **names} if group in groups else names
    with (info / "entry_points.txt").open("w") as file:
        groups.write(file)

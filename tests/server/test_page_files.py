"""Files of the page: every script that one of them names is served, to anybody. No server, no browser."""

from __future__ import annotations

import re
from importlib.resources import files

from rag_pipeline.server.access import ROUTES, Access
from rag_pipeline.server.page import FILES


def test_every_script_that_is_named_is_served_and_needs_no_key() -> None:
    static = files("rag_pipeline.server") / "static"
    shipped = {path.name for path in static.iterdir()}
    assert shipped == {name for name, _ in FILES.values()}
    named = {"rag.js"}
    for name in sorted(shipped):
        text = (static / name).read_text(encoding="utf-8")
        named.update(re.findall(r'from "\./(\w+\.js)"', text))
        assert "import(" not in text
    assert {f"/rag/{name}" for name in named} == {path for path in FILES if path.endswith(".js")}
    assert {ROUTES[path] for path in FILES} == {Access.OPEN}

"""Markdown files, parsed by markdown-it-py (CommonMark with tables)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from retrievers.loaders.base import (
    LoadReport,
    Source,
    clean_text,
    register_loader,
    whole_file_document,
)
from retrievers.loaders.html import html_to_text
from retrievers.loaders.text import decode
from retrievers.types import Document

if TYPE_CHECKING:
    from markdown_it.token import Token

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.S | re.M)
# The parser drops what is nested deeper; its own 20 is reached by lists ten deep, and its recursion
# overflows Python's stack somewhere above 200.
_MAX_NESTING = 100
_FRONT_TITLE = re.compile(r"^title:[ \t]*(.+)$", re.M)


def markdown_to_text(markup: str) -> tuple[str, str]:
    """Turn Markdown into text as a reader sees it.

    Emphasis and link targets go, images leave their description, code is kept and indented by
    four blanks, list items begin with ``- `` or their number, table rows are ``a | b``.

    Returns
    -------
    (str, str)
        Text and title (the first heading, else the front matter's, else empty).
    """
    from markdown_it import MarkdownIt

    markup = clean_text(markup)
    front_title = ""
    if front := _FRONT_MATTER.match(markup):
        markup = markup[front.end() :]
        if found := _FRONT_TITLE.search(front.group(1)):
            front_title = found.group(1).strip().strip("\"'")
    parser = MarkdownIt("commonmark", {"maxNesting": _MAX_NESTING})
    tokens = parser.enable(["table", "strikethrough"]).parse(markup)
    title = next(
        (
            _inline(tokens[i + 1].children or [])
            for i, token in enumerate(tokens)
            if token.type == "heading_open"
        ),
        front_title,
    )
    return "\n\n".join(_blocks(tokens)), title


def _blocks(tokens: Sequence[Token]) -> Iterator[str]:
    """Yield paragraphs; the items of one tight list or the rows of one table stay together."""
    lists: list[int | None] = []  # the next number of every open list, None for bullets
    marker = ""
    held: list[str] = []  # lines of the open list or table
    row: list[str] = []
    in_row = False
    for token in tokens:
        kind = token.type
        text = ""
        if kind in ("bullet_list_open", "ordered_list_open"):
            start = int(str(token.attrs.get("start", 1)))
            lists.append(start if kind.startswith("ordered") else None)
        elif kind in ("bullet_list_close", "ordered_list_close"):
            lists.pop()
        elif kind == "list_item_open":
            number = lists[-1]
            marker = "  " * (len(lists) - 1) + ("- " if number is None else f"{number}. ")
            if number is not None:
                lists[-1] = number + 1
        elif kind == "tr_open":
            in_row, row = True, []
        elif kind == "tr_close":
            in_row = False
            held.append(" | ".join(row))
        elif kind == "inline":
            text = _inline(token.children or [])
            if in_row:
                row.append(" ".join(text.split()))
                continue
        elif kind in ("fence", "code_block"):
            text = "\n".join(
                f"    {line}" if line.strip() else "" for line in token.content.splitlines()
            )
        elif kind == "html_block":
            text = html_to_text(token.content)[0]
        if text.strip():
            if lists:
                held.append(marker + text.replace("\n", "\n" + " " * len(marker)))
                marker = "  " * len(lists) if kind == "inline" else ""
            else:
                yield text
        if held and not lists and not in_row and kind in _CLOSERS:
            yield "\n".join(held)
            held.clear()


_CLOSERS = ("bullet_list_close", "ordered_list_close", "table_close")


def _inline(children: Sequence[Token]) -> str:
    parts: list[str] = []
    for child in children:
        if child.type in ("text", "code_inline"):
            parts.append(child.content)
        elif child.type in ("softbreak", "hardbreak"):
            parts.append("\n")
        elif child.type == "image":
            parts.append(child.content)
    return "".join(parts)


@register_loader(".md", ".markdown", ".mdown")
def load_markdown(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the file as one document, titled by its first heading."""
    text, title = markdown_to_text(decode(source.file.read_bytes(), source.path))
    yield whole_file_document(source, text, kind="md", title=title)

"""HTML files, parsed by BeautifulSoup on lxml."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from retrievers.loaders.base import LoadReport, Source, register_loader, whole_file_document
from retrievers.loaders.text import decode
from retrievers.types import Document

if TYPE_CHECKING:
    from bs4 import Tag

# Not part of what a reader reads.
_DROPPED = {"script", "style", "nav", "noscript", "template", "svg", "iframe", "head"}
_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "dd", "details", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6",
    "header", "hr", "html", "legend", "main", "ol", "p", "section", "summary", "table", "tbody",
    "tfoot", "thead", "ul",
}  # fmt: skip


class _Writer:
    """Collects text: runs of inline text, lines, and blank lines between blocks."""

    def __init__(self) -> None:
        self.blocks: list[list[str]] = [[]]
        self.line: list[str] = []

    def end_line(self) -> None:
        text = " ".join("".join(self.line).split())
        self.line.clear()
        if text:
            self.blocks[-1].append(text)

    def end_block(self) -> None:
        self.end_line()
        if self.blocks[-1]:
            self.blocks.append([])

    def text(self) -> str:
        self.end_block()
        return "\n\n".join("\n".join(block) for block in self.blocks if block)


def html_to_text(markup: str) -> tuple[str, str]:
    """Turn HTML into text as a reader sees it.

    Paragraphs and headings are parted by blank lines, list items begin with ``- ``, table rows
    are ``a | b``, preformatted text is indented by four blanks. Scripts, styles and navigation
    are left out.

    Returns
    -------
    (str, str)
        Text and title (``<title>``, else the first ``<h1>``, else empty).
    """
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning

    with warnings.catch_warnings():
        # A page of a few words looks like a file name to the parser; it is a page all the same.
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        soup = BeautifulSoup(markup, "lxml")
    title_tag = soup.find("title") or soup.find("h1")
    title = title_tag.get_text(" ") if title_tag is not None else ""
    writer = _Writer()
    _write(soup, writer)
    return writer.text(), title


def _write(root: Tag, writer: _Writer) -> None:
    """Walk `root` depth first with a stack of our own: hostile nesting must not overflow Python's."""
    from bs4 import Tag
    from bs4.element import NavigableString, PreformattedString

    # A callable on the stack runs when the element it closes is done.
    stack: list[object] = list(reversed(root.contents))
    while stack:
        node = stack.pop()
        if callable(node) and not isinstance(node, Tag):
            node()
        elif isinstance(node, PreformattedString):
            continue  # comments, doctype, CDATA
        elif isinstance(node, NavigableString):
            writer.line.append(str(node))
        elif isinstance(node, Tag) and node.name not in _DROPPED:
            name = node.name
            if name == "br":
                writer.end_line()
            elif name == "pre":
                writer.end_block()
                code = node.get_text().strip("\n")
                writer.blocks[-1].extend(
                    f"    {line}" if line.strip() else "" for line in code.splitlines()
                )
                writer.end_block()
            elif name == "tr":
                writer.end_line()
                cells = node.find_all(["td", "th"], recursive=False)
                writer.line.append(" | ".join(" ".join(c.get_text(" ").split()) for c in cells))
                writer.end_line()
            else:
                if name in _BLOCKS:
                    writer.end_block()
                    stack.append(writer.end_block)
                elif name == "li":
                    writer.end_line()
                    writer.line.append("- ")
                    stack.append(writer.end_line)
                stack.extend(reversed(node.contents))


@register_loader(".html", ".htm", ".xhtml")
def load_html(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the page as one document, titled by its ``<title>``."""
    text, title = html_to_text(decode(source.file.read_bytes(), source.path))
    yield whole_file_document(source, text, kind="html", title=title)

"""HTML files, parsed by BeautifulSoup on lxml."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from retrievers.loaders.base import (
    LoadReport,
    Source,
    clean_text,
    register_loader,
    whole_file_document,
)
from retrievers.loaders.encoding import decode
from retrievers.loaders.page_text import PageText
from retrievers.types import Document

if TYPE_CHECKING:
    from bs4 import Tag

# What a browser does not show as text, and navigation, which is no part of what a page says.
_DROPPED = {
    "annotation", "annotation-xml", "audio", "canvas", "datalist", "defs", "desc", "head", "iframe",
    "metadata", "nav", "noscript", "rp", "script", "style", "template", "title", "video",
}  # fmt: skip
_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "center", "details", "dialog", "div", "dl",
    "fieldset", "figcaption", "figure", "footer", "form", "frameset", "h1", "h2", "h3", "h4", "h5",
    "h6", "header", "hgroup", "hr", "html", "legend", "main", "noframes", "p", "search", "section",
    "summary",
}  # fmt: skip
_LINES = {"caption", "dd", "dt", "optgroup", "option", "tbody", "tfoot", "thead"}
_CODE = {"listing", "plaintext", "pre", "textarea", "xmp"}
# Stand apart from their neighbours without a blank between them.
_APART = {"button", "foreignobject", "input", "select", "text", "tspan"}
_HIDDEN_STYLE = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.I)
_BLOCK_STYLE = re.compile(r"(?:^|;)\s*display\s*:\s*(?:block|flex|grid|list-item|table)\b", re.I)
_UNTYPED_INPUTS = {"hidden", "password", "checkbox", "radio", "file", "image", "color", "range"}
_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.S)
_RAISED = str.maketrans("0123456789+-\u2212=()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿⁱ")
_SIGNS = ("+", "-", "\u2212")
_LOWERED = str.maketrans("0123456789+-\u2212=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")


def html_to_text(markup: str) -> tuple[str, str]:
    """Turn HTML into text as a reader sees it.

    Paragraphs and headings are parted by blank lines, list items begin with ``- `` or their
    number, table rows are ``a | b``, preformatted text is indented by four blanks. Pictures leave
    their description, form fields what is filled in. Scripts, styles, navigation and what is
    marked as hidden are left out.

    Returns
    -------
    (str, str)
        Text and title (``<title>``, else the first ``<h1>``, else empty).
    """
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning

    with warnings.catch_warnings():
        # A page of a few words looks like a file name to the parser; it is a page all the same.
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        # XHTML is read as a browser reads it when it is served as a page.
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        soup = BeautifulSoup(clean_text(markup), "lxml")
    # A picture inside the page may have a title of its own.
    title_tag = (soup.head and soup.head.find("title")) or soup.find("h1") or soup.find("title")
    page = PageText()
    _write(soup, page)
    # Again: entities may stand for what is cleaned away.
    return clean_text(page.text()), _title(title_tag) if title_tag is not None else ""


def _title(tag: Tag) -> str:
    page = PageText()
    _write(tag, page)
    return page.text()


def _write(root: Tag, page: PageText) -> None:
    """Walk `root` depth first with a stack of our own: hostile nesting must not overflow Python's."""
    from bs4 import Tag
    from bs4.element import NavigableString, PreformattedString

    # A callable on the stack runs when the element it closes is done.
    stack: list[object] = list(reversed(root.contents))
    while stack:
        node = stack.pop()
        if isinstance(node, Tag):
            if node.name in _DROPPED or _is_hidden(node):
                continue
            if (closer := _open(node, page)) is not None:
                stack.append(closer)
            if not _is_replaced(node):
                stack.extend(reversed(node.contents))
        elif isinstance(node, NavigableString):
            # Not comments, doctype and the like.
            if not isinstance(node, PreformattedString):
                page.add(str(node))
        elif callable(node):
            node()


def _is_hidden(tag: Tag) -> bool:
    if not tag.attrs:
        return False
    if "hidden" in tag.attrs:
        return tag["hidden"] != "until-found"
    style = tag.get("style")
    return style is not None and _HIDDEN_STYLE.search(str(style)) is not None


def _is_replaced(tag: Tag) -> bool:
    """Whether :func:`_open` has written the contents in another form."""
    return tag.name in ("sup", "sub") and _small(tag) is not None


def _open(tag: Tag, page: PageText) -> Callable[[], None] | None:
    """Write what `tag` begins with; return what ends it."""
    name = tag.name
    style = tag.get("style") if tag.attrs else None
    if name in _BLOCKS or (style is not None and _BLOCK_STYLE.search(str(style))):
        page.end_block()
        return page.end_block
    if name in _LINES:
        page.end_line()
        if name == "optgroup":
            page.add(f"{tag.get('label') or ''} ")
        return page.end_line
    if name in _CODE:
        page.open_code()
        return page.close_code
    if name == "br":
        page.break_line()
    elif name in ("ul", "menu", "dir"):
        page.open_list(None)
        return page.close_list
    elif name == "ol":
        _open_numbered(tag, page)
        return page.close_list
    elif name == "li":
        page.open_item(_integer(tag, "value"))
        return page.end_line
    elif name == "table":
        page.open_table()
        return page.close_table
    elif name == "tr":
        page.open_row()
        return page.close_row
    elif name in ("td", "th"):
        columns, rows = _integer(tag, "colspan") or 1, _integer(tag, "rowspan") or 1
        page.open_cell()
        return lambda: page.close_cell(columns, rows)
    elif name == "img":
        page.add(f" {tag.get('alt') or ''} ")
    elif name in _APART:
        if name == "input" and str(tag.get("type", "text")).lower() not in _UNTYPED_INPUTS:
            page.add(f" {tag.get('value') or tag.get('placeholder') or ''}")
        page.add(" ")
        return lambda: page.add(" ")
    elif name == "rt":
        page.add("(")
        return lambda: page.add(")")
    elif name == "mfrac":
        _divide(tag)
    elif name == "q":
        page.add('"')
        return lambda: page.add('"')
    elif name in ("sup", "sub") and (small := _small(tag)) is not None:
        page.add(small)
    return None


def _open_numbered(tag: Tag, page: PageText) -> None:
    start, step = _integer(tag, "start"), 1
    if tag.has_attr("reversed"):
        step = -1
        if start is None:
            start = len(tag.find_all("li", recursive=False))
    kind = str(tag.get("type", "1"))
    page.open_list(1 if start is None else start, step, kind if kind in "1aAiI" and kind else "1")


def _integer(tag: Tag, attribute: str) -> int | None:
    value = str(tag.get(attribute, "")) if tag.attrs else ""
    found = re.match(r"\s*([+-]?\d{1,9})", value)
    return int(found[1]) if found else None


def _small(tag: Tag) -> str | None:
    """Raised or lowered digits: ``10<sup>3</sup>`` is not 103."""
    if tag.string is None:
        return None
    text = str(tag.string).strip()
    table, sign = (_RAISED, "^") if tag.name == "sup" else (_LOWERED, "_")
    small = text.translate(table)
    if text and not set(text) & set(small):
        return small
    return sign + text if text[:1].isdigit() or text[:1] in _SIGNS else None


def _divide(fraction: Tag) -> None:
    parts = [child for child in fraction.children if getattr(child, "name", None)]
    if len(parts) == 2:
        parts[1].insert_before("/")


@register_loader(".html", ".htm", ".xhtml")
def load_html(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the page as one document, titled by its ``<title>``."""
    payload = source.file.read_bytes()
    markup = decode(payload, source.path, report=report, is_html=True)
    if source.file.suffix.lower() == ".xhtml":
        markup = _CDATA.sub(lambda found: html.escape(found[1]), markup)
    text, title = html_to_text(markup)
    yield whole_file_document(source, text, kind="html", title=title)

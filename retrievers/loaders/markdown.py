"""Markdown files: parsed by markdown-it-py (CommonMark with tables), then read as the page they make."""

from __future__ import annotations

import html
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retrievers.loaders.base import (
    LoadReport,
    Source,
    clean_text,
    register_loader,
    whole_file_document,
)
from retrievers.loaders.encoding import decode
from retrievers.loaders.html import html_to_text
from retrievers.types import Document

if TYPE_CHECKING:
    from markdown_it.token import Token

_FRONT_MATTER = re.compile(
    r"\A(?:---[ \t]*\n(?P<yaml>.*?)^(?:---|\.\.\.)|\+\+\+[ \t]*\n(?P<toml>.*?)^\+\+\+)[ \t]*(?:\n|\Z)",
    re.S | re.M,
)
# The name of a field, not the beginning of a sentence.
_FIELD_NAME = re.compile(r"[\w.-]+")
# The parser drops what is nested deeper; its own 20 is reached by lists ten deep, and its recursion
# overflows Python's stack somewhere above 200.
_MAX_NESTING = 100
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9-]*)(\s[^<>]*|/)?>")
# May stand alone without attributes; any other name in angle brackets that is never closed is a
# placeholder (<source>) or a type (List<A>).
_STAND_ALONE = {"br", "dd", "dt", "hr", "img", "li", "option", "p", "td", "th", "tr", "wbr"}
_ELEMENTS = frozenset(
    [
        "a",
        "abbr",
        "acronym",
        "address",
        "area",
        "article",
        "aside",
        "audio",
        "b",
        "base",
        "basefont",
        "bdi",
        "bdo",
        "bgsound",
        "big",
        "blink",
        "blockquote",
        "body",
        "br",
        "button",
        "canvas",
        "caption",
        "center",
        "cite",
        "code",
        "col",
        "colgroup",
        "data",
        "datalist",
        "dd",
        "del",
        "details",
        "dfn",
        "dialog",
        "dir",
        "div",
        "dl",
        "dt",
        "em",
        "embed",
        "fieldset",
        "figcaption",
        "figure",
        "font",
        "footer",
        "form",
        "frame",
        "frameset",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "head",
        "header",
        "hgroup",
        "hr",
        "html",
        "i",
        "iframe",
        "img",
        "input",
        "ins",
        "kbd",
        "label",
        "legend",
        "li",
        "link",
        "listing",
        "main",
        "map",
        "mark",
        "marquee",
        "menu",
        "meta",
        "meter",
        "nav",
        "nobr",
        "noembed",
        "noframes",
        "noscript",
        "object",
        "ol",
        "optgroup",
        "option",
        "output",
        "p",
        "param",
        "picture",
        "plaintext",
        "pre",
        "progress",
        "q",
        "rb",
        "rp",
        "rt",
        "rtc",
        "ruby",
        "s",
        "samp",
        "script",
        "search",
        "section",
        "select",
        "slot",
        "small",
        "source",
        "span",
        "strike",
        "strong",
        "style",
        "sub",
        "summary",
        "sup",
        "svg",
        "table",
        "tbody",
        "td",
        "template",
        "textarea",
        "tfoot",
        "th",
        "thead",
        "time",
        "title",
        "tr",
        "track",
        "tt",
        "u",
        "ul",
        "var",
        "video",
        "wbr",
        "xmp",
        "path",
        "g",
        "rect",
        "circle",
        "line",
        "text",
        "defs",
        "math",
        "mi",
        "mn",
        "mo",
        "mrow",
        "mfrac",
        "msup",
        "msub",
    ]
)


def markdown_to_text(markup: str) -> tuple[str, str]:
    """Turn Markdown into text as a reader sees it.

    Emphasis and link targets go, images leave their description, code is kept and indented by
    four blanks, list items begin with ``- `` or their number, table rows are ``a | b``. HTML is
    read as in :func:`html_to_text`; words in angle brackets that are no HTML stay.

    Returns
    -------
    (str, str)
        Text and title (the first heading, else the front matter's, else empty).
    """
    from markdown_it import MarkdownIt

    markup, fields = _split_front_matter(clean_text(markup))
    parser = MarkdownIt("commonmark", {"maxNesting": _MAX_NESTING})
    parser.enable(["table", "strikethrough"])
    env: dict[str, Any] = {}
    tokens = parser.parse(markup, env)
    _keep_placeholders(tokens)
    title = next(
        (
            html_to_text(parser.renderer.render([tokens[i + 1]], parser.options, env))[0]
            for i, token in enumerate(tokens)
            if token.type == "heading_open"
        ),
        str(fields.get("title") or ""),
    )
    page = parser.renderer.render(tokens, parser.options, env)
    return html_to_text(page + _footnotes(env))[0], title


def _split_front_matter(markup: str) -> tuple[str, Mapping[str, Any]]:
    """Part the fields at the head of a document from its text; two rules are no front matter."""
    import yaml

    found = _FRONT_MATTER.match(markup)
    if found is None:
        return markup, {}
    try:
        if found["toml"] is not None:
            fields: object = tomllib.loads(found["toml"])
        else:
            fields = yaml.load(found["yaml"], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, tomllib.TOMLDecodeError, ValueError, RecursionError):
        return markup, {}
    if fields is None:
        is_front_matter = not found[0].replace("-", "").strip()
        return (markup[found.end() :] if is_front_matter else markup), {}
    if not isinstance(fields, dict) or not all(
        isinstance(name, str) and _FIELD_NAME.fullmatch(name) for name in fields
    ):
        return markup, {}
    return markup[found.end() :], fields


def _keep_placeholders(tokens: Sequence[Token]) -> None:
    """Escape what only looks like a tag, so that it stays as text."""
    markup = [
        token
        for block in tokens
        for token in (block, *(block.children or ()))
        if token.type in ("html_block", "html_inline")
    ]
    closed = {
        found[2].lower()
        for token in markup
        for found in _TAG.finditer(token.content)
        if found[1] and found[2].lower() in _ELEMENTS
    }

    def keep(found: re.Match[str]) -> str:
        name = found[2].lower()
        is_markup = name in _ELEMENTS and (
            name in closed or name in _STAND_ALONE or bool((found[3] or "").strip("/ \n\t"))
        )
        return found[0] if is_markup else html.escape(found[0])

    for token in markup:
        if not token.content.lstrip().startswith(("<!--", "<?", "<![")):
            token.content = _TAG.sub(keep, token.content)


def _footnotes(env: Mapping[str, Any]) -> str:
    """Notes of one word, which CommonMark takes for the target of a link."""
    return "".join(
        f"<p>[{html.escape(label.lower())}]: {html.escape(str(reference['href']))}</p>"
        for label, reference in env.get("references", {}).items()
        if label.startswith("^")
    )


@register_loader(".md", ".markdown", ".mdown")
def load_markdown(source: Source, report: LoadReport) -> Iterator[Document]:
    """Yield the file as one document, titled by its first heading."""
    markup = decode(source.file.read_bytes(), source.path, report=report)
    text, title = markdown_to_text(markup)
    yield whole_file_document(source, text, kind="md", title=title)

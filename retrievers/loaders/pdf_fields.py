"""What stands on a PDF page besides its text: filled-in form fields and comments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pypdf import PageObject

_HIDDEN = 0b10 | 0b100000  # flags "hidden" and "no view" of an annotation
_PASSWORD = 1 << 13
_PUSH_BUTTON = 1 << 16
_MAX_PARENTS = 32
# Drawn by the viewer from the text or the page they belong to.
_SILENT = {"/Link", "/Popup", "/PrinterMark", "/TrapNet", "/Watermark"}


def page_annotations(page: PageObject, reasons: list[str]) -> str:
    """Lines ``name: value`` for fields that are filled in, then the comments.

    A broken annotation is left out, its error added to `reasons`.
    """
    lines: list[str] = []
    annotations = page.get("/Annots")
    for reference in (annotations.get_object() or []) if annotations is not None else []:
        try:
            annotation = reference.get_object()
            if not isinstance(annotation, dict) or int(annotation.get("/F", 0)) & _HIDDEN:
                continue
            kind = annotation.get("/Subtype")
            if kind == "/Widget":
                line = _field(annotation).strip()
            else:
                line = "" if kind in _SILENT else _text(annotation.get("/Contents")).strip()
        except Exception as error:
            reasons.append(f"an annotation is broken: {error}")
            continue
        if line and line not in lines:
            lines.append(line)
    return "\n".join(lines)


def _field(widget: Any) -> str:
    kind = _inherited(widget, "/FT")
    flags = int(_inherited(widget, "/Ff") or 0)
    value = _inherited(widget, "/V")
    name = _name(widget)
    if kind == "/Btn":
        if flags & _PUSH_BUTTON:
            return _text((_resolved(widget.get("/MK")) or {}).get("/CA"))
        # The state that is drawn; a group of radio buttons has one widget a choice.
        state = _text(widget.get("/AS")) or _text(value)
        return f"{name}: {state.lstrip('/')}" if state not in ("", "/Off") else ""
    if kind == "/Tx" and flags & _PASSWORD:
        return ""
    if kind == "/Ch":
        shown = [_shown(widget, _text(item)) for item in _as_list(value)]
    elif kind == "/Tx":
        shown = [_text(value)]
    else:
        return ""
    text = ", ".join(item for item in shown if item.strip())
    return (f"{name}: {text}" if name else text) if text else ""


def _name(widget: Any) -> str:
    """What the form calls the field: the label for readers, else the names of the field."""
    label = _text(_inherited(widget, "/TU"))
    if label:
        return label
    names: list[str] = []
    node = widget
    for _ in range(_MAX_PARENTS):
        if node is None:
            break
        names.insert(0, _text(node.get("/T")))
        node = _resolved(node.get("/Parent"))
    return ".".join(name for name in names if name)


def _shown(widget: Any, value: str) -> str:
    """The text of a choice; a form may store a code for it."""
    for option in _as_list(_inherited(widget, "/Opt")):
        pair = _as_list(option)
        if len(pair) == 2 and _text(pair[0]) == value:
            return _text(pair[1])
    return value


def _inherited(widget: Any, key: str) -> Any:
    node = widget
    for _ in range(_MAX_PARENTS):
        if node is None:
            return None
        if key in node:
            return _resolved(node[key])
        node = _resolved(node.get("/Parent"))
    return None


def _resolved(value: Any) -> Any:
    return value.get_object() if hasattr(value, "get_object") else value


def _as_list(value: Any) -> list[Any]:
    value = _resolved(value)
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    value = _resolved(value)
    if value is None:
        return ""
    data = value.get_data() if hasattr(value, "get_data") else value  # long values are streams
    return data.decode("utf-8", "replace") if isinstance(data, bytes) else str(data)

"""Names of uploaded files: which are safe, and which documents of an index came from which file."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import unquote

from rag_pipeline.server.errors import ApiError

UPLOADS = "uploads"
"""First part of the id of every uploaded document: ``uploads/NAME`` or ``uploads/NAME#RECORD``."""

_MAX_NAME_BYTES = 255
_REFUSED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# Words of Indic scripts and of Persian need the joiners, and so do emoji of several parts.
_JOINERS = frozenset("\u200c\u200d")
# Emoji younger than Python's tables.
_EMOJI = range(0x1F000, 0x1FB00)
_FLAG_TAGS = re.compile("\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,6}\U000e007f")
_SEPARATORS = frozenset("/\\:")
_DEVICE = re.compile(
    r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(?:\.|$)", re.I
)
# Only these formats hold records, so `a#1` is a file of its own and `a.jsonl#1` a record of `a.jsonl`.
_FILE_OF_RECORD = re.compile(r"(.*?\.(?:jsonl|ndjson|json)(?:\.gz)?)#.", re.I | re.S)
_ADVICE = "no path, : or control character, not hidden, no device name, at most 255 bytes"


def safe_name(given: str) -> str:
    """Name of an upload, as title, id and file name: what people call files, in any script.

    A path is not cut down to its last part: a client that sends one means something by it that this
    server will not do.

    Returns
    -------
    str
        The name in Unicode's composed form (NFC), however the client's file system spells it.

    Raises
    ------
    ApiError
        400 for a separator, a control or an invisible character, one that turns the direction of
        writing, a hidden, reserved, empty or overlong name.
    """
    name = unicodedata.normalize("NFC", given)
    decoded = unquote(name)
    if not _is_safe(name) or (decoded != name and not _is_safe(decoded)):
        raise ApiError(400, f"the file name {shown(given)} is not allowed: {_ADVICE}", param="name")
    if _FILE_OF_RECORD.match(name):
        raise ApiError(
            400,
            f"the file name {shown(given)} reads as a record of another file; rename it without #",
            param="name",
        )
    return name


def shown(given: str) -> str:
    """Form of a refused name for messages: printable, in quotes, not overlong."""
    return ascii(given if len(given) <= 80 else f"{given[:80]}...")


def file_of(document_id: str) -> str | None:
    """Name of the uploaded file that a document came from; None for a document of another origin."""
    prefix, _, name = document_id.partition("/")
    if prefix != UPLOADS or not name:
        return None
    record = _FILE_OF_RECORD.match(name)
    return record[1] if record else name


def _is_safe(name: str) -> bool:
    return (
        any(unicodedata.category(char)[0] in "LNPS" for char in name)
        and name == name.strip()
        and not name.startswith((".", "~"))
        and not name.endswith(".")
        and len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES
        and not _DEVICE.match(name)
        and all(map(_is_safe_char, _FLAG_TAGS.sub("", name)))
    )


def _is_safe_char(char: str) -> bool:
    if char in _SEPARATORS:
        return False
    return (
        unicodedata.category(char) not in _REFUSED_CATEGORIES
        or char in _JOINERS
        or ord(char) in _EMOJI
    )

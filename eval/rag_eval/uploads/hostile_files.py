"""Files that were made to do harm: bombs, texts that are slow to split, nesting, many records, broken formats."""

from __future__ import annotations

import gzip
import io
import json
import random
import zlib
from collections.abc import Callable, Iterator

_UNITS = (
    "\"'.", ".", "!", "?!", ".)", "\u2026\u201d", ". ", "! ", " ", "\n", "\nx", "\n\nx", "x", "e\u0301", "\u0301",
    "[", "[]", "(", "<b>", "</b>.", "<div><p>", "- a\n", "1. ", "# x\n", "x\n===\n\n", "=", "*", "_a_", "`", "|",
    "| a | b |\n", "天地玄黃。", "🎉", "👩\u200d", "\x01", "\u202e", "{\"a\":\"b.\"},", "```\n", "f(x);", "![](", "[a](",
    "&amp;", "&#", "<!--", "<table><tr><td>", "http://a.b/c?d=e&f.", "\t", "\r", "\x0b", "\u2028", "Mr. ", "U.S.", "> ",
)  # fmt: skip
_TEXT_NAMES = ("text.txt", "page.md", "page.html", "data.json", "data.jsonl", "notes")


def hostile_files(
    count: int, *, seed: int = 1, scale: float = 1.0
) -> Iterator[tuple[str, str, bytes]]:
    """Draw hostile files.

    Parameters
    ----------
    count : int
        How many.
    seed : int
        Of the draws.
    scale : float
        Of their sizes; 1 stays below an upload's default limit.

    Yields
    ------
    kind, name, content
    """
    rng = random.Random(seed)
    kinds = sorted(_KINDS)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        name, content = _KINDS[kind](rng, scale)
        yield kind, f"h{number}-{name}", content


def _repeated(rng: random.Random, scale: float) -> tuple[str, bytes]:
    unit, size = rng.choice(_UNITS), int(rng.choice((64, 256, 1024)) * 1024 * scale)
    return rng.choice(_TEXT_NAMES), (unit * (size // len(unit.encode()) + 1)).encode()[:size]


def _mixed(rng: random.Random, scale: float) -> tuple[str, bytes]:
    units = rng.sample(_UNITS, 3)
    text = "".join(rng.choices(units, k=int(100_000 * scale)))
    return rng.choice(_TEXT_NAMES), text.encode()


def _one_long_line(rng: random.Random, scale: float) -> tuple[str, bytes]:
    text = rng.choice(_UNITS) * int(10_000_000 * scale)
    return "line.jsonl.gz", gzip.compress(json.dumps({"text": text}).encode(), 6)


def _zip_bomb(rng: random.Random, scale: float) -> tuple[str, bytes]:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    piece = rng.choice((b"a", b"\n", b"{}\n", b" ")) * (1 << 20)
    parts = [packer.compress(piece) for _ in range(int(512 * scale))]
    return rng.choice(("bomb.jsonl.gz", "bomb.json.gz")), b"".join(parts) + packer.flush()


def _many_records(rng: random.Random, scale: float) -> tuple[str, bytes]:
    lines = (json.dumps({"text": f"Record {n}."}) for n in range(int(120_000 * scale)))
    return "many.jsonl.gz", gzip.compress("\n".join(lines).encode(), 6)


def _nested_json(rng: random.Random, scale: float) -> tuple[str, bytes]:
    depth = int(1_000_000 * scale)
    return "deep.json", rng.choice((b"[" * depth, b'{"a":' * depth, b"[" * 900 + b"]" * 900))


def _nested_html(rng: random.Random, scale: float) -> tuple[str, bytes]:
    tag = rng.choice(("div", "b", "table", "li", "a", "font"))
    return "deep.html", f"<{tag}>x".encode() * int(60_000 * scale)


def _wide_record(rng: random.Random, scale: float) -> tuple[str, bytes]:
    size = int(4_000_000 * scale)
    fields = {"id": "k", "title": "t", "text": "x. " * 1000, "metadata": {}}
    field = rng.choice(("id", "title", "metadata"))
    fields[field] = {"a": "m" * size} if field == "metadata" else "w" * size
    return "wide.json", json.dumps(fields).encode()


def _broken(rng: random.Random, scale: float) -> tuple[str, bytes]:
    noise = rng.randbytes(int(200_000 * scale))
    head = rng.choice((b"%PDF-1.7\n", b"\x1f\x8b\x08", b"PK\x03\x04", b"\xff\xfe", b"<html>", b""))
    return rng.choice(("x.pdf", "x.json.gz", "x.html", "x.txt", "x.md", "x.jsonl")), head + noise


def _pdf_bomb(rng: random.Random, scale: float) -> tuple[str, bytes]:
    """One page whose content stream unpacks to far more than it is."""
    stream = zlib.compress(b"BT (bomb) Tj ET\n" * int(8_000_000 * scale), 9)
    out = io.BytesIO()
    out.write(
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<<>>>>endobj\n"
        b"4 0 obj<</Filter/FlateDecode/Length " + str(len(stream)).encode() + b">>stream\n"
    )
    out.write(stream + b"\nendstream endobj\ntrailer<</Root 1 0 R>>\n%%EOF")
    return "bomb.pdf", out.getvalue()


_KINDS: dict[str, Callable[[random.Random, float], tuple[str, bytes]]] = {
    "repeated": _repeated,
    "mixed": _mixed,
    "one long line": _one_long_line,
    "compressed bomb": _zip_bomb,
    "many records": _many_records,
    "nested JSON": _nested_json,
    "nested HTML": _nested_html,
    "wide record": _wide_record,
    "broken": _broken,
    "PDF bomb": _pdf_bomb,
}

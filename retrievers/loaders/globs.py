"""File patterns: ``*``, ``?``, ``[...]`` within a name, ``**`` across folders."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from retrievers.errors import RetrievalError


def compile_globs(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Compile patterns to one test on a relative path with forward slashes.

    A pattern without a slash is matched against the last name, at any depth; one with a slash
    against the whole path. A trailing slash, or a pattern naming a folder, takes all below it.
    """
    if isinstance(patterns, str):
        raise RetrievalError(f"patterns is the string {patterns!r}; give a list of patterns")
    compiled = []
    for pattern in patterns:
        core = pattern.strip().removeprefix("./").rstrip("/")
        if not core:
            raise RetrievalError(f"empty file pattern {pattern!r}; give one such as '*.md'")
        anchored = "" if "/" in core else "(?:.*/)?"
        try:
            compiled.append(re.compile(f"{anchored}{_translate(core)}(?:/.*)?", re.S))
        except re.error as error:
            raise RetrievalError(f"bad file pattern {pattern!r}: {error}") from error

    return lambda path: any(regex.fullmatch(path) for regex in compiled)


def _translate(pattern: str) -> str:
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])", pattern)
    rules = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    translated = ""
    for part in parts:
        if part in rules:
            translated += rules[part]
        elif part.startswith("[") and part.endswith("]") and len(part) > 2:
            body = part[1:-1].replace("\\", "\\\\")
            translated += f"[^{body[1:]}]" if body.startswith("!") else f"[{body}]"
        else:
            translated += re.escape(part)
    return translated

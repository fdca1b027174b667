"""What a person or a pipe types into a chat: messages, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rag_pipeline.cli.console import write_error

PROMPT = ">>> "
_QUOTES = '"""'
"""Around a message of several lines, as in other chats of the terminal."""

COMMANDS = {
    "/quit": "end the chat, as Ctrl-D does",
    "/clear": "forget the conversation, and begin a new one",
    "/memory": "show what the memory holds and has cost",
    "/help": 'show this; """ begins and ends a message of several lines',
}


def help_text() -> str:
    """One line per command."""
    return "".join(f"  {name:8}  {what}\n" for name, what in COMMANDS.items())


def read_messages() -> Iterator[str]:
    """Yield each message or command as it comes, without outer white space; ends with the input."""
    lines = _lines()
    for line in lines:
        text = line.strip()
        if text.startswith(_QUOTES):
            text = _joined(text.removeprefix(_QUOTES), lines)
        if text:
            yield text


def _joined(first: str, lines: Iterator[str]) -> str:
    parts = [first]
    while not parts[-1].rstrip().endswith(_QUOTES):
        try:
            parts.append(next(lines))
        except StopIteration:
            break
    return "\n".join(parts).strip().removesuffix(_QUOTES).strip()


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        # A byte that is no UTF-8 is one character of a message, not the end of the chat.
        with contextlib.suppress(AttributeError):
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and the lines before
    while True:
        try:
            if sys.stdout.isatty():
                yield input(PROMPT)
            else:
                write_error(PROMPT)
                yield input()
        except EOFError:
            write_error("\n")
            return

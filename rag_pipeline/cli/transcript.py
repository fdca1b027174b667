"""The transcript of a chat: a file in JSON Lines, one message of OpenAI's ``role`` and ``content`` per line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_pipeline.errors import RagPipelineError
from retrievers import storable_text

ROLES = ("system", "user", "assistant")


class Transcript:
    """A file that a chat is loaded from and that each finished turn is appended to.

    Parameters
    ----------
    path : Path
        Made where it is not there.

    Attributes
    ----------
    system : str
        What its first line says as the system; empty where it says nothing.
    messages : list of (str, str)
        Role and text of the others, the oldest first.

    Raises
    ------
    RagPipelineError
        A file that cannot be read or written, or a line that is no message; names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.system = ""
        self.messages: list[tuple[str, str]] = []
        self._needs_break = False
        try:
            if path.exists():
                self._read(path.read_text("utf-8"))
            # What cannot be written is refused now, not behind the first answer.
            with path.open("a", encoding="utf-8"):
                pass
        except UnicodeDecodeError as error:
            raise RagPipelineError(
                f"--history {path} is not UTF-8 at byte {error.start}; name a file of JSON Lines"
            ) from None
        except OSError as error:
            raise RagPipelineError(
                f"--history {path}: {error.strerror}; name a file that can be read and written"
            ) from None

    def append(self, messages: Sequence[tuple[str, str]]) -> None:
        """Write messages behind the others, all at once, and sync the file; what UTF-8 cannot hold is replaced."""
        lines = [
            json.dumps({"role": role, "content": storable_text(text)}, ensure_ascii=False)
            for role, text in messages
        ]
        head = "\n" if self._needs_break else ""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(head + "".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self._needs_break = False

    def _read(self, text: str) -> None:
        self._needs_break = bool(text) and not text.endswith("\n")
        # Not splitlines(): JSON may hold U+2028, which ends a line for that.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            role, content = self._message(line, number)
            if role == "system":
                if self.messages or self.system:
                    raise self._refused(number, "a system message behind others; it must be first")
                self.system = content
            else:
                self.messages.append((role, content))

    def _message(self, line: str, number: int) -> tuple[str, str]:
        try:
            given: Any = json.loads(line)
        except (ValueError, RecursionError):
            raise self._refused(number, "no JSON") from None
        if not isinstance(given, dict) or given.get("role") not in ROLES:
            raise self._refused(number, f"no message with a role of {', '.join(ROLES)}")
        if not isinstance(given.get("content"), str):
            raise self._refused(number, "a message whose content is no text")
        return str(given["role"]), str(given["content"])

    def _refused(self, number: int, what: str) -> RagPipelineError:
        return RagPipelineError(
            f"--history {self.path}, line {number}: {what}; each line is "
            '{"role": "user", "content": "..."}'
        )

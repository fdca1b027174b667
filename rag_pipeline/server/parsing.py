"""Uploaded files to documents, through a worker process a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from rag_pipeline.server.errors import ApiError
from rag_pipeline.server.parse_worker import REFUSED
from retrievers.types import Document

UPLOADS = "uploads"
"""First part of the id of every uploaded document."""

_MAX_NAME_BYTES = 200
_ALLOWED_MARKS = frozenset(" ._-()+,'&@#!=")


class ParseError(Exception):
    """A file that gave no document; the message is one line."""


def safe_name(given: str) -> str:
    """Name of an upload, as title, id and file name.

    A path is not cut down to its last part: a client that sends one means something by it that this
    server will not do.

    Raises
    ------
    ApiError
        Anything but letters, digits, spaces and a few marks; a hidden, empty or overlong name.
    """
    name = unicodedata.normalize("NFC", given)
    allowed = all(char.isalnum() or char in _ALLOWED_MARKS for char in name)
    encoded = name.encode("utf-8", "replace")
    if (
        not name.strip()
        or not allowed
        or name != name.strip()
        or name.startswith(".")
        or name.endswith(".")
        or len(encoded) > _MAX_NAME_BYTES
    ):
        shown = ascii(given if len(given) <= 80 else f"{given[:80]}...")
        raise ApiError(
            400,
            f"the file name {shown} is not allowed; use letters, digits, spaces and . _ - ( ) + , "
            f"(no path, not hidden, at most {_MAX_NAME_BYTES} bytes)",
            param="name",
        )
    return name


def parse_upload(file: Path, *, seconds: int, num_bytes: int) -> Iterator[Document]:
    """Parse one file in a worker process.

    Parameters
    ----------
    file
        With the name that the documents get.
    seconds, num_bytes
        Limits of the process; it is killed after twice as many seconds of wall time.

    Yields
    ------
    Document
        Ids begin with ``uploads/NAME``.

    Raises
    ------
    ParseError
        One line: why there is no document in it.
    """
    out = file.with_name(f"{file.name}.parsed")
    command = [sys.executable, "-m", "rag_pipeline.server.parse_worker"]
    command += [str(file), str(out), str(seconds), str(num_bytes)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=2 * seconds,
            env=_environment(),
            cwd=file.parent,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ParseError(f"parsing took longer than {2 * seconds} s; split the file") from None
    try:
        if done.returncode != 0:
            raise ParseError(_reason(done.returncode, done.stderr, seconds))
        with out.open(encoding="ascii") as lines:
            for line in lines:
                fields = json.loads(line)
                yield Document(
                    id=_document_id(fields["id"], file),
                    text=fields["text"],
                    title=fields["title"],
                    path=file.name,
                    metadata=fields["metadata"] | {"uploaded": True},
                )
    finally:
        out.unlink(missing_ok=True)


def _document_id(loaded: str, file: Path) -> str:
    """Put the upload's own name where the loader put the folder that it lay in."""
    folder = f"{file.parent.name}/"
    return f"{UPLOADS}/{loaded.removeprefix(folder)}"


def _environment() -> dict[str, str]:
    """What a parser needs of the environment: nothing that is secret or that points elsewhere."""
    kept = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR", "SYSTEMROOT")
    # One thread: a pool of them would count each thread's stack against the memory limit.
    fixed = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {name: os.environ[name] for name in kept if name in os.environ} | fixed


def _reason(code: int, said: bytes, seconds: int) -> str:
    lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    if code == REFUSED and lines:
        return lines[-1][:300]
    if -code in (signal.SIGXCPU, signal.SIGKILL):
        return f"parsing took more than {seconds} s of CPU time or too much memory; split the file"
    if code == -signal.SIGXFSZ:
        return "it unpacks to too much text; split the file"
    if any("MemoryError" in line for line in lines):
        return "parsing needs more memory than an upload may take; split the file"
    return f"its parser failed (exit code {code}); is the file damaged?"

"""Uploaded files to documents and their chunks, through a worker process per file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rag_pipeline.server.file_names import UPLOADS, file_of, safe_name
from rag_pipeline.server.parse_worker import (
    MAX_NOTES,
    REFUSED,
    ParseLimits,
    ParseTask,
    SplitTask,
)
from retrievers import Chunk, PreparedDocument

__all__ = [
    "ParseError",
    "ParseLimits",
    "ParsedDocument",
    "ParsedFile",
    "SplitTask",
    "parse_upload",
    "safe_name",
]

_MAX_LINE = 16 << 20
_MAX_NOTE = 400
_LOOK_S = 0.05
_TRIES = 3
# What the limits themselves do; whatever else ends a worker from outside may be chance.
_BY_LIMIT = frozenset({signal.SIGXCPU, signal.SIGXFSZ})


class ParseError(Exception):
    """A file that gave no document; the message is one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedDocument(PreparedDocument):
    """A document of an upload, with the number of its chunks."""

    num_chunks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedFile:
    """What a worker made of a file.

    Attributes
    ----------
    documents : iterator of ParsedDocument
        Ids begin with ``uploads/NAME``. The worker is done; one chunk at a time is held in memory.
    notes : tuple of str
        What of the file was left out or guessed, a line each; at most some twenty.
    """

    documents: Iterator[ParsedDocument]
    notes: tuple[str, ...]


class _Killed(Exception):
    """A worker that something outside ended."""


def parse_upload(
    file: Path,
    *,
    work: Path,
    limits: ParseLimits,
    split: SplitTask,
    check: Callable[[], None] = lambda: None,
) -> ParsedFile:
    """Read and split one file in a worker process.

    Parameters
    ----------
    file : Path
        With the name that the documents get; nothing is written into its folder.
    work : Path
        Folder for what the worker writes, made here; the caller's to remove.
    limits : ParseLimits
        Limits of the process; it is killed after twice as many seconds of wall time.
    split : SplitTask
        How to split.
    check : callable
        Called repeatedly while the worker runs; raises to end it.

    Raises
    ------
    ParseError
        One line: why there is no document in it. A worker that is killed from outside is tried
        three times.
    """
    for _ in range(_TRIES):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o700)
        out, notes = work / "documents.jsonl", work / "notes.json"
        task = ParseTask(
            file=str(file.resolve()),
            prefix=f"{UPLOADS}/",
            out=str(out),
            notes=str(notes),
            limits=limits,
            split=split,
        )
        with contextlib.suppress(_Killed):
            _run(task, work, check)
            # All of it is looked at before any is used: a file that cannot be read replaces nothing.
            for _ in _read(out, file.name):
                check()
            return ParsedFile(documents=_read(out, file.name), notes=_notes(notes))
    raise ParseError(f"its parser was killed {_TRIES} times; does it need too much memory?")


def _run(task: ParseTask, work: Path, check: Callable[[], None]) -> None:
    limits = task.limits
    said = work / "said"
    # -P and an empty folder: Python imports from where it stands, and an upload may be called ctypes.py.
    empty = work / "empty"
    empty.mkdir(mode=0o700)
    worker = "rag_pipeline.server.parse_worker"
    command = [sys.executable, "-P", "-m", worker, task.to_json()]
    with said.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=_environment(work),
            cwd=empty,
            start_new_session=True,
        )
        try:
            _wait(process, 2 * limits.seconds, check)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        with said.open("rb") as stderr:
            words = stderr.read(1 << 16)
        raise _fault(process.returncode, words, limits)


def _wait(process: subprocess.Popen[bytes], seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_LOOK_S)
            return
        check()
        if time.monotonic() > end:
            raise ParseError(
                f"parsing took longer than {seconds} s; split the file or raise --parse-seconds"
            )


def _read(out: Path, name: str) -> Iterator[ParsedDocument]:
    with out.open("rb") as lines:
        while (line := _line(lines)) is not None:
            # The worker has read what an attacker wrote: what it says is checked like a request.
            if not isinstance(line, dict) or file_of(str(line["id"])) != name:
                raise ParseError("its parser failed (strange output)")
            chunks = _chunks(lines, line, name)
            yield ParsedDocument(
                id=line["id"],
                content_hash=str(line["hash"]),
                chunks=chunks,
                num_chunks=int(line["chunks"]),
            )
            for _ in chunks:  # of a document that is unchanged
                pass


def _notes(file: Path) -> tuple[str, ...]:
    with file.open("rb") as stream:
        lines = json.loads(stream.read(_MAX_LINE))
    return tuple(str(line)[:_MAX_NOTE] for line in lines[: MAX_NOTES + 1])


def _chunks(lines: IO[bytes], document: dict[str, Any], name: str) -> Iterator[Chunk]:
    for _ in range(int(document["chunks"])):
        line = _line(lines)
        if line is None:
            raise ParseError("its parser failed (its output is cut off)")
        chunk_id, start, end, num_tokens, text = line
        yield Chunk(
            id=str(chunk_id),
            document_id=document["id"],
            text=str(text),
            title=str(document["title"]),
            start=int(start),
            end=int(end),
            num_tokens=int(num_tokens),
            path=name,
            metadata=document["metadata"],
        )


def _line(lines: IO[bytes]) -> Any:
    line = lines.readline(_MAX_LINE)
    if not line:
        return None
    if not line.endswith(b"\n"):
        raise ParseError("its parser failed (its output is cut off)")
    return json.loads(line)


def _environment(work: Path) -> dict[str, str]:
    """What a parser needs of the environment: nothing that is secret or that points elsewhere."""
    kept = ("PATH", "LANG", "LC_ALL", "VIRTUAL_ENV", "SYSTEMROOT")
    # One thread: a pool of them would count each thread's stack against the memory limit.
    fixed = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(work),
    }
    # An empty or relative entry is the folder that a process stands in.
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(entry for entry in entries if Path(entry).is_absolute())
    fixed |= {"PYTHONPATH": path} if path else {}
    return {name: os.environ[name] for name in kept if name in os.environ} | fixed


def _fault(code: int, said: bytes, limits: ParseLimits) -> Exception:
    lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.strip()]
    if code == REFUSED and lines:
        return ParseError(lines[-1])
    if -code == signal.SIGXCPU:
        return ParseError(
            f"parsing took more than {limits.seconds} s of CPU time; split the file or raise "
            "--parse-seconds"
        )
    if -code == signal.SIGABRT or any("MemoryError" in line for line in lines):
        most = limits.memory_bytes >> 20
        return ParseError(f"parsing needs more than {most} MiB of memory; split the file")
    if code < 0 and -code not in _BY_LIMIT:
        return _Killed()
    return ParseError(f"its parser failed (exit code {code}); is the file damaged?")

"""A process that reads and splits one uploaded file, with limits set before it reads a byte.

Run as ``python -P -m rag_pipeline.server.parse_worker TASK`` in an empty folder, TASK being the JSON of a
:class:`ParseTask`. Documents and their chunks go to a file as JSON lines, remarks on what was read to another;
a refusal goes to stderr as one line with exit code 3. Unpacking, decoding and parsing of foreign formats is the
part of a server that an attacker feeds directly: what goes wrong here ends this process only. It never
stands in the folder of the file, whose name may be that of a module.
"""

from __future__ import annotations

import errno
import gzip
import json
import resource
import signal
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rag_pipeline.parent_death import end_with_parent
from rag_pipeline.server.priority import give_way

if TYPE_CHECKING:
    from retrievers import Document, LoadReport, TokenSplitter

REFUSED = 3
MAX_NOTES = 20
MAX_ID_CHARS = 1000
_MAX_TITLE_CHARS = 1000
_MAX_METADATA_CHARS = 16 << 10
_PIECE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ParseLimits:
    """What one file may take and give.

    Parameters
    ----------
    seconds : int
        CPU time.
    memory_bytes : int
        Address space.
    unpacked_bytes : int
        Of a compressed file.
    text_chars, documents, chunks : int
        That come out of it.
    """

    seconds: int
    memory_bytes: int
    unpacked_bytes: int
    text_chars: int
    documents: int
    chunks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitTask:
    """How to split, and what decides whether a document is unchanged.

    Parameters
    ----------
    tokenizer : str
        ``tokenizer.json`` of the served model.
    chunk_tokens, overlap : int
        As :class:`retrievers.TokenSplitter` takes them.
    settings, tokenizer_fingerprint : dict, str
        Of the index's splitter, for :func:`retrievers.document_hash`.
    """

    tokenizer: str
    chunk_tokens: int
    overlap: int
    settings: dict[str, Any]
    tokenizer_fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ParseTask:
    """One file: its absolute path, the prefix of its documents' ids, where they and the remarks go, the limits."""

    file: str
    prefix: str
    out: str
    notes: str
    limits: ParseLimits
    split: SplitTask

    def to_json(self) -> str:
        """Write the task as the one argument of the process."""
        return json.dumps(asdict(self))

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return Path(self.file).name

    @classmethod
    def from_json(cls, word: str) -> ParseTask:
        """Read what :meth:`to_json` wrote."""
        fields = json.loads(word)
        fields["limits"] = ParseLimits(**fields["limits"])
        fields["split"] = SplitTask(**fields["split"])
        return cls(**fields)


class _Refusal(Exception):
    """One line for the user."""


def main(words: list[str]) -> int:
    """Read one file; see the module."""
    # Who stops a service tells all its processes: the server decides, and its next start does the work again.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    task = ParseTask.from_json(words[0])
    # A killed server leaves no worker: the next server does the work again.
    end_with_parent(int(words[1]))
    set_limits(task.limits)
    from retrievers import LoadReport, RetrievalError

    report = LoadReport()
    try:
        with Path(task.out).open("w", encoding="ascii") as lines:
            _write(task, report, lines)
        Path(task.notes).write_text(json.dumps(_notes(task, report)), "ascii")
    except (_Refusal, RetrievalError) as error:
        return _refuse(task, str(error))
    except MemoryError:
        return _refuse(task, f"it needs more than {task.limits.memory_bytes >> 20} MiB of memory")
    except RecursionError:
        return _refuse(task, "it is nested too deeply")
    except OSError as error:
        if error.errno == errno.EFBIG:
            return _refuse(task, "it gives too much text; split the file")
        return _refuse(task, f"cannot read it: {error.strerror or type(error).__name__}")
    return 0


def set_limits(limits: ParseLimits) -> None:
    """Bound CPU time, address space, written bytes and open files of this process."""
    # ASCII JSON writes a character as up to twelve bytes.
    written = 12 * limits.text_chars + (64 << 20)
    for what, soft, hard in (
        (resource.RLIMIT_CPU, limits.seconds, limits.seconds + 1),
        (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, written, written),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))
    give_way()


def _refuse(task: ParseTask, reason: str) -> int:
    sys.stderr.write(_one_line(task, reason) + "\n")
    return REFUSED


def _one_line(task: ParseTask, words: str) -> str:
    # Where a server keeps uploads is nobody's business.
    words = words.replace(f"{Path(task.file).parent}/", "")
    return " ".join(words.encode("utf-8", "replace").decode().split())[:300]


def _notes(task: ParseTask, report: LoadReport) -> list[str]:
    """What of the file was left out or guessed, a line each."""
    lines = []
    for place, words in [*report.skipped, *report.notes][:MAX_NOTES]:
        # A place is the file, or the file and a line or record of it.
        where = place.rpartition(task.name)[2]
        where = where.replace(":", "line ", 1).replace("[", "record ", 1).rstrip("]")
        lines.append(_one_line(task, f"{where}: {words}" if where else words))
    left = report.num_skipped + len(report.notes) - len(lines)
    return [*lines, f"and {left} more"] if left > 0 else lines


def _write(task: ParseTask, report: LoadReport, lines: IO[str]) -> None:
    from retrievers import HFTokenizer, IndexSettings, TokenSplitter, document_hash

    limits, split = task.limits, task.split
    _check_unpacked(task)
    splitter = TokenSplitter(
        HFTokenizer(split.tokenizer), chunk_tokens=split.chunk_tokens, overlap=split.overlap
    )
    # An embedder has no part in the hash of a document.
    settings = IndexSettings(
        embedder_name="",
        embedder_fingerprint="",
        dim=0,
        splitter=split.settings,
        tokenizer_fingerprint=split.tokenizer_fingerprint,
    )
    num_chars = num_chunks = 0
    for num_documents, document in enumerate(_documents(task, report), start=1):
        if num_documents > limits.documents:
            raise _Refusal(f"it holds more than {limits.documents} documents; split the file")
        metadata = json.dumps(dict(document.metadata))
        if len(metadata) > _MAX_METADATA_CHARS:
            raise _Refusal(f"a record has more than {_MAX_METADATA_CHARS >> 10} KiB of metadata")
        num_chars += len(document.text)
        if num_chars <= limits.text_chars:
            chunks = _split(splitter, document)
            # Every chunk repeats them.
            num_chars += len(chunks) * (len(document.title) + len(metadata))
        if num_chars > limits.text_chars:
            raise _Refusal(
                f"it holds more than {limits.text_chars} characters, metadata and titles of all chunks "
                "counted; split the file"
            )
        num_chunks += len(chunks)
        if num_chunks > limits.chunks:
            raise _Refusal(f"it gives more than {limits.chunks} chunks; split the file")
        header = {
            "id": document.id,
            "hash": document_hash(document, settings),
            "title": document.title,
            "metadata": dict(document.metadata),
            "chunks": len(chunks),
        }
        lines.write(json.dumps(header) + "\n")
        lines.writelines(json.dumps(chunk) + "\n" for chunk in chunks)


def _split(splitter: TokenSplitter, document: Document) -> list[list[Any]]:
    return [
        [chunk.id, chunk.start, chunk.end, chunk.num_tokens, chunk.text]
        for chunk in splitter.split(document)
    ]


def _documents(task: ParseTask, report: LoadReport) -> Iterator[Document]:
    """Documents as the index will have them: under the upload's name, marked as uploaded."""
    from retrievers import RetrievalError, load_file, storable_document

    folder = f"{Path(task.file).parent.name}/"
    try:
        for document in map(storable_document, load_file(task.file, report=report)):
            name = task.prefix + document.id.removeprefix(folder)
            if len(name) > MAX_ID_CHARS:
                raise _Refusal(f"a record's id is longer than {MAX_ID_CHARS} characters")
            yield replace(
                document,
                id=name,
                title=document.title[:_MAX_TITLE_CHARS],
                path=task.name,
                metadata={**document.metadata, "uploaded": True},
            )
    except RetrievalError as error:
        reasons = [reason for _, reason in report.skipped]
        raise _Refusal(reasons[0] if reasons else str(error)) from error


def _check_unpacked(task: ParseTask) -> None:
    """Unpack once in small pieces and count, before anything asks for all of it."""
    if not task.name.lower().endswith(".gz"):
        return
    total = 0
    try:
        with gzip.open(task.file, "rb") as stream:
            while piece := stream.read(_PIECE):
                total += len(piece)
                if total > task.limits.unpacked_bytes:
                    most = task.limits.unpacked_bytes >> 20
                    raise _Refusal(f"it unpacks to more than {most} MiB; split the file")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _Refusal(f"broken gzip file ({error})") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

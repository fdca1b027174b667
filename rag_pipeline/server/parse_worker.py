"""A process that parses one uploaded file, with limits on its time and memory set before it reads a byte.

Run as ``python -m rag_pipeline.server.parse_worker FILE OUT SECONDS BYTES``. Documents go to OUT as JSON
lines; a refusal goes to stderr as one line with exit code 3. Parsers of foreign formats are the part of a
server that an attacker feeds directly: what goes wrong here ends this process only.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

REFUSED = 3
MAX_OUTPUT_BYTES = 256 << 20


def set_limits(seconds: int, num_bytes: int) -> None:
    """Bound CPU time, address space, written bytes and open files of this process."""
    for what, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, num_bytes),
        (resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))


def main(words: list[str]) -> int:
    """Parse one file; see the module."""
    file, out, seconds, num_bytes = Path(words[0]), Path(words[1]), int(words[2]), int(words[3])
    set_limits(seconds, num_bytes)
    from retrievers import LoadReport, RetrievalError, load_file

    report = LoadReport()
    try:
        with out.open("w", encoding="ascii") as lines:
            for document in load_file(file, report=report):
                fields = {
                    "id": document.id,
                    "text": document.text,
                    "title": document.title,
                    "metadata": dict(document.metadata),
                }
                lines.write(json.dumps(fields) + "\n")
    except RetrievalError as error:
        reasons = [reason for _, reason in report.skipped] or [str(error)]
        sys.stderr.write(" ".join(reasons[0].split()) + "\n")
        return REFUSED
    except MemoryError:
        sys.stderr.write(f"parsing needs more than {num_bytes >> 20} MiB of memory\n")
        return REFUSED
    except RecursionError:
        sys.stderr.write("it is nested too deeply\n")
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

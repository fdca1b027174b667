"""A real server with two tenants for the load test, on the loopback address."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from rag_eval.benchmarks.load_run import LoadTarget
from rag_eval.errors import EvalError

OPERATOR_KEY = "load-test-operator-key"
TENANTS = {
    "north": ("load-test-key-of-north", "ZEPHYRMARKNORTH"),
    "south": ("load-test-key-of-south", "QUOKKAMARKSOUTH"),
}
"""Key of each tenant, and a word that stands in each of its chunks and nowhere else."""

_START_S = 600.0
_PROGRAM = "import sys; from rag_pipeline.cli import main; sys.exit(main())"


@contextmanager
def started_server(
    model: str,
    folder: Path,
    flags: Sequence[str] = (),
    *,
    keys: bool = True,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[LoadTarget]:
    """Start the server; its processes are killed in the end.

    Parameters
    ----------
    model : str
        Name or folder.
    folder : Path
        For indexes and the log.
    flags : sequence of str
        Further flags of ``rag-pipeline serve``.
    keys : bool
        Whether it has tenants and an operator's key; else it needs none.
    variables : mapping of str to str
        Added to its environment.

    Raises
    ------
    EvalError
        When it does not start, with the end of its log.
    """
    from rag_pipeline.models import resolve_llm

    model_folder = resolve_llm(model).path
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, mark) in TENANTS.items():
        build_index(folder / name, model_folder, mark)
    tenants = {
        name: {"api_key": key, "index": str(folder / name)} for name, (key, _) in TENANTS.items()
    }
    (folder / "tenants.json").write_text(json.dumps(tenants))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-c", _PROGRAM, "serve", "--model", str(model_folder)]
    command += ["--port", str(port), "--index", str(folder / "operator")]
    if keys:
        command += ["--tenants", str(folder / "tenants.json"), "--api-key", OPERATOR_KEY]
    command += ["--store", str(folder / "kv"), "--context-length", "2048", *flags]
    environment = {**os.environ, "RAG_PIPELINE_INTEGRITY": "on", **variables}
    log = folder / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env=environment
        )
    try:
        _wait_ready(process, log)
        yield LoadTarget(
            url=f"http://127.0.0.1:{port}",
            operator_key=OPERATOR_KEY if keys else "",
            tenants={name: key for name, (key, _) in TENANTS.items() if keys},
            marks={name: mark for name, (_, mark) in TENANTS.items()},
            pid=process.pid,
        )
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def build_index(
    folder: Path, model: Path, mark: str, topics: Mapping[str, str] | None = None
) -> None:
    """Ingest a few topics of CPython's reference with a word in every paragraph."""
    import pydoc_data.topics

    from rag_pipeline.models import resolve_embedder
    from retrievers import Document, Embedder, HFTokenizer, TokenSplitter, ingest

    names = ("with", "lambda", "while", "import")
    texts = topics or {name: pydoc_data.topics.topics[name][:4000] for name in names}
    ingest(
        (
            Document(
                id=name,
                title=f"{name} {mark}",
                text=text.replace("\n\n", f" {mark}\n\n") + f" {mark}",
            )
            for name, text in texts.items()
        ),
        folder,
        splitter=TokenSplitter(HFTokenizer(model), chunk_tokens=96, overlap=0),
        embedder=Embedder(resolve_embedder("all-minilm-l6-v2").path, name="all-minilm-l6-v2"),
    )


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        said = log.read_text(errors="replace")
        if "Ready:" in said:
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise EvalError(f"the server did not start: {' '.join(said[-400:].split())}")
        time.sleep(0.5)

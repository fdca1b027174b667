"""Runs one ingest for the interruption tests: python ingest_child.py INDEX MODEL [STOP_AT].

MODEL is a folder, or ``hash`` for the instant embedder. Prints a JSON line for every progress
report and one for the result. With STOP_AT ``write`` it kills itself the hard way once the commit
has begun; with a number it waits, once so many texts are embedded, for the signal that ends it.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import signal
import sys
import time
from dataclasses import asdict

import retrievers.embedding_reuse
from rag_eval.reliability.instant_parts import HashEmbedder, LineSplitter
from retrievers import Document, Embedder, IngestProgress, ingest

NUM_DOCUMENTS = 330
SHARD_CHUNKS = 32


def documents() -> list[Document]:
    lines = [
        line.strip()
        for topic in sorted(pydoc_data.topics.topics)
        for line in pydoc_data.topics.topics[topic].split("\n")
        if len(line) > 40
    ]
    distinct = list(dict.fromkeys(lines))[:NUM_DOCUMENTS]
    return [Document(id=f"d{i}", text=line, title="t") for i, line in enumerate(distinct)]


def main() -> None:
    # A suite started in the background by a shell inherits an ignored SIGINT, and hands it on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    index, model = sys.argv[1:3]
    stop_at = sys.argv[3] if len(sys.argv) > 3 else ""
    wait_at = int(stop_at) if stop_at.isdigit() else None

    def progress(state: IngestProgress) -> None:
        print(json.dumps({"stage": state.stage, "embedded": state.embedded}), flush=True)
        if state.stage == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if wait_at is not None and state.embedded >= wait_at:
            # Or a busy machine could finish the ingest before the parent gets to strike. Not pause():
            # a signal that comes just before it is not seen, and it waits for ever.
            while True:
                time.sleep(0.05)

    retrievers.embedding_reuse.SHARD_CHUNKS = SHARD_CHUNKS
    embedder = HashEmbedder() if model == "hash" else Embedder(model, device="cpu")
    report = ingest(
        documents(), index, splitter=LineSplitter(), embedder=embedder, progress=progress
    )
    print(json.dumps({"stage": "done", **asdict(report)}), flush=True)


if __name__ == "__main__":
    main()

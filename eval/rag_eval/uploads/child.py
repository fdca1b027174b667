"""The ingest half of a server as a process of its own, driven over its pipes; no engine.

Run as ``python -m rag_eval.uploads.child FOLDER MODEL EMBEDDER TENANT...``. It resumes what the process before it left,
then takes one JSON object per line: ``{"tenant": T, "files": {NAME: BASE64}}`` answers ``{"accepted": ID}`` as
soon as the upload is accepted, ``{"finish": true}`` answers when nothing is under way any more.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

from rag_pipeline.server import ServerSettings
from rag_pipeline.server.embedders import EmbedderPool
from rag_pipeline.server.indexes import ServedIndex
from rag_pipeline.server.ingest_jobs import IngestJobs


def main(words: list[str]) -> int:
    """See the module."""
    folder, model, embedder, tenants = Path(words[0]), Path(words[1]), words[2], words[3:]
    settings = ServerSettings(model=model, embedder=embedder, max_queued_jobs=10_000)
    embedders = EmbedderPool(embedder)
    indexes = {
        (tenant, "main"): ServedIndex("main", folder / tenant, embedders) for tenant in tenants
    }
    jobs = IngestJobs(settings, spool=folder / "spool")
    jobs.resume(indexes)
    _say({"ready": True, "states": _states(jobs, tenants)})
    for line in sys.stdin:
        task = json.loads(line)
        if "finish" in task:
            while "" in (states := _states(jobs, tenants)).values():
                time.sleep(0.05)
            _say({"states": states})
            continue
        upload = jobs.new_folder()
        for name, content in task["files"].items():
            jobs.add_file(upload, name, [base64.b64decode(content)])
        index = indexes[task["tenant"], "main"]
        _say({"accepted": jobs.submit(task["tenant"], index, upload).id})
    jobs.close()
    return 0


def _states(jobs: IngestJobs, tenants: list[str]) -> dict[str, str]:
    """Final state of every job; empty for one that is under way."""
    return {
        job.id: job.state if job.ended else ""
        for tenant in tenants
        for job in jobs.of(tenant, "main")
    }


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

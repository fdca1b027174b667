"""Hostile files through the whole ingest, beside a tenant who only wants to search and upload."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rag_eval.uploads.hostile_files import hostile_files
from rag_pipeline.server import ServerSettings
from rag_pipeline.server.embedders import EmbedderPool
from rag_pipeline.server.indexes import ServedIndex
from rag_pipeline.server.ingest_job import Job
from rag_pipeline.server.ingest_jobs import IngestJobs

_QUESTION = "What does the heron eat?"


def run_hostile_files(
    folder: Path,
    model: Path,
    embedder: str,
    *,
    count: int,
    seed: int = 1,
    scale: float = 1.0,
    job_seconds: int = 120,
    neighbour_every: int = 10,
) -> dict[str, Any]:
    """Upload hostile files as one tenant while another searches and uploads.

    Parameters
    ----------
    folder : Path
        Empty folder for indexes and spool.
    model, embedder : Path, str
        Folder of the language model (its tokenizer), and the embedder.
    count, seed, scale : int, int, float
        As :func:`hostile_files` takes them.
    job_seconds : int
        Limit of one upload, as ``--job-seconds``.
    neighbour_every : int
        Hostile uploads between two of the neighbour's.

    Returns
    -------
    dict
        What was tried; what failed (jobs without an end, faults of the server); the worst values: growth
        of this process, seconds of a job, seconds until a neighbour's upload began, search latencies.
    """
    settings = ServerSettings(
        model=model,
        embedder=embedder,
        job_seconds=job_seconds,
        parse_seconds=max(1, job_seconds // 4),
    )
    embedders = EmbedderPool(embedder)
    embedders.warm()  # as a server's does
    index = {name: ServedIndex("main", folder / name, embedders) for name in ("bad", "good")}
    jobs = IngestJobs(settings, spool=folder / "spool")
    try:
        _end_of(_upload(jobs, "good", index["good"], "heron.txt", b"The heron eats silver eels."))
        _end_of(_upload(jobs, "bad", index["bad"], "start.txt", b"A harmless start."))
        # The first ones load and warm up.
        idle = _search_times(index["good"], threading.Event(), at_most=500)[20:]
        before = _resident_bytes()
        grown = longest = waited = 0.0
        ends: dict[str, dict[str, int]] = {}
        faults: list[str] = []
        stop = threading.Event()
        searcher = ThreadPoolExecutor(1)
        searching = searcher.submit(_search_times, index["good"], stop, at_most=1 << 30)
        for number, (kind, name, content) in enumerate(
            hostile_files(count, seed=seed, scale=scale)
        ):
            began = time.monotonic()
            job = _upload(jobs, "bad", index["bad"], name, content)
            if number % neighbour_every == 0:
                asked = time.monotonic()
                mine = _upload(jobs, "good", index["good"], "mine.txt", f"Note {number}.".encode())
                while mine.state == "queued":
                    time.sleep(0.005)
                waited = max(waited, time.monotonic() - asked)
                _end_of(mine)
            while not job.ended:
                time.sleep(0.02)
                grown = max(grown, _resident_bytes() - before)
            longest = max(longest, time.monotonic() - began)
            counts = ends.setdefault(kind, {"done": 0, "failed": 0})
            counts[job.state] += 1
            if "fault of this server" in str(job.error):
                faults.append(f"{name}: {job.error}")
        stop.set()
        busy = searching.result()
    finally:
        stop.set()
        jobs.close()
    return {
        "tried": {"files": count, "seed": seed, "scale": scale},
        "ends": ends,
        "failed": {"faults": faults},
        "worst": {
            "grown_bytes": int(grown),
            "job_s": round(longest, 2),
            "neighbour_starts_s": round(waited, 3),
            "search_p99_idle_s": round(_p99(idle), 4),
            "search_p99_s": round(_p99(busy), 4),
        },
    }


def _upload(jobs: IngestJobs, tenant: str, index: ServedIndex, name: str, content: bytes) -> Job:
    folder = jobs.new_folder()
    jobs.add_file(folder, name, [content])
    return jobs.submit(tenant, index, folder)


def _end_of(job: Job) -> None:
    while not job.ended:
        time.sleep(0.01)


def _search_times(index: ServedIndex, stop: threading.Event, *, at_most: int) -> list[float]:
    times: list[float] = []
    while len(times) < at_most and not stop.is_set():
        began = time.monotonic()
        index.search(_QUESTION, k=1, mode="dense")
        times.append(time.monotonic() - began)
        time.sleep(0.02)
    return times


def _p99(times: list[float]) -> float:
    return sorted(times)[min(len(times) - 1, int(0.99 * len(times)))]


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0

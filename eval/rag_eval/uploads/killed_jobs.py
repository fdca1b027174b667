"""Servers killed after they accepted uploads: each upload must be finished, or reported as failed."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from retrievers import Index

_TENANTS = ("acme", "globex")
_LONGEST_S = 1.5
_SENTENCES = (
    "The grey heron of Lake Umbra eats silver eels.",
    "Turbine nine is cooled with rain water.",
    "The keeper paints the door of the lighthouse purple.",
)


def run_killed_jobs(
    folder: Path, model: Path, embedder: str, *, kills: int, seed: int = 1
) -> dict[str, Any]:
    """Accept uploads, kill the process with SIGKILL at a random moment, start the next one; then look.

    Parameters
    ----------
    folder : Path
        Empty folder for indexes, spool and temporary files.
    model, embedder : Path, str
        Folder of the language model (its tokenizer), and the embedder.
    kills : int
        How often.
    seed : int
        Of files and moments.

    Returns
    -------
    dict
        What was tried; what failed (uploads without an end, done ones that are not in the index, files
        left behind); the worst value: the uploads lost.
    """
    rng = random.Random(seed)
    (folder / "tmp").mkdir()
    accepted: dict[str, tuple[str, list[str]]] = {}
    ends: dict[str, str] = {}
    for number in range(kills):
        with _Child(folder, model, embedder) as child:
            ends |= child.ends
            for part in range(rng.randrange(1, 4)):
                tenant = rng.choice(_TENANTS)
                names = [f"u{number}-{part}-{i}.txt" for i in range(rng.randrange(1, 3))]
                files = {name: _text(rng, name) for name in names}
                accepted[child.upload(tenant, files)] = (tenant, names)
            time.sleep(rng.uniform(0, _LONGEST_S))
    with _Child(folder, model, embedder, kill=False) as child:
        ends |= child.ends
        ends |= child.finish()
    without_end = [job for job in accepted if not ends.get(job)]
    missing = [job for job, (tenant, names) in accepted.items() if ends.get(job) == "done"
               and not {f"uploads/{name}" for name in names} <= _ids(folder / tenant)]  # fmt: skip
    left = [str(path.relative_to(folder)) for path in _left(folder)]
    return {
        "tried": {"kills": kills, "uploads": len(accepted)},
        "ends": dict(Counter(ends.get(job) or "none" for job in accepted)),
        "failed": {"without_end": without_end, "done_but_missing": missing, "files_left": left},
        "worst": {"uploads_lost": len(without_end) + len(missing)},
    }


def _text(rng: random.Random, name: str) -> bytes:
    return f"{name}. {' '.join(rng.choices(_SENTENCES, k=rng.randrange(1, 200)))}".encode()


def _ids(index: Path) -> set[str]:
    with Index.open(index, verify=True) as opened:
        return {record.id for record in opened.documents()}


def _left(folder: Path) -> list[Path]:
    """Files of uploads that nobody needs any more, and all in the temporary folder."""
    known = ("job.json", ".lock")
    places = (folder / "spool", folder / "tmp")
    found = [path for place in places for path in place.rglob("*") if path.is_file()]
    return [path for path in found if path.name not in known]


class _Child:
    """One server process."""

    def __init__(self, folder: Path, model: Path, embedder: str, *, kill: bool = True) -> None:
        self._kill = kill
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "rag_eval.uploads.child"),
                *(str(folder), str(model), embedder, *_TENANTS),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(folder / "tmp")},
            text=True,
        )
        self.ends: dict[str, str] = {}

    def __enter__(self) -> _Child:
        self.ends = self._known(self._hear()["states"])
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._kill:
            self._process.kill()
        self._process.communicate(timeout=120)

    def upload(self, tenant: str, files: dict[str, bytes]) -> str:
        """Upload; gives the id once it is accepted."""
        content = {name: base64.b64encode(data).decode() for name, data in files.items()}
        return str(self._ask({"tenant": tenant, "files": content})["accepted"])

    def finish(self) -> dict[str, str]:
        """Wait for everything that is under way."""
        return self._known(self._ask({"finish": True})["states"])

    @staticmethod
    def _known(states: dict[str, str]) -> dict[str, str]:
        return {job: state for job, state in states.items() if state}

    def _ask(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server process ended by itself ({self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer

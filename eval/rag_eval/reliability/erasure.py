"""A document is uploaded, asked about and deleted: where its text and tokens are left, and for how long."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import httpx
import numpy as np

from chunk_cache import StoreFolder
from rag_eval.benchmarks.load_requests import ASK, DOCUMENTS, SEARCH
from rag_eval.benchmarks.load_server import started_server
from rag_eval.reliability.figure import Outcome, Plan
from rag_eval.reliability.small_state import CONTEXT, holds, record

GONE_S, OVER_BUDGET = 60.0, 0.01
SERVER_BUDGET = 48 << 20
_BUILDS, _DISTINCT, _HELD = 100_000, 400, 100
_AGAIN_S = 5.0
"""How long is watched whether a request under way brings back what is gone, seconds."""


def run(plan: Plan) -> Outcome:
    """Full size: 20 documents on a server, and 100,000 builds into a store with a budget."""
    outcome = Outcome()
    documents, builds = plan.size(20, 1), plan.size(_BUILDS, 1_000)
    if builds < _BUILDS:
        outcome.note = f"{documents} of 20 documents, {builds} of {_BUILDS} builds"
    _keeps_budget(plan.folder / "store", builds, outcome)
    home, tmp = plan.folder / "home", plan.folder / "tmp"
    tmp.mkdir(mode=0o700)
    variables = {
        "RAG_PIPELINE_HOME": str(home),
        "TMPDIR": str(tmp),
        "RAG_PIPELINE_FUSION": json.dumps({"store_dir_bytes": SERVER_BUDGET}),
    }
    server = plan.folder / "server"
    with (
        started_server(plan.model, server, variables=variables) as target,
        httpx.Client(
            base_url=target.url,
            timeout=300,
            trust_env=False,
            headers={"Authorization": f"Bearer {target.tenants['north']}"},
        ) as client,
    ):
        for number in range(documents):
            outcome.tried += 1
            _erase_one(client, number, [server, home, tmp], plan.model, outcome)
            kept = sum(path.stat().st_size for path in (server / "kv").rglob("*.safetensors"))
            outcome.measure("server_store_over_budget", kept / SERVER_BUDGET - 1, OVER_BUDGET)
        for path in (server / "kv", server / "north", home):
            _is_private(_tree(path), outcome)
        # Libraries make folders there too; it is closed to others itself.
        _is_private([path for path in tmp.rglob("*") if path.is_file()], outcome)
    return outcome


def _keeps_budget(folder: Path, builds: int, outcome: Outcome) -> None:
    """Store records on and on, as an engine's writer does, and weigh the folder."""
    records = [record(number) for number in range(_DISTINCT)]
    probe = StoreFolder(folder / "probe", create=True)
    probe.put(records[0], context=CONTEXT)
    budget = _HELD * probe.size_of(records[0].key)
    store = StoreFolder(folder / "kv", create=True, byte_budget=budget)
    most = 0
    for number in range(builds):
        outcome.tried += 1
        if not store.put(records[number % _DISTINCT], context=CONTEXT):
            outcome.fault(f"build {number} found no room")
        if number % 97 == 0 or number == builds - 1:
            most = max(most, sum(store.size_of(key) for key in store.keys()))  # noqa: SIM118 - a store, not a mapping
    if builds > _HELD and most < budget / 2:
        outcome.fault(f"{builds} builds filled {most} of {budget} bytes only")
    outcome.measure("store_over_budget", most / budget - 1, OVER_BUDGET)
    _is_private(_tree(store.path), outcome)


def _erase_one(
    client: httpx.Client, number: int, folders: list[Path], model: str, outcome: Outcome
) -> None:
    """Upload, ask, look that it is there, delete, wait until it is nowhere, and look again."""
    # No 32 characters of it are in the text of another number: that would be erased for minutes.
    mark = f"{ascii_lowercase[number % 26]}quillwort"
    text = " ".join(
        f"The {mark} of bay {n} counted {n * 37 + number} {mark} lanterns before {mark} met the storm of 18{n:02}."
        for n in range(10, 22)
    )
    name = f"log-{number}.txt"
    job = client.post(DOCUMENTS, files=[("file", (name, text.encode()))])
    if job.status_code != 202 or not _done(client, job.json()["id"]):
        outcome.fault(f"the upload of {name} did not end as done: {job.text[:200]}")
        return
    runs = _token_runs(model, mark)
    found: dict[str, list[Path]] = {}
    for _ in range(20):
        _ask(client)
        found = _occurrences(folders, mark, runs)
        if found["text"] and found["tokens"]:
            break
        time.sleep(1)
    for kind, paths in found.items():
        if not paths:
            outcome.fault(f"{kind} of {name} was not on the disk before its deletion")
    began = time.monotonic()
    answer = client.delete(f"{DOCUMENTS}/uploads/{name}")
    if answer.status_code != 200:
        outcome.fault(f"DELETE of {name}: {answer.status_code} {answer.text[:200]}")
        return
    outcome.measure("delete_s", time.monotonic() - began)
    while any((found := _occurrences(folders, mark, runs)).values()):
        if time.monotonic() - began > GONE_S:
            break
        time.sleep(0.25)
    outcome.measure("gone_after_s", time.monotonic() - began, GONE_S)
    if mark in client.post(SEARCH, json={"query": text[:80], "k": 5}).text:
        outcome.fault(f"a search still finds {name}")
    until = time.monotonic() + _AGAIN_S
    while time.monotonic() < until:
        _ask(client)
    found = _occurrences(folders, mark, runs)
    outcome.measure("occurrences", sum(map(len, found.values())))
    for kind, paths in found.items():
        for path in paths:
            outcome.fault(f"{kind} of {name} is left in {path.relative_to(folders[0].parent)}")


def _done(client: httpx.Client, job: str) -> bool:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        state = str(client.get(f"/v1/rag/jobs/{job}").json()["state"])
        if state in ("done", "failed"):
            return state == "done"
        time.sleep(0.1)
    return False


def _ask(client: httpx.Client) -> None:
    """Ask for the document, without a word that tells it from others."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "How many lanterns before the storm?"}],
        "max_tokens": 4,
        "rag": {"k": 2, "policy": "query"},
    }
    client.post(ASK, json=body).raise_for_status()


def _token_runs(model: str, mark: str) -> list[bytes]:
    """Bytes of token ids that only a text with this word has."""
    from rag_pipeline.models import resolve_llm
    from retrievers import HFTokenizer

    # The first is another one in the middle of a text.
    ids = HFTokenizer(resolve_llm(model).path).encode(f"The {mark} of")[1:]
    return [np.asarray(ids, dtype=kind).tobytes() for kind in ("<i4", "<i8")]


def _occurrences(folders: list[Path], mark: str, runs: list[bytes]) -> dict[str, list[Path]]:
    """Files that hold the text, and files that hold its token ids."""
    found: dict[str, list[Path]] = {"text": [], "tokens": []}
    for folder in folders:
        found["text"] += holds(folder, mark)
        found["tokens"] += [path for run in runs for path in holds(folder, run)]
    return found


def _tree(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]


def _is_private(paths: Iterable[Path], outcome: Outcome) -> None:
    for path in paths:
        mode = stat.S_IMODE(path.lstat().st_mode)
        if mode & 0o077 and not path.is_symlink():
            outcome.fault(f"{path} has mode {mode:o}")

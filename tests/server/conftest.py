"""One real server for the whole folder: SGLang with the plugin, a tiny random model, and tenants, one with a damaged index."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from uploads import Uploads

from rag_eval.benchmarks.tiny_model import write_tiny_model
from rag_pipeline.server import ServerSettings
from rag_pipeline.server.embedders import EmbedderPool

OPERATOR_KEY = "operator-key-0123456789"
ACME_KEY = "acme-key-0123456789abcdef"
GLOBEX_KEY = "globex-key-0123456789abcdef"
BROKEN_KEY = "broken-key-0123456789abcdef"

# Sentences that only one tenant has; they must never be seen by another.
ACME_SECRET = "The purple walrus guards vault seventeen under the old lighthouse of Brenmark."
GLOBEX_SECRET = "Turbine nine is cooled with distilled rain water from the northern reservoir."


@dataclass
class Server:
    """A running server and the keys to it."""

    url: str
    pid: int
    folder: Path
    log: Path
    keys: dict[str, str] = field(default_factory=dict)

    def client(self, tenant: str | None = "operator", **options: Any) -> httpx.Client:
        headers = {} if tenant is None else {"Authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=300, trust_env=False, **options
        )

    def post(self, path: str, body: Any, tenant: str | None = "operator") -> httpx.Response:
        with self.client(tenant) as client:
            return client.post(path, json=body)

    @staticmethod
    def is_one_line(refusal: httpx.Response) -> bool:
        """Whether an answer is an error of one line that gives its own status code."""
        error = refusal.json()["error"]
        message = error["message"]
        return bool(message) and "\n" not in message and error["code"] == refusal.status_code

    def internal_state(self) -> dict[str, Any]:
        with self.client() as client:
            return client.get("/server_info").json()["internal_states"][0]

    def wait_idle(self) -> None:
        """Until nothing runs or waits, requests of the scheduler itself included."""
        deadline = time.monotonic() + 240
        with self.client() as client:
            while client.post("/flush_cache").status_code != 200:
                assert time.monotonic() < deadline, "the server does not come to rest"
                time.sleep(0.2)


@pytest.fixture(scope="session")
def tiny_llm(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights behind the packaged model's tokenizer and chat template: starts and answers fast."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-llm"), smollm2_path, layers=5)


@pytest.fixture(scope="session")
def make_index(tiny_llm: Path, minilm_path: Path) -> Callable[[Path, dict[str, str]], Path]:
    """Ingest texts into a folder, with the packaged embedder."""

    def make(folder: Path, texts: dict[str, str]) -> Path:
        from retrievers import Document, Embedder, HFTokenizer, TokenSplitter, ingest

        ingest(
            (Document(id=name, title=name, text=text) for name, text in texts.items()),
            folder,
            splitter=TokenSplitter(HFTokenizer(tiny_llm), chunk_tokens=96, overlap=0),
            embedder=Embedder(minilm_path, name="all-minilm-l6-v2"),
        )
        return folder

    return make


def topic_texts(*names: str) -> dict[str, str]:
    import pydoc_data.topics

    return {name: pydoc_data.topics.topics[name] for name in names}


@pytest.fixture(scope="session")
def rag_server(
    tiny_llm: Path,
    make_index: Callable[[Path, dict[str, str]], Path],
    serving: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """The server; its process group is killed in the end."""
    folder = tmp_path_factory.mktemp("rag-server")
    make_index(folder / "topics", topic_texts("with", "lambda", "while", "import"))
    make_index(folder / "acme", {"vaults": ACME_SECRET, **topic_texts("pass")})
    make_index(folder / "globex", {"turbines": GLOBEX_SECRET})
    make_index(folder / "broken", topic_texts("del"))
    damaged = next((folder / "broken").rglob("*.faiss"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    tenants = {
        "broken": {"api_key": BROKEN_KEY, "index": {"hurt": str(folder / "broken")}},
        "acme": {"api_key": ACME_KEY, "index": str(folder / "acme")},
        "globex": {
            "api_key": GLOBEX_KEY,
            "index": {"plant": str(folder / "globex"), "fresh": str(folder / "globex-fresh")},
        },
    }
    (folder / "tenants.json").write_text(json.dumps(tenants))
    words: list[str | Path] = [
        sys.executable,
        "-c",
        "import sys; from rag_pipeline.cli import main; sys.exit(main())",
    ]
    words += ["serve", "--model", tiny_llm, "--api-key", OPERATOR_KEY]
    words += ["--index", folder / "topics", "--index", f"extra={folder / 'extra'}"]
    words += ["--tenants", folder / "tenants.json", "--store", folder / "kv"]
    words += ["--max-upload-mb", "1", "--parse-seconds", "5", "--parse-memory-mb", "512"]
    words += ["--max-total-tokens", "8192", "--context-length", "2048"]
    log = folder / "log.txt"

    def ready(url: str) -> bool:
        return "Ready:" in log.read_text(errors="replace")

    with serving(words, log, ready=ready, RAG_PIPELINE_INTEGRITY="on") as (url, pid):
        keys = {
            "operator": OPERATOR_KEY,
            "acme": ACME_KEY,
            "globex": GLOBEX_KEY,
            "broken": BROKEN_KEY,
        }
        yield Server(url=url, pid=pid, folder=folder, log=log, keys=keys)


@pytest.fixture(scope="module")
def embedders(minilm_path: Path) -> EmbedderPool:
    return EmbedderPool(str(minilm_path))


@pytest.fixture
def make_uploads(
    tmp_path: Path, smollm2_path: Path, embedders: EmbedderPool
) -> Iterator[Callable[..., Uploads]]:
    made: list[Uploads] = []

    def make(**limits: Any) -> Uploads:
        settings = ServerSettings(model=smollm2_path, embedder=embedders.default, **limits)
        made.append(Uploads(tmp_path, settings, embedders))
        return made[-1]

    yield make
    for uploads in made:
        uploads.jobs.close()

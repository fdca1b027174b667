"""One real server process with a tiny random model for the whole folder, and a client of it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from chunk_cache import ChunkKey, ChunkKV, KVContext, StoreFolder
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin import FUSION_VARIABLE, FusionConfig

BYTES = 256
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SYSTEM = "Answer from the passages."
PASSAGES = [
    "The lighthouse of Port Ellery was painted green in 1931 by its keeper, who liked the colour. ",
    "The bridge over the Tarn has seven arches of red stone and a toll house at its northern end. ",
    "In the mill of Aldermoor the wheel is older than the walls, which burned down more than once. ",
]
QUESTION = "Which of these buildings is the oldest?"


def write_tokenizer(folder: Path) -> None:
    """One token per byte: ids of a text do not depend on what stands around it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == BYTES
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def model(tiny_model) -> Path:
    folder = tiny_model("llama", "llama-bytes", vocab_size=BYTES + 8)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def encode(model: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def fill_store(path: Path) -> None:
    """Make a chunk folder with one pinned record, of some other model."""
    context = KVContext(
        model_fingerprint="other", dtype="float32", kv_dtype="float32", rope="{}", prefix_digest="-"
    )
    record = ChunkKV(
        key=ChunkKey.of(context, range(70)),
        token_ids=torch.arange(70, dtype=torch.int32).numpy(),
        base_position=3,
        k=torch.randn(2, 70, 2, 16),
        v=torch.randn(2, 70, 2, 16),
    )
    folder = StoreFolder(path, create=True)
    folder.put(record, context=context)
    folder.pin(record.key)


@pytest.fixture(scope="session")
def server(
    model: Path, sglang_server: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("server")
    fill_store(folder / "kv")
    log = folder / "log.txt"
    variables = {
        FUSION_VARIABLE: FusionConfig(store_dir=str(folder / "kv"), automatic=True).to_env()
    }
    options = {"dtype": "float32", "max_total_tokens": 4096, "random_seed": 1}
    flags = {"enable_metrics": True, "sleep_on_idle": True}
    with sglang_server(model, log, variables, **options, **flags) as url:
        yield {"url": url, "log": log}


class Client:
    """Requests of a test, and the server's counters."""

    def __init__(self, server: dict[str, Any]) -> None:
        self.url: str = server["url"]

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120, trust_env=False)

    def ok(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Messages of a stream, which must end with the end mark."""
        url = f"{self.url}{path}"
        with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as answer:
            assert answer.status_code == 200
            data = [line[5:].strip() for line in answer.iter_lines() if line.startswith("data:")]
        assert data.pop() == "[DONE]"
        return [json.loads(text) for text in data]

    def generate(self, ids: list[int], fusion: FusionRequest | None, **fields: Any) -> Any:
        hints = {} if fusion is None else {"kv_hints": fusion.to_kv_hints()}
        sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
        return self.ok("/generate", body | hints | fields)

    def flush(self) -> None:
        """Empty the radix tree; it refuses while anything runs."""
        deadline = time.monotonic() + 60
        while self.post("/flush_cache", {}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def metrics(self) -> dict[str, float]:
        """Our samples of ``/metrics``, by name and kind."""
        text = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text
        found: dict[str, float] = {}
        for line in text.splitlines():
            match = re.match(r"rag_fusion:(\w+)\{(.*)\} (\S+)$", line)
            if match and 'le="' not in match[2]:
                kind = re.search(r'kind="(\w+)"', match[2])
                name = match[1].removesuffix("_total")
                found[f"{name}.{kind[1]}" if kind else name] = float(match[3])
        return found

    def moved(self, before: dict[str, float]) -> dict[str, float]:
        """By how much each sample has grown since ``before``."""
        after = self.metrics()
        return {name: after[name] - before.get(name, 0) for name in after}

    def state(self) -> dict[str, Any]:
        info = httpx.get(f"{self.url}/server_info", timeout=30, trust_env=False).json()
        return info["internal_states"][0]["rag_fusion"]


@pytest.fixture(scope="session")
def client_of() -> type[Client]:
    """Makes a client of a server of one's own: ``client_of({"url": url})``."""
    return Client


@pytest.fixture(scope="session")
def client(server) -> Client:
    return Client(server)


@pytest.fixture(scope="session")
def layout(encode):
    """Ids and spans of ``[system][passages in reverse][question]``, and the passages' prompts for building."""
    system, question = encode(SYSTEM + "\n"), encode("\n" + QUESTION)
    ids, spans = list(system), []
    for text in reversed(PASSAGES):
        chunk = encode(text)
        spans.append((len(ids), len(ids) + len(chunk)))
        ids += chunk
    builds = [(system + encode(t), (len(system), len(system) + len(encode(t)))) for t in PASSAGES]
    return {
        "ids": ids + question,
        "spans": tuple(spans),
        "builds": builds,
        "system": len(system),
        "texts": (SYSTEM, PASSAGES, QUESTION),
    }


@pytest.fixture(scope="session")
def built(client: Client, layout) -> list[Any]:
    """Reports of the requests that stored the passages, sent to ``/generate`` with ``kv_hints``."""
    reports = []
    for ids, span in layout["builds"]:
        fusion = FusionRequest(mode="build", spans=(span,), prefix_len=span[0])
        reports.append(client.generate(ids, fusion)["meta_info"]["rag_fusion"])
    return reports

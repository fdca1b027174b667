"""The server backend: a real SGLang server in its own process, and things that are not one."""

from __future__ import annotations

import asyncio
import http.server
import json
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from answering import answering

from rag_pipeline import EngineError, ServerBackend
from rag_pipeline.prompts.builder import PromptBuilder
from rag_pipeline.protocol import GenerationRequest, SamplingOptions


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_answers() -> None:
    port = free_port()
    with pytest.raises(EngineError, match=rf"no server answers at http://127\.0\.0\.1:{port}"):
        ServerBackend(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("url", ["ftp://host:1", "http://", "http://:80", ""])
def test_malformed_url(url: str) -> None:
    with pytest.raises(EngineError, match="malformed; write it as http://HOST:PORT"):
        ServerBackend(url)


def test_another_kind_of_server(tmp_path: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(EngineError, match="is not an SGLang server") as error:
            ServerBackend(f"http://127.0.0.1:{other.server_port}")
        assert "\n" not in str(error.value)
        other.shutdown()


MODEL_INFO = {"model_path": "m", "is_generation": True}
ENGINE = {"max_req_input_len": 2042, "incremental_streaming_output": True}
NOT_YOURS = {"error": {"message": "a tenant's key does not open this route", "code": 403}}


@pytest.mark.parametrize("plugin", [200, 503])
def test_a_tenants_key_is_enough(plugin: int) -> None:
    answers: dict[str, tuple[int, Any]] = {
        "/model_info": (200, MODEL_INFO),
        "/server_info": (403, NOT_YOURS),
        "/v1/rag/health": (plugin, {"status": "ok", "engine": ENGINE}),
    }
    with answering(answers) as url:
        backend = ServerBackend(url, api_key="tenant")
        assert (backend.context_length, backend._incremental) == (2042, True)
        backend.close()
        with pytest.raises(EngineError, match="wants an API key; give its --api-key"):
            ServerBackend(url)


def test_a_stock_server_needs_no_route_of_this_project() -> None:
    info = {"version": "0.5.23", "context_length": 4096, "incremental_streaming_output": False}
    with answering({"/model_info": (200, MODEL_INFO), "/server_info": (200, info)}) as url:
        backend = ServerBackend(url, api_key="key")
        assert (backend.context_length, backend._incremental) == (4096, False)
        backend.close()


def test_a_key_that_was_given_is_not_asked_for() -> None:
    for answers in (
        {"/model_info": (200, MODEL_INFO), "/server_info": (403, NOT_YOURS)},
        {"/model_info": (403, NOT_YOURS)},
    ):
        with answering(answers) as url, pytest.raises(EngineError) as error:
            ServerBackend(url, api_key="tenant")
        assert "with the API key that was given (403: a tenant's key does not" in str(error.value)
        assert "\n" not in str(error.value)


def is_idle(url: str) -> bool:
    """The server flushes its cache only when nothing runs or waits."""
    return httpx.post(f"{url}/flush_cache", timeout=30, trust_env=False).status_code == 200


def wait_idle(url: str) -> None:
    deadline = time.monotonic() + 60
    while not is_idle(url):
        assert time.monotonic() < deadline, "the server did not become idle"
        time.sleep(0.2)


@pytest.mark.engine
@pytest.mark.slow
def test_real_server(model_server: str, smollm2_path: Path, tmp_path: Path) -> None:
    backend = ServerBackend(model_server.removeprefix("http://"))
    assert backend.model_path == str(smollm2_path)
    assert 4000 < backend.context_length <= 4096
    backend.check_model(smollm2_path)

    layout = PromptBuilder(smollm2_path).build("What is two plus two?", [], max_new_tokens=12)
    request = GenerationRequest(
        input_ids=layout.input_ids, sampling=SamplingOptions(max_new_tokens=12)
    )
    pieces = list(backend.generate(request))
    text = "".join(piece.text for piece in pieces)
    assert len(pieces) > 1
    assert text
    assert pieces[-1].meta_info["prompt_tokens"] == len(layout.input_ids)

    async def collect() -> str:
        return "".join([piece.text async for piece in backend.agenerate(request)])

    wait_idle(model_server)
    assert asyncio.run(collect()) == text

    # Leaving early aborts: 3,000 tokens would keep a CPU busy far longer than the wait below.
    long = GenerationRequest(
        input_ids=layout.input_ids,
        sampling=SamplingOptions(max_new_tokens=3000, temperature=1.0),
    )
    stream = backend.generate(long)
    next(stream)
    stream.close()
    wait_idle(model_server)

    too_long = GenerationRequest(input_ids=(5,) * 9000)
    with pytest.raises(EngineError, match=r"the server .*(refused|aborted) the request") as error:
        list(backend.generate(too_long))
    assert "\n" not in str(error.value)

    # A folder with another vocabulary is refused before it makes noise.
    other = tmp_path / "other"
    shutil.copytree(smollm2_path, other, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["model"]["merges"] = settings["model"]["merges"][:1000]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(EngineError, match="whose tokenizer is not that of"):
        backend.check_model(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    with pytest.raises(EngineError, match="whose architecture is not that of"):
        backend.check_model(other)
    backend.close()

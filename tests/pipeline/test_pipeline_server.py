"""The server backend: a real SGLang server in its own process, and things that are not one."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rag_pipeline import EngineError, ServerBackend
from rag_pipeline.prompt_layout import PromptBuilder
from rag_pipeline.types import GenerationRequest, SamplingOptions


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


@pytest.fixture(scope="module")
def server_url(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "sglang.launch_server"]
    options = {
        "model-path": smollm2_path,
        "host": "127.0.0.1",
        "port": port,
        "attention-backend": "rag_cpu",
        "sampling-backend": "pytorch",
        "max-total-tokens": 4096,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    command += ["--disable-cuda-graph", "--skip-server-warmup"]
    with log.open("wb") as out:
        # Its own process group: SGLang's children must end with it.
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 500
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, 9)
        process.wait()


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
def test_real_server(server_url: str, smollm2_path: Path, tmp_path: Path) -> None:
    backend = ServerBackend(server_url.removeprefix("http://"))
    assert backend.model_path == str(smollm2_path)
    assert 4000 < backend.context_length < 4096
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

    wait_idle(server_url)
    assert asyncio.run(collect()) == text

    # Leaving early aborts: 3,000 tokens would keep a CPU busy far longer than the wait below.
    long = GenerationRequest(
        input_ids=layout.input_ids,
        sampling=SamplingOptions(max_new_tokens=3000, temperature=1.0),
    )
    stream = backend.generate(long)
    next(stream)
    stream.close()
    wait_idle(server_url)

    too_long = GenerationRequest(input_ids=(5,) * 5000)
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

"""One real SGLang server for the chat model and the runnable."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest


@pytest.fixture(scope="session")
def rag_server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of stock SGLang with the plugin and the packaged model.

    ``RAG_PIPELINE_TEST_SERVER`` names one that is already running.
    """
    running = os.environ.get("RAG_PIPELINE_TEST_SERVER")
    if running:
        yield running
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("langchain-server") / "log.txt"
    command = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1"]
    command += ["--model-path", str(smollm2_path), "--port", str(port)]
    command += ["--attention-backend", "rag_cpu", "--sampling-backend", "pytorch"]
    command += ["--max-total-tokens", "8192", "--disable-cuda-graph", "--skip-server-warmup"]
    command += ["--sleep-on-idle"]
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

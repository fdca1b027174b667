"""What every area shares: no network but this machine, real models, one real engine a session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# One thread a process: several processes with a thread a core each wait for one another at every
# operation on a small machine (a request of a second took minutes), and results then do not depend
# on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test that asks a hub is a broken test; this makes it fail at once instead of after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Allow sockets to this machine only (engine processes talk over them)."""
    from pytest_socket import socket_allow_hosts

    socket_allow_hosts(["127.0.0.1", "localhost", "::1", "0.0.0.0"], allow_unix_socket=True)


@pytest.fixture(scope="session")
def pipeline_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``RAG_PIPELINE_HOME`` that outlives the session, so that the model is converted once.

    The given home where one is set, else the user's; a fresh folder would cost a conversion of
    half a minute in every run.
    """
    from rag_pipeline.config import home_dir

    return home_dir()


@pytest.fixture(scope="session")
def smollm2_path(pipeline_home: Path) -> Path:
    """Folder of the packaged language model in Hugging Face format."""
    from rag_pipeline.models import resolve_llm

    return resolve_llm("smollm2-135m").path


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Folder of the packaged embedder."""
    from rag_pipeline.models import resolve_embedder

    return resolve_embedder("all-minilm-l6-v2").path


@pytest.fixture(scope="session")
def engine(smollm2_path: Path) -> Iterator[Any]:
    """A real in-process SGLang engine with the packaged model, shared by the whole session.

    Leave it as you found it: no settings changed, ``flush_cache()`` before measuring cache hits.
    """
    from rag_pipeline.sglang_plugin import create_engine

    running = create_engine(str(smollm2_path), max_total_tokens=16384)
    yield running
    running.shutdown()
    sys.stderr.flush()

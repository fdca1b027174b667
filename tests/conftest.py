"""What every area shares: no network but this machine, real models, one real engine a session."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
from kept_fork_server import keep_fork_server
from warm import WarmProcess, WarmStart

# One thread per process: several processes with one thread per core each wait for one another at every
# operation on a small machine (a request of a second took minutes), and results then do not depend
# on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test that asks a hub is a broken test; this makes it fail at once instead of after retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest_plugins = ("sharing",)


def _home_of_this_process() -> None:
    """Give each process that runs the suite a home of its own, with the user's converted models.

    A conversion takes half a minute. Engines read in the home what was deleted, and let go of its
    KV: those of another process, and the user's own, would lose what they hold.
    """
    from rag_pipeline.config import home_dir

    models = (home_dir() / "models").resolve()
    home = tempfile.TemporaryDirectory(prefix="rag-home-")
    models.mkdir(parents=True, exist_ok=True)
    (Path(home.name) / "models").symlink_to(models)
    atexit.register(home.cleanup)
    os.environ["RAG_PIPELINE_HOME"] = home.name


_home_of_this_process()
_HOME = os.environ["RAG_PIPELINE_HOME"]
"""A test that sets another home has all of it."""


@pytest.fixture(autouse=True)
def _notices_of_this_test_alone(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that one test deletes is not to go from an engine that another test uses."""
    if os.environ.get("RAG_PIPELINE_HOME") == _HOME:
        folder = tmp_path_factory.mktemp("erased", numbered=True)
        monkeypatch.setattr("rag_pipeline.erasure.board", lambda: folder)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Allow sockets to this machine only (engine processes talk over them)."""
    from pytest_socket import socket_allow_hosts

    socket_allow_hosts(["127.0.0.1", "localhost", "::1", "0.0.0.0"], allow_unix_socket=True)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
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

    keep_fork_server()
    # The harness forces gold answers on it; requests that force nothing are none the wiser.
    running = create_engine(
        str(smollm2_path), max_total_tokens=16384, enable_custom_logit_processor=True
    )
    yield running
    running.shutdown()
    sys.stderr.flush()


@functools.cache
def _warm() -> WarmStart:
    """The process that starts programs: one as long as the suite runs, so no fixture's to end."""
    started = WarmStart()
    atexit.register(started.close)
    return started


@pytest.fixture(scope="session")
def warm_start() -> WarmStart:
    """Starts programs without their imports."""
    return _warm()


_served: dict[int, WarmProcess] = {}


@contextmanager
def _serving(
    words: Sequence[str | Path], log: Path, *, ready: Callable[[str], bool], **variables: str
) -> Iterator[tuple[str, int]]:
    """A server in a process of its own; its URL and process number.

    Parameters
    ----------
    words
        The command line; ``--host`` and ``--port`` are added.
    log
        File of what it prints, shown in part when it ends before it is ready.
    ready
        Tells from the URL whether it may be asked.
    variables
        Added to its environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [*map(str, words), "--host", "127.0.0.1", "--port", str(port)]
    process = _warm().popen(command, environment=os.environ | variables, stdout=log)
    _served[process.pid] = process
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 600
        while not ready(url):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.kill_group()  # SGLang's children among it
        process.wait()
        del _served[process.pid]


@pytest.fixture(scope="session")
def exit_code() -> Callable[[int], int]:
    """``exit_code(pid)``: wait for a server of `serving` to end, and say how it did."""
    return lambda pid: _served[pid].wait()


def _answers_health(url: str) -> bool:
    """Whether SGLang says at ``/health`` that it serves."""
    # Asked often while the server needs the processor: a client with all its means is not for that.
    connection = HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """``with serving(words, log, ready=...) as (url, pid)``: a server in a process of its own."""
    return _serving


@contextmanager
def _sglang_process(
    model: Path, log: Path, variables: dict[str, str] | None = None, **options: Any
) -> Iterator[tuple[str, int]]:
    """As :func:`sglang_server` starts one; its URL and process number."""
    words: list[str | Path] = [sys.executable, "-m", "sglang.launch_server"]
    words += ["--model-path", model, "--attention-backend", "rag_cpu"]
    words += ["--sampling-backend", "pytorch", "--disable-cuda-graph", "--skip-server-warmup"]
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(value)]
    with _serving(words, log, ready=_answers_health, **(variables or {})) as found:
        yield found


@pytest.fixture(scope="session")
def sglang_process() -> Callable[..., Any]:
    """As ``sglang_server``, but ``with ... as (url, pid)``; the process leads a group with its children."""
    return _sglang_process


@pytest.fixture(scope="session")
def sglang_server() -> Callable[..., Any]:
    """``with sglang_server(model, log, **options) as url``: ``sglang.launch_server`` with the plugin.

    Options are flags of SGLang (``max_total_tokens=4096``; ``True`` for one without a value);
    ``variables`` is added to the environment.
    """

    @contextmanager
    def start(*args: Any, **options: Any) -> Iterator[str]:
        with _sglang_process(*args, **options) as (url, _):
            yield url

    return start


@pytest.fixture(scope="session")
def model_server(
    smollm2_path: Path, sglang_server: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of a real SGLang server with the packaged model, shared by the whole session."""
    log = tmp_path_factory.mktemp("model-server") / "log.txt"
    # A test fills the context: on a CPU the model's own of 8,192 tokens takes a minute.
    options = {"max_total_tokens": 8192, "context_length": 4096}
    with sglang_server(smollm2_path, log, sleep_on_idle=True, **options) as url:
        yield url

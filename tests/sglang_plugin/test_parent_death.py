"""An engine's processes end with the one that started them, at every moment of the start; no engine here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word of a death")

OWNER = """
import functools, multiprocessing, signal, sys, threading, time
from multiprocessing import forkserver
import parent_death_child
from rag_pipeline.sglang_plugin.launch import fork_server
from rag_pipeline.sglang_plugin.launch.fault_report import run_and_report

def tell(*pids):
    print(*pids, flush=True)

if __name__ == "__main__":
    how = sys.argv[1]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    starting = threading.Thread(target=fork_server.start)
    starting.start()
    starting.join()
    server = forkserver._forkserver._forkserver_pid
    if how == "importing":
        tell(server)
        time.sleep(600)
    multiprocessing.set_start_method(how, force=True)
    read, write = multiprocessing.Pipe(duplex=False)
    entry = functools.partial(run_and_report, parent_death_child.main)
    process = multiprocessing.Process(target=fork_server.WithEnvironment(entry), args=(write,))
    process.start()
    read.recv_bytes()
    tell(server, process.pid)
    time.sleep(600)
"""
CHILD = """
import time

def main(said):
    said.send_bytes(b"started")
    time.sleep(600)
"""


@contextmanager
def owner(folder: Path, how: str, *, imports: str) -> Iterator[tuple[psutil.Process, ...]]:
    """The owner and its processes; where a fork server imports SGLang, it does `imports`."""
    (folder / "sglang").mkdir()
    (folder / "sglang" / "__init__.py").write_text(imports)
    (folder / "parent_death_child.py").write_text(CHILD)
    (folder / "owner.py").write_text(OWNER)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, str(folder / "owner.py"), how],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process:
        try:
            pids = process.stdout.readline().split()
            assert pids
            yield (psutil.Process(process.pid), *(psutil.Process(int(pid)) for pid in pids))
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("how", ["importing", "forkserver", "spawn"])
def test_nothing_outlives_the_process_that_started_it(
    tmp_path: Path, how: str, number: signal.Signals
) -> None:
    imports = "import time; time.sleep(600)" if how == "importing" else "raise ImportError"
    with owner(tmp_path, how, imports=imports) as (parent, *others):
        # A supervisor tells all of them; they leave the decision to their parent.
        for process in (*others, parent):
            process.send_signal(number if process == parent else signal.SIGTERM)
        _, alive = psutil.wait_procs(others, timeout=60)
        assert not alive


def test_only_the_owner_s_end_ends_them_not_that_of_the_thread_that_made_them_nor_ctrl_c(
    tmp_path: Path,
) -> None:
    with owner(tmp_path, "forkserver", imports="raise ImportError") as (_, *others):
        for process in others:
            process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(others, timeout=1)
        assert len(alive) == 2

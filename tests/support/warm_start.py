"""A process that has imported SGLang and this project, and becomes any program that is asked for.

Importing takes most of the time that a program with an engine takes to start, and the suite starts dozens. This
process imports once and forks: what runs in the child is the same code as behind ``python ...`` or
``rag-pipeline ...``, in a session of its own, with its own arguments, environment, folder and files. It imports
and does nothing else, so it has one thread when it forks.

Run as ``warm_start.py FD``, a socket of whoever asks; see :mod:`warm` for the other side. It leaves the tree of
processes of its parent, which SGLang ends when an engine of that process shuts down.
"""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from contextlib import suppress
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any

# As rag_pipeline.sglang_plugin.launch.startup sets them before it imports SGLang.
os.environ.setdefault("SGLANG_IS_FLASHINFER_AVAILABLE", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def import_everything() -> None:
    """Import what programs of the suite import, as far as it is there."""
    import setproctitle

    # As the fork server's preloaded module does, before a program's environment is taken over.
    setproctitle.getproctitle()
    import faiss  # noqa: F401
    import sentence_transformers  # noqa: F401
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server  # noqa: F401

    import rag_pipeline.cli
    import rag_pipeline.server
    import rag_pipeline.sglang_plugin.launch.preload  # noqa: F401


def serve(fd: int) -> dict[str, Any] | None:
    """Answer until the other side is gone; in a child, what that child is to run."""
    control = socket.socket(fileno=fd)
    ended: dict[int, int] = {}
    started: set[int] = set()

    def reap(*_: object) -> None:
        # At once, as whoever waits for all its processes to be gone sees a zombie too.
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = os.waitstatus_to_exitcode(found[1])

    signal.signal(signal.SIGCHLD, reap)
    with control, control.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            order = json.loads(line)
            answer: int | None
            if "words" in order:
                ready, say_ready = os.pipe()
                # Numbers come round again: an old program's end is not this one's.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
                answer = os.fork()
                if answer:
                    ended.pop(answer, None)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
                if answer == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.setsid()
                    os.close(say_ready)
                    os.close(ready)
                    return order  # the socket is closed behind it
                os.close(say_ready)
                # Ends when the child has a group of its own, which may be killed from then on.
                os.read(ready, 1)
                os.close(ready)
                started.add(answer)
            else:
                answer = ended.get(order["poll"])
            control.sendall(json.dumps(answer).encode() + b"\n")
    for pid in started - set(ended):
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def become(order: dict[str, Any]) -> None:
    """Take on the folder, environment and files of a program of its own."""
    os.chdir(order["cwd"])
    multiprocessing.process.ORIGINAL_DIR = order["cwd"]  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(order["environment"])
    # What a fresh interpreter would do; folders that are there already were imported from.
    added = order["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [folder for folder in added if folder and folder not in sys.path]
    for fd, (name, flags) in enumerate(
        [
            (os.devnull, os.O_RDONLY),
            (order["stdout"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            (order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        ]
    ):
        file = os.open(name, flags, 0o600)
        os.dup2(file, fd)
        if file > 2:
            os.close(file)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if order["fork_children"]:
        _fork_what_spawns()
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _text(1, line_buffering=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2, line_buffering=True)  # type: ignore[misc]
    _fork_server_ahead()


def _fork_what_spawns() -> None:
    """Start children from the fork server where the program, as stock SGLang, forces them to be spawned.

    They get the environment that they would have: that of their parent when they start.
    """
    from rag_pipeline.sglang_plugin.launch.fork_server import WithEnvironment

    set_start_method, start = multiprocessing.set_start_method, multiprocessing.Process.start

    def set_other(method: str | None, force: bool = False) -> None:
        set_start_method("forkserver" if method == "spawn" else method, force)

    def start_there(process: Any) -> None:
        process._target = WithEnvironment(process._target)
        start(process)

    multiprocessing.set_start_method = set_other  # type: ignore[assignment]
    multiprocessing.Process.start = start_there  # type: ignore[method-assign]


def _text(fd: int, *, line_buffering: bool) -> io.TextIOWrapper:
    raw = open(fd, "wb", closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(
        raw, encoding="utf-8", errors="backslashreplace", line_buffering=line_buffering
    )


def _fork_server_ahead() -> None:
    """Fork the server that :mod:`rag_pipeline.sglang_plugin.launch.fork_server` would start, imports and all."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    resource_tracker.ensure_running()
    address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    alive_read, alive_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(alive_write)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the preloaded module does there
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        forkserver.main(listener.fileno(), alive_read, [])
        os._exit(0)
    listener.close()
    os.close(alive_read)
    server._forkserver_address = address
    server._forkserver_alive_fd = alive_write
    server._forkserver_pid = pid


def run(words: list[str]) -> None:
    """Do what ``words`` would: Python with ``-c``, ``-m`` or a file, or the console script."""
    program, *rest = words
    if Path(program).name == "rag-pipeline":
        from rag_pipeline.cli import main

        sys.argv = words
        sys.exit(main())
    if rest[0] == "-c":
        sys.argv = ["-c", *rest[2:]]
        sys.path.insert(0, "")
        exec(compile(rest[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif rest[0] == "-m":
        sys.argv = rest[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = rest
        sys.path.insert(0, str(Path(rest[0]).parent))
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, which no other program has
    if os.fork():
        os._exit(0)
    import_everything()
    gc.collect()
    gc.freeze()
    wanted = serve(int(sys.argv[1]))
    if wanted is not None:
        become(wanted)
        run(wanted["words"])

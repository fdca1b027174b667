"""One import of SGLang for all child processes: a fork server that starts before anything else.

SGLang starts its scheduler and its detokenizer with ``spawn``, so SGLang is imported in the parent
and then, once more, in both children. Here a fork server imports it *while* the parent does, and
children are forked from it in milliseconds. Rules kept:

* Only where no accelerator can be (CUDA does not survive a fork), told by device files, because
  asking torch would cost the seconds that are to be saved.
* The fork server never runs a torch computation; it has one thread when it forks.
* Children get the parent's environment of the moment they are started, not the fork server's.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

__all__ = ["FAST_START", "OWNER", "WithEnvironment", "fast_start_wanted", "start"]

FAST_START = "RAG_PIPELINE_FAST_START"
"""Environment variable: ``on`` (default) or ``off``."""
OWNER = "RAG_PIPELINE_FORK_SERVER_OWNER"
"""Environment variable that only a fork server has: id of the process that it ends with."""

_DEVICE_FILES = (
    "/dev/nvidia[0-9]*",
    "/dev/nvidiactl",
    "/dev/dxg",
    "/dev/kfd",
    "/dev/dri/renderD*",
    "/dev/davinci*",
    "/dev/mthreads*",
    "/dev/accel/*",
    "/dev/hl[0-9]*",
)


def fast_start_wanted() -> bool:
    """Whether a fork server may be used: Linux, no device file of an accelerator, not switched off."""
    value = os.environ.get(FAST_START, "on")
    if value not in ("on", "off"):
        from rag_pipeline.errors import EngineError

        raise EngineError(f"{FAST_START} is {value!r}; allowed are 'on' and 'off'.")
    if value == "off" or sys.platform != "linux":
        return False
    return not any(glob.glob(pattern) for pattern in _DEVICE_FILES)  # noqa: PTH207


def start() -> None:
    """Start a fork server that imports SGLang in the background; returns at once.

    A fork server from an earlier engine that SGLang has killed is forgotten first: SGLang's
    shutdown kills and reaps every child of the process, and the standard library then fails on
    waiting for a process that it no longer has.
    """
    server: Any = forkserver._forkserver
    pid = getattr(server, "_forkserver_pid", None)
    if pid is not None and not _is_our_child(pid):
        _forget(server)
    forkserver.set_forkserver_preload(["rag_pipeline.sglang_plugin.launch.preload"])
    os.environ[OWNER] = str(os.getpid())
    try:
        forkserver.ensure_running()
    finally:
        del os.environ[OWNER]


def _is_our_child(pid: int) -> bool:
    try:
        done, _ = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return False
    return done == 0


def _forget(server: Any) -> None:
    for name in ("_forkserver_alive_fd",):
        fd = getattr(server, name, None)
        if fd is not None:
            os.close(fd)
            setattr(server, name, None)
    server._forkserver_address = None
    server._forkserver_pid = None


class WithEnvironment:
    """A child's entry function that first takes over the parent's environment.

    SGLang sets environment variables just before it starts its children (and users do before they
    start an engine); a fork server was started earlier and would not pass them on.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the entry function."""
        return self._function(*args, **kwargs)

    def __getstate__(self) -> tuple[dict[str, str], Callable[..., Any]]:
        # Pickled when the child starts: the environment of that moment.
        return dict(os.environ), self._function

    def __setstate__(self, state: tuple[dict[str, str], Callable[..., Any]]) -> None:
        environment, self._function = state
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)

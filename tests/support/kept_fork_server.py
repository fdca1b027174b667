"""One import of SGLang for all engines that a process of the suite starts one after the other."""

from __future__ import annotations

import functools
from multiprocessing import forkserver
from typing import Any


@functools.cache
def keep_fork_server() -> None:
    """Have the shutdown of an engine end all children of this process but its fork server.

    SGLang's shutdown ends every child of the process. The next engine's fork server would then import SGLang
    anew, which takes most of the time that a small engine takes to start. It ends with this process.
    """
    from rag_pipeline.sglang_plugin.launch.startup import prepare

    prepare()  # before SGLang is imported
    from sglang.srt.entrypoints import engine

    kill_process_tree = engine.kill_process_tree

    @functools.wraps(kill_process_tree)
    def kill_others(
        parent_pid: int, include_parent: bool = True, skip_pid: int | None = None, **options: Any
    ) -> None:
        if not include_parent and skip_pid is None:
            skip_pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        kill_process_tree(parent_pid, include_parent, skip_pid, **options)

    engine.kill_process_tree = kill_others

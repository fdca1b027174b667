"""Imported once by the fork server, so that scheduler and detokenizer find SGLang already loaded.

Never imported by hand: see :mod:`.startup`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal

import setproctitle

from rag_pipeline.parent_death import follow_owner
from rag_pipeline.sglang_plugin.launch.fork_server import OWNER


def _import_engine_modules() -> None:
    """Import what the child processes import first. A fault here surfaces again in the child."""
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401


# A supervisor that stops a service tells all of its processes at once. The server that started this one drains
# first and ends its children then; without it all of them end. Children inherit it.
# The same with Ctrl-C and `timeout -s INT`: were a child gone first, SGLang would kill its parent before it has told
# what it has.
# By SIGQUIT a child tells that it failed, which its exit code tells the server too.
with contextlib.suppress(ValueError):  # not the main thread: nobody's fork server
    if OWNER in os.environ:
        follow_owner(int(os.environ[OWNER]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)

# A child takes over its parent's environment, and then it is too late to find where the title of a process lies.
# SGLang knows its schedulers by their titles: without one it ends them at a stop without waiting for them.
with contextlib.suppress(Exception):
    setproctitle.getproctitle()

with contextlib.suppress(Exception):
    _import_engine_modules()
    # Keep what was imported in pages that all children share.
    gc.collect()
    gc.freeze()

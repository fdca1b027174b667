"""Keep start-up messages that mean nothing on a CPU off the terminal; let every other one through.

Each entry names the logger or module that speaks and the whole start of the sentence, so a new or
changed warning is shown. Installed in every process as soon as the CPU platform is chosen, which is
before SGLang imports the modules that warn. ``RAG_PIPELINE_VERBOSE=1`` (``--verbose``) lets all through.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import warnings
from typing import Any

from rag_pipeline.config import VERBOSE_VARIABLE

__all__ = ["LOG_NOISE", "WARNING_NOISE", "hide_bars", "install", "lock_bars_by_thread"]

WARNING_NOISE: tuple[tuple[str, str], ...] = (
    # (module that warns, start of the message)
    ("sglang.srt.layers.quantization.awq.awq", "Only CUDA, HIP and XPU support AWQ currently."),
    (
        "sglang.srt.layers.quantization.gguf",
        "Only CUDA, MUSA and NPU support GGUF quantization currently.",
    ),
    (
        "sglang.kernels.ops.attention.fla.utils",
        "Triton is not supported on current platform, roll back to CPU.",
    ),
)
"""Warnings about kernels of quantisations and linear attention that no CPU has. Asking for such a
model still fails, with SGLang's own error."""

LOG_NOISE: tuple[tuple[str, str], ...] = (
    (
        "sglang.srt.models.registry",
        "Ignore import error when loading sglang.srt.models.falcon_mamba",
    ),
    ("sglang.srt.models.registry", "Ignore import error when loading sglang.srt.models.mamba:"),
    ("sglang.kernels.jit.utils.arch", "Cannot detect CUDA architecture."),
    # Our own handler (see :mod:`.startup`), which SGLang reports at level ERROR.
    ("sglang.srt.entrypoints.engine", "Using custom SIGQUIT handler"),
    ("sglang.srt.distributed.bootstrap", "init_cpu_threads_env and shared memory based AllReduce"),
)
"""Log records, by logger and start of the text."""


class _StartsWith(logging.Filter):
    """Drop the records of one logger that start with one text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.text)


def install() -> None:
    """Install the filters in this process. Idempotent; changes no level and no handler."""
    if os.environ.get(VERBOSE_VARIABLE) == "1":
        return
    for module, text in WARNING_NOISE:
        warnings.filterwarnings(
            "ignore", message=re.escape(text), category=UserWarning, module=re.escape(module)
        )
    for name, text in LOG_NOISE:
        logger = logging.getLogger(name)
        if not any(isinstance(f, _StartsWith) and f.text == text for f in logger.filters):
            logger.addFilter(_StartsWith(text))


def hide_bars() -> None:
    """Let ``TQDM_DISABLE=1`` hold for every bar of this process. Idempotent.

    tqdm reads it only where a caller leaves ``disable`` out; SGLang's loaders say ``disable=False``.
    """
    if os.environ.get("TQDM_DISABLE") != "1":
        return
    from tqdm import tqdm

    if getattr(tqdm.__init__, "_hides_bars", False):
        return
    draw = tqdm.__init__

    @functools.wraps(draw)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        draw(self, *args, **{**kwargs, "disable": True})

    init._hides_bars = True  # type: ignore[attr-defined]
    tqdm.__init__ = init


def lock_bars_by_thread() -> None:
    """Give tqdm a lock of this process. Idempotent; no bar is shared between processes here.

    Its own is a named semaphore, too, which outlives a process that is killed: Python then warns of it.
    """
    from tqdm import tqdm

    if not hasattr(tqdm, "_lock"):
        tqdm.set_lock(threading.RLock())

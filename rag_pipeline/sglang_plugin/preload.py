"""Imported once by the fork server, so that scheduler and detokenizer find SGLang already loaded.

Never imported by hand: see :mod:`.startup`.
"""

from __future__ import annotations

import contextlib
import gc


def _import_engine_modules() -> None:
    """Import what the child processes import first. A fault here surfaces again in the child."""
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401


with contextlib.suppress(Exception):
    _import_engine_modules()
    # Keep what was imported in pages that all children share.
    gc.collect()
    gc.freeze()

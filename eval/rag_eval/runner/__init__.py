"""Running modes side by side in one engine.

The teacher-forcing logit processor is loaded from here inside the engine's processes, so nothing
heavy is imported before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_pipeline.lazy import lazy_names

if TYPE_CHECKING:
    from rag_eval.result import EvalResult
    from rag_eval.runner.config import DEFAULT_MODES, EvalConfig
    from rag_eval.runner.modes import Mode, parse_modes
    from rag_eval.runner.run import run_eval, table_text
    from rag_eval.runner.summary import summarise

__all__ = [
    "DEFAULT_MODES",
    "EvalConfig",
    "EvalResult",
    "Mode",
    "parse_modes",
    "run_eval",
    "summarise",
    "table_text",
]

_HOME = {
    "DEFAULT_MODES": "config",
    "EvalConfig": "config",
    "EvalResult": "summary",
    "Mode": "modes",
    "parse_modes": "modes",
    "run_eval": "run",
    "summarise": "summary",
    "table_text": "run",
}

__getattr__, __dir__ = lazy_names(__name__, _HOME)

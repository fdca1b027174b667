"""Evaluation: answer quality and speed of every way to serve a RAG prompt, side by side.

>>> from pathlib import Path
>>> from rag_eval import EvalConfig, run_eval
>>> result = run_eval(
...     EvalConfig(dataset="planted-1hop", model="smollm2-135m", out=Path("runs/x"), limit=10)
... )  # doctest: +SKIP
>>> print(result.to_json()["modes"]["full"]["f1"])  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rag_eval.errors import EvalError, ModeUnavailableError
from rag_pipeline.lazy import lazy_names

if TYPE_CHECKING:
    from rag_eval.datasets import DatasetOptions
    from rag_eval.runner import EvalConfig, EvalResult, run_eval

__all__ = [
    "DatasetOptions",
    "EvalConfig",
    "EvalError",
    "EvalResult",
    "ModeUnavailableError",
    "run_eval",
]

_HOME = {
    "DatasetOptions": "datasets",
    "EvalConfig": "runner",
    "EvalResult": "runner",
    "run_eval": "runner",
}

__getattr__, __dir__ = lazy_names(__name__, _HOME)

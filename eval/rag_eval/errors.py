"""User-fixable errors of evaluation."""

from __future__ import annotations

from rag_pipeline.errors import RagPipelineError


class EvalError(RagPipelineError):
    """A fault in a data set, a mode, or an output folder given by the user; one line."""


class ModeUnavailableError(EvalError):
    """A mode that the running engine does not support; never answered with made-up numbers."""

"""Starting the engine that a run measures."""

from __future__ import annotations

from typing import Any

from rag_eval.runner.prompts import PromptMaker
from rag_eval.runner.session import EngineSession

DEFAULT_ENGINE_ARGS: dict[str, Any] = {
    "max_total_tokens": 16_384,
    "max_running_requests": 8,
    "random_seed": 0,
    "log_level": "error",
}
"""A small pool: a run has one request in flight, and the prompts of an example share it."""


def start_session(
    maker: PromptMaker, vocabulary: int, engine_args: dict[str, Any]
) -> EngineSession:
    """Start an engine with the plugin and wrap it.

    Parameters
    ----------
    maker : PromptMaker
        Prompt maker of the model; names the folder and decodes answers.
    vocabulary : int
        Columns of the logits that are real tokens.
    engine_args : dict
        Added to ``DEFAULT_ENGINE_ARGS``.
    """
    from rag_pipeline.sglang_plugin import create_engine

    arguments = {**DEFAULT_ENGINE_ARGS, "enable_custom_logit_processor": True, **engine_args}
    engine = create_engine(str(maker.model), **arguments)
    return EngineSession(engine, maker.decode, vocabulary)

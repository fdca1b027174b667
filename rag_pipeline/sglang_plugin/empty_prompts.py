"""A prompt without a token is refused: SGLang's scheduler dies of a batch that holds nothing else.

SGLang looks for it in some of its routes and in some forms of a prompt. Here it is looked for where every prompt
comes by, in the tokenizer's process.
"""

from __future__ import annotations

from typing import Any

from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_targets

__all__ = ["EmptyPromptError", "register"]

_TOKENIZED = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"


class EmptyPromptError(ValueError):
    """SGLang answers a ``ValueError`` with HTTP 400 and its message."""


def _refuse(tokenized: Any, *args: Any, **kwargs: Any) -> None:
    ids = getattr(tokenized, "input_ids", None)
    if ids is None or len(ids):
        return
    if getattr(tokenized, "input_embeds", None) is None:
        raise EmptyPromptError("the prompt is empty; send at least one token")


def register() -> None:
    """Add the hook; called by the plugin's entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_targets(
        [
            HookTarget(
                path=_TOKENIZED,
                kind="after",
                why="a batch of empty prompts would end the scheduler",
                params=("input_ids",),
            )
        ]
    )
    HookRegistry.register(_TOKENIZED, _refuse, HookType.AFTER)

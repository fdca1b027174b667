"""Requests that SGLang's scheduler dies of are refused in the tokenizer's process, where every one of them comes by.

Nobody else looks: a batch of prompts without a token has no rows to compute, a token id outside the vocabulary is
an address outside the embedding table, and a number that does not fit a tensor is an exception in the scheduler.
Each ends the scheduler, and with it everybody's requests; to send one takes no more than a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_targets

__all__ = ["UnfitRequestError", "register"]

_TOKENIZED = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"
_INT32 = 2**31 - 1


class UnfitRequestError(ValueError):
    """SGLang answers a ``ValueError`` with HTTP 400 and its message."""


def _refuse(tokenized: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    for line in _faults(tokenized, int(manager.model_config.vocab_size)):
        raise UnfitRequestError(line)


def _faults(tokenized: Any, vocabulary: int) -> Iterator[str]:
    ids = getattr(tokenized, "input_ids", None)
    if ids is not None and getattr(tokenized, "input_embeds", None) is None:
        if not len(ids):
            yield "the prompt is empty; send at least one token"
            return
        lowest, highest = min(ids), max(ids)
        if lowest < 0 or highest >= vocabulary:
            wrong = lowest if lowest < 0 else highest
            yield f"token id {wrong} is not in the model's vocabulary; allowed are 0 to {vocabulary - 1}"
    top_k = getattr(getattr(tokenized, "sampling_params", None), "top_k", 0) or 0
    if top_k > _INT32:
        yield f"top_k is {top_k}; it must be at most {_INT32}"
    logprobs = getattr(tokenized, "top_logprobs_num", 0) or 0
    if not 0 <= logprobs <= vocabulary:
        yield f"top_logprobs_num is {logprobs}; it must be from 0 to {vocabulary}"
    start = getattr(tokenized, "logprob_start_len", -1)
    if start is not None and start < -1:
        yield f"logprob_start_len is {start}; it must be -1 (the answer only) or a position"
    overrides = getattr(tokenized, "positional_embed_overrides", None)
    if overrides is not None and not hasattr(overrides, "reconstruct"):
        yield "positional_embed_overrides are taken from programs in the engine's process only"


def register() -> None:
    """Add the hook; called by the plugin's entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    add_targets(
        [
            HookTarget(
                path=_TOKENIZED,
                kind="after",
                why="a request that the scheduler would die of is refused",
                params=("input_ids",),
            )
        ]
    )
    HookRegistry.register(_TOKENIZED, _refuse, HookType.AFTER)

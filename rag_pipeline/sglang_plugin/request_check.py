"""Requests that are known to end SGLang's scheduler are refused in the tokenizer's process, where each comes by.

Nobody else looks: a batch of prompts without a token has no rows to compute, a token id outside the vocabulary is
an address outside the embedding table, and a number that does not fit a tensor is an exception in the scheduler.
Each ends the scheduler, and with it everybody's requests; to send one takes no more than a key.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_hooks

__all__ = ["UnfitRequestError", "register"]

_TOKENIZED = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"
_INT32 = 2**31 - 1
_MOST_BIAS = 1e6
"""Of a logit: a larger one, or one that is no number, leaves no distribution to draw from."""


class UnfitRequestError(ValueError):
    """SGLang answers a ``ValueError`` with HTTP 400 and its message."""


def _refuse(tokenized: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    vocabulary = int(manager.model_config.vocab_size)
    line = _fault_of_prompt(tokenized, vocabulary) or _fault_of_options(tokenized, vocabulary)
    if line:
        raise UnfitRequestError(line)


def _fault_of_prompt(tokenized: Any, vocabulary: int) -> str | None:
    ids = getattr(tokenized, "input_ids", None)
    if ids is None or getattr(tokenized, "input_embeds", None) is not None:
        return None
    session = getattr(tokenized, "session_params", None)
    if not len(ids):
        # What a session holds may be all of the prompt; the scheduler looks again.
        return None if session is not None else "the prompt is empty; send at least one token"
    for name in ("token_indices_to_pool", "multi_item_delimiter_indices"):
        places = getattr(tokenized, name, None)
        if places is not None and not (len(places) and 0 <= min(places) <= max(places) < len(ids)):
            return f"{name} must name tokens of the prompt, from 0 to {len(ids) - 1}"
    # A picture's tokens are no words.
    if getattr(tokenized, "mm_inputs", None) is None and (wrong := _outside(ids, vocabulary)):
        return (
            f"token id {wrong} is not in the model's vocabulary; allowed are 0 to {vocabulary - 1}"
        )
    return None


def _fault_of_options(tokenized: Any, vocabulary: int) -> str | None:
    session = getattr(tokenized, "session_params", None)
    if session is not None and not isinstance(getattr(session, "id", None), str | None):
        return "session_params.id must be a string"
    overrides = getattr(tokenized, "positional_embed_overrides", None)
    if overrides is not None and not hasattr(overrides, "reconstruct"):
        return "positional_embed_overrides are taken from programs in the engine's process only"
    if getattr(tokenized, "return_logprob", False):
        count, start = tokenized.top_logprobs_num or 0, tokenized.logprob_start_len
        if not 0 <= count <= vocabulary:
            return f"top_logprobs_num is {count}; it must be from 0 to {vocabulary}"
        if start is not None and start < -1:
            return f"logprob_start_len is {start}; it must be -1 (the answer only) or a position"
    params = getattr(tokenized, "sampling_params", None)
    if params is None or not hasattr(params, "top_k"):
        return None
    for name in ("top_k", "min_new_tokens"):
        if (getattr(params, name) or 0) > _INT32:
            return f"{name} is {getattr(params, name)}; it must be at most {_INT32}"
    if params.stop_token_ids and (wrong := _outside(params.stop_token_ids, vocabulary)):
        return f"stop token {wrong} is not in the model's vocabulary; allowed are 0 to {vocabulary - 1}"
    for token, bias in (params.logit_bias or {}).items():
        if not abs(bias) <= _MOST_BIAS:
            return f"logit_bias of token {token} is {bias}; it must be from -{_MOST_BIAS:.0f} to {_MOST_BIAS:.0f}"
    return None


def _outside(ids: Collection[int], vocabulary: int) -> str:
    """Return the first id that no row of the embedding has, empty where there is none."""
    lowest, highest = min(ids), max(ids)
    return str(lowest) if lowest < 0 else str(highest) if highest >= vocabulary else ""


def register() -> None:
    """Add the hook; called by the plugin's entry point."""
    add_hooks(
        [
            (
                HookTarget(
                    path=_TOKENIZED,
                    kind="after",
                    why="a request that the scheduler would die of is refused",
                    params=("input_ids",),
                ),
                _refuse,
            )
        ]
    )

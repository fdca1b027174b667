"""In the tokenizer process: refuse malformed fusion fields before they reach a scheduler."""

from __future__ import annotations

from typing import Any

from rag_pipeline.protocol import PARAM_PREFIX, RequestError
from rag_pipeline.protocol.fields import parse_request
from rag_pipeline.sglang_plugin.fusion.request.internal import INTERNAL_RID
from rag_pipeline.sglang_plugin.fusion.request.namespace import METHOD_SPACE


def after_tokenize(tokenized: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
    """Run after ``TokenizerManager._create_tokenized_object``.

    The spans are also rewritten flat: SGLang's transport to the scheduler allows no nested lists in
    ``custom_params``, but JSON clients may well send them.

    Raises
    ------
    RequestError
        A ``ValueError``: SGLang answers it with HTTP 400 and the message.
    """
    if str(getattr(tokenized, "rid", "")).startswith(INTERNAL_RID):
        raise RequestError(
            f"request id {tokenized.rid!r}: ids that begin with {INTERNAL_RID!r} are taken."
        )
    key = getattr(tokenized, "extra_key", None)
    if isinstance(key, str) and key.startswith(METHOD_SPACE):
        raise RequestError(
            f"extra_key {key!r:.80}: keys that begin with {METHOD_SPACE!r} are taken."
        )
    params = getattr(tokenized, "sampling_params", None)
    hints = getattr(tokenized, "kv_hints", None)
    custom = getattr(params, "custom_params", None)
    if hints is None and not custom:
        return
    prompt_len = len(tokenized.input_ids) if tokenized.input_ids is not None else 0
    request = parse_request(hints, custom, prompt_len)
    if request is None or not isinstance(custom, dict):
        return
    rest = {k: v for k, v in custom.items() if not str(k).startswith(PARAM_PREFIX)}
    if len(rest) != len(custom):
        assert params is not None
        params.custom_params = rest | request.to_custom_params()

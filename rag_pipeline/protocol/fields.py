"""Reading the fusion fields of a request, from either carrier; whatever is malformed is refused in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from chunk_cache import ChunkCacheError, check_spans
from rag_pipeline.protocol.fusion_request import (
    ACTION_TYPE,
    ACTION_VERSION,
    DENSE_ATTENTION,
    PARAM_PREFIX,
    FusionRequest,
    RequestError,
)
from rag_pipeline.protocol.memory_fields import read_memory

MAX_CONVERSATION = 200
"""Characters of a conversation's name."""
MAX_ATTENTION = 200
"""Characters of an attention method with its options."""

MAX_SPANS = 4096
"""More than any prompt holds; bounds the work that one request can cause."""

_MAX_WHOLE = 2**53
"""What JSON numbers hold exactly."""

_MODES = ("fuse", "build", "off")
_FIELDS = tuple(field.name for field in dataclasses.fields(FusionRequest))


def parse_fields(fields: Mapping[str, Any], prompt_len: int) -> FusionRequest:
    """Check the fields of either carrier.

    Parameters
    ----------
    fields : mapping
        As in the module's first example; spans nested or flat.
    prompt_len : int
        Tokens of the prompt.

    Raises
    ------
    RequestError
        One line: what was given, what is allowed.
    """
    for key in fields:
        if key not in _FIELDS:
            raise RequestError(f"fusion field {key!r} is not known; allowed: {', '.join(_FIELDS)}.")
    mode = fields.get("mode", "fuse")
    if mode not in _MODES:
        raise RequestError(f"fusion mode is {mode!r}; choose one of {', '.join(_MODES)}.")
    spans = _read_spans(fields.get("spans"), prompt_len)
    prefix_len = fields.get("prefix_len")
    if prefix_len is None:
        prefix_len = spans[0][0] if spans else 0
    limit = spans[0][0] if spans else prompt_len
    if type(prefix_len) is not int or not 0 <= prefix_len <= limit:
        raise RequestError(
            f"fusion prefix_len is {prefix_len!r}; give a whole number from 0 to {limit} "
            "(it may not reach into the first span)."
        )
    policy = fields.get("policy") or ""
    if not isinstance(policy, str):
        raise RequestError(f"fusion policy is {policy!r}; give a name such as 'query:0.15'.")
    ratio = fields.get("ratio")
    is_number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if ratio is not None and not (is_number and abs(ratio) <= _MAX_WHOLE):
        raise RequestError(f"fusion ratio is {ratio!r:.80}; give a number between 0 and 1.")
    passage = fields.get("passage")
    if passage is not None and not isinstance(passage, bool):
        raise RequestError(f"fusion passage is {passage!r}; give true or false, or leave it out.")
    request = FusionRequest(
        mode=mode,
        spans=tuple(spans),
        prefix_len=prefix_len,
        policy=policy,
        ratio=None if ratio is None else float(ratio),
        options=_read_options(fields.get("options")),
        conversation=_read_conversation(fields.get("conversation"), mode),
        passage=passage,
        attention=_read_attention(fields.get("attention"), mode),
        truncated=_read_truncated(fields.get("truncated")),
        memory=read_memory(
            fields.get("memory"), mode=mode, prefix_len=prefix_len, prompt_len=prompt_len
        ),
    )
    _check_beside_memory(request)
    if mode == "build" and (len(spans) != 1 or spans[0][0] != prefix_len):
        raise RequestError(
            "fusion mode 'build' needs exactly one span, right behind the shared prefix: chunk KV must not "
            "have seen another chunk; send one request per chunk."
        )
    request.make_attention()
    if request.policy:
        request.make_policy(request.policy)
    elif request.ratio is not None or request.options:
        raise RequestError("fusion ratio or options without a policy; name the policy too.")
    return request


def parse_custom_params(params: Mapping[str, Any] | None, prompt_len: int) -> FusionRequest | None:
    """Read the ``rag_*`` fields of ``custom_params``; None where there are none."""
    if not isinstance(params, Mapping):
        return None
    fields = {
        key.removeprefix(PARAM_PREFIX): value
        for key, value in params.items()
        if isinstance(key, str) and key.startswith(PARAM_PREFIX)
    }
    return parse_fields(fields, prompt_len) if fields else None


def parse_kv_hints(envelope: Any, prompt_len: int) -> FusionRequest | None:
    """Read our action of a ``kv_hints`` envelope; None where there is none."""
    actions = [a for a in getattr(envelope, "actions", ()) if a.action_type == ACTION_TYPE]
    if not actions:
        return None
    if len(actions) > 1:
        raise RequestError(f"kv_hints holds {len(actions)} {ACTION_TYPE} actions; give one.")
    if actions[0].action_version != ACTION_VERSION:
        raise RequestError(
            f"kv_hints action {ACTION_TYPE} has version {actions[0].action_version!r}; "
            f"this engine reads version {ACTION_VERSION!r}."
        )
    return parse_fields(actions[0].payload, prompt_len)


def parse_request(
    envelope: Any, params: Mapping[str, Any] | None, prompt_len: int
) -> FusionRequest | None:
    """Read both carriers; a request may use one of them.

    Raises
    ------
    RequestError
        A malformed field, or both carriers at once.
    """
    hinted = parse_kv_hints(envelope, prompt_len)
    flat = parse_custom_params(params, prompt_len)
    if hinted is not None and flat is not None:
        raise RequestError("fusion fields in kv_hints and in custom_params; use one of them.")
    return hinted or flat


def _read_spans(value: Any, prompt_len: int) -> list[tuple[int, int]]:
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RequestError(f"fusion spans is {value!r}; give [[start, end], ...] token positions.")
    if value and all(type(edge) is int for edge in value):
        if len(value) % 2:
            raise RequestError(
                f"fusion spans hold {len(value)} numbers; give pairs: start, end, start, end."
            )
        pairs: list[Any] = [tuple(value[i : i + 2]) for i in range(0, len(value), 2)]
    else:
        pairs = list(value)
    if len(pairs) > MAX_SPANS:
        raise RequestError(f"{len(pairs)} fusion spans; at most {MAX_SPANS} are allowed.")
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, (str, bytes)) or len(pair) != 2:
            raise RequestError(f"fusion span {pair!r}; give [start, end].")
    try:
        return check_spans(((pair[0], pair[1]) for pair in pairs), prompt_len)
    except ChunkCacheError as error:
        raise RequestError(f"fusion {error}") from None


def _read_truncated(value: Any) -> tuple[int, int]:
    if value is None:
        return (0, 0)
    is_pair = isinstance(value, Sequence) and len(value) == 2
    if not is_pair or not all(type(n) is int and 0 <= n <= _MAX_WHOLE for n in value):
        raise RequestError(
            f"fusion truncated is {value!r:.80}; give the numbers of turns and of tokens that were cut, or leave it out."
        )
    return (value[0], value[1])


def _read_conversation(value: Any, mode: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CONVERSATION:
        raise RequestError(
            f"fusion conversation is {value!r:.80}; give a name of 1 to {MAX_CONVERSATION} characters, "
            "or leave it out."
        )
    if mode != "fuse":
        raise RequestError(
            f"fusion conversation in mode {mode!r}; only mode 'fuse' keeps and finds turns, leave one out."
        )
    return value


def _read_attention(value: Any, mode: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not value:
        raise RequestError(f"fusion attention is {value!r:.80}; give a name such as 'dense'.")
    if len(value) > MAX_ATTENTION:
        raise RequestError(
            f"fusion attention has {len(value)} characters; give at most {MAX_ATTENTION}."
        )
    if value != DENSE_ATTENTION and mode != "fuse":
        raise RequestError(
            f"fusion attention {value!r:.80} in mode {mode!r}; only mode 'fuse' may be approximate, leave one out."
        )
    return value


def _check_beside_memory(request: FusionRequest) -> None:
    """Refuse what cannot go together with a memory."""
    memory = request.memory
    if memory is None:
        return
    if request.conversation:
        raise RequestError(
            "fusion memory and conversation; a prompt with a memory is no continued turn, leave one out."
        )
    if not request.is_dense:
        raise RequestError(
            f"fusion attention {request.attention!r:.80} beside a memory; a memory needs {DENSE_ATTENTION!r}, "
            "leave one out."
        )
    if request.spans and memory.store is not None:
        raise RequestError(
            "fusion spans beside memory store; a record is made of a history alone, leave the chunks out."
        )
    if request.spans and request.spans[0][0] < memory.load_end:
        raise RequestError(
            f"fusion span starts at {request.spans[0][0]}, among the slots of the memory; give positions from "
            f"{memory.load_end} on."
        )


def _read_options(value: Any) -> tuple[tuple[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RequestError(f"fusion options is {value!r}; give an object of the policy's fields.")
    for key, item in value.items():
        if not isinstance(item, (bool, int, float, str, type(None))):
            raise RequestError(f"fusion option {key!r} is {item!r}; give a number or a string.")
        if isinstance(item, int) and abs(item) > _MAX_WHOLE:
            raise RequestError(
                f"fusion option {key!r} is a number beyond {_MAX_WHOLE}; give a smaller one."
            )
    return tuple(sorted(value.items()))

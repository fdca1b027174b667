"""SGLang's own chat route on a conversation past the context window: the oldest turns are cut, whole ones.

The plugin's entry point adds it, so it is the same in every server of SGLang that loads the plugin.

Only for a request that names a conversation in its fusion fields and gives no spans, which are places in a prompt that
nobody may cut; and only where stock SGLang would refuse it. Every other request goes through untouched. What was cut
comes back in the report (``truncated``), and how much is cut at once is told in :mod:`rag_pipeline.prompts.truncation`.
``rag_truncation`` in ``custom_params`` is ``auto``, the default, or ``disabled``: then nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rag_pipeline.prompts.truncation import (
    check_truncation,
    estimated_tokens,
    first_that_fits,
    truncated,
)
from rag_pipeline.protocol.fusion_request import PARAM_PREFIX
from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_hooks

__all__ = ["around_process_messages", "register"]

_PROCESS = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_messages"
_ANSWER_TOKENS = 512
"""Room for the answer in a prompt that is cut, where the request does not say; at most a quarter of the context."""
_FRAME_TOKENS = 5
"""What a template puts around each message: without them a chat of short messages seems so short that all of it is cut."""


def register() -> None:
    """Add the hook; called by the plugin's entry point."""
    row = HookTarget(
        path=_PROCESS,
        kind="around",
        why="a conversation past the window loses its oldest turns instead of being refused",
        params=("request", "is_multimodal"),
    )
    add_hooks([(row, around_process_messages)])


def around_process_messages(
    original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Wrap ``OpenAIServingChat._process_messages``, which lays a request's messages out as token ids."""
    truncation = _take_truncation(request)
    made = original(serving, request, *args, **kwargs)
    if truncation == "disabled" or not _may_cut(request):
        return made
    manager = serving.tokenizer_manager
    # The scheduler refuses prompts of this length; where the KV pool is the smaller one, it says how much there is.
    longest = int(manager.max_req_input_len) - 1
    room = int(manager.context_len) - int(manager.num_reserved_tokens)
    answer = request.max_completion_tokens or request.max_tokens
    if manager.allow_auto_truncate or not manager.validate_total_tokens:
        answer = None  # SGLang shortens an answer that has no room, and refuses nothing for it
    if _fits(made, min(room - (answer or 1), longest)):
        return made
    if answer is not None and answer >= room:
        return made  # no cut makes room for that
    head, turns = _turns_of(request.messages)
    if len(turns) < 2:
        return made  # refused by SGLang in its own words
    lengths = [
        sum(_FRAME_TOKENS + estimated_tokens(_text_of(m), manager.tokenizer.encode) for m in turn)
        for turn in turns[:-1]
    ]
    context = min(int(manager.context_len), longest + 1)
    spare = min(answer or _ANSWER_TOKENS, context // 4)
    limit = min(room - (answer or spare), context - spare)

    def lay_out(cut: int) -> Any:
        if not cut:
            return made
        request.messages = [*head, *(m for turn in turns[cut:] for m in turn)]
        return original(serving, request, *args, **kwargs)

    made, cut = first_that_fits(
        lengths, lay_out, lambda one: _fits(one, limit), context_length=context
    )
    told = truncated(lengths, cut)
    request.custom_params = {**request.custom_params, f"{PARAM_PREFIX}truncated": [*told]}
    return made


def _take_truncation(request: Any) -> str:
    """Read what the request says, and take it out: it is this hook's alone, and no field of fusion."""
    given, name = getattr(request, "custom_params", None), f"{PARAM_PREFIX}truncation"
    if not isinstance(given, Mapping) or name not in given:
        return "auto"
    truncation = given[name]
    check_truncation(truncation)  # a ValueError, which SGLang answers with HTTP 400
    request.custom_params = {key: value for key, value in given.items() if key != name}
    return str(truncation)


def _may_cut(request: Any) -> bool:
    given = request.custom_params
    if not isinstance(given, Mapping) or getattr(request, "input_ids", None) is not None:
        return False
    return bool(given.get(f"{PARAM_PREFIX}conversation")) and not given.get(f"{PARAM_PREFIX}spans")


def _fits(made: Any, limit: int) -> bool:
    ids = made.prompt_ids
    # A prompt that is no list of ids (pictures) is not measured here.
    return not isinstance(ids, list) or len(ids) <= limit


def _turns_of(messages: Sequence[Any]) -> tuple[list[Any], list[list[Any]]]:
    """Instructions at the head, and turns: each begins with a user's message behind another's."""
    head: list[Any] = []
    turns: list[list[Any]] = []
    for message in messages:
        if not turns and message.role in ("system", "developer"):
            head.append(message)
        elif not turns or (message.role == "user" and turns[-1][-1].role != "user"):
            turns.append([message])
        else:
            turns[-1].append(message)
    return head, turns


def _text_of(message: Any) -> str:
    content = message.content
    parts = (
        [content]
        if isinstance(content, str)
        else [str(getattr(part, "text", None) or "") for part in content or ()]
    )
    for call in getattr(message, "tool_calls", None) or ():
        parts += map(str, (call.function.name, call.function.arguments))
    return "\n".join(parts)

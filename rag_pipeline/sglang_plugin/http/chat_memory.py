"""SGLang's own chat route on a long conversation: answered from its memory, where the server or the request says so.

Whoever keeps the memories (:mod:`rag_pipeline.server.memories`) says what becomes of a conversation; here it is read out of
SGLang's request, and the prompt is put into it as token ids. A request says it by a field ``memory`` of its body, or by
``rag_memory`` in ``custom_params`` for clients that send no other fields: ``"off"``, a method's name, or an object. Every
other request goes through untouched, and so does one whose conversation is no plain text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.protocol.fusion_request import PARAM_PREFIX, FusionRequest
from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_hooks, verify_targets

__all__ = [
    "AskedChat",
    "ChatMemory",
    "RememberedChat",
    "around_handle_request",
    "register",
    "registered",
]

FIELD = "memory"
"""Of the body of a request."""
_PARAM = f"{PARAM_PREFIX}{FIELD}"
_INSTRUCTIONS = ("system", "developer")
_NUMBERS = ("logprobs", "return_hidden_states", "return_routed_experts", "return_sampling_mask")
"""Fields of a request that ask for numbers beside the text: who reads them cannot see that they are near and not equal."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedChat:
    """A conversation of plain text.

    Parameters
    ----------
    wish : object
        What the client says of the memory, unchecked; None where it says nothing.
    system : str
        What its instructions at the head say.
    history : tuple of (str, str)
        Role (user or assistant) and text of the earlier messages.
    question : str
        The last message, a user's.
    max_new_tokens : int or None
        Of the answer, where the client says so.
    cache_salt : str or None
        Namespace for cached KV that the client names, inside that of its tenant.
    scope : mapping
        Of the HTTP request.
    rid : str or None
        Id that the client gives its request, such as to abort it by.
    """

    wish: Any
    system: str
    history: tuple[tuple[str, str], ...]
    question: str
    max_new_tokens: int | None
    cache_salt: str | None
    scope: Mapping[str, Any]
    rid: str | None = None


class RememberedChat(Protocol):
    """A conversation whose prompt is laid out."""

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        ...

    @property
    def fusion(self) -> FusionRequest:
        """What the prompt asks of the engine."""
        ...

    @property
    def rid(self) -> str:
        """Id for the request; the client's where it gives one."""
        ...

    def ended(self, answer: str | None) -> None:
        """Take note that the request has ended; None where it was refused, or its text is not known here."""


class ChatMemory(Protocol):
    """Keeps the memories of a server's conversations."""

    def may_apply(self, wish: Any) -> bool:
        """Whether a conversation may be answered from a memory; cheap.

        Raises
        ------
        RagPipelineError
            A wish that is not allowed.
        """

    async def remember(self, chat: AskedChat) -> RememberedChat | None:
        """Lay a conversation out; None for one that is short enough as it is.

        Raises
        ------
        RagPipelineError
            A conversation that cannot be laid out.
        """

    def left_alone(self, reason: str) -> None:
        """Count a conversation that no memory can be of."""


registered: list[HookTarget] = []
"""Rows of this process."""


def register(memory: ChatMemory) -> None:
    """Hook the chat route of a server that keeps memories; called before its hooks are applied."""
    row = HookTarget(
        path="sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat.handle_request",
        kind="around",
        why="a long conversation is answered from its memory",
        params=("request", "raw_request"),
    )

    async def hook(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await around_handle_request(memory, original, *args, **kwargs)

    verify_targets([row])
    add_hooks([(row, hook)])
    registered.append(row)


async def around_handle_request(
    memory: ChatMemory,
    original: Callable[..., Any],
    serving: Any,
    request: Any,
    raw_request: Any,
) -> Any:
    """Wrap ``OpenAIServingChat.handle_request``."""
    try:
        remembered = await _remembered(memory, serving, request, raw_request)
    except RagPipelineError as error:
        return serving.create_error_response(message=str(error), err_type="BadRequest")
    except Exception:
        # A memory saves work; without it the conversation is answered as ever.
        logger.exception("The memory of a conversation failed; it is answered without")
        memory.left_alone("failed")
        remembered = None
    if remembered is None:
        return await original(serving, request, raw_request)
    request.input_ids = list(remembered.input_ids)
    request.custom_params = {
        **(request.custom_params or {}),
        **remembered.fusion.to_custom_params(),
    }
    request.rid = remembered.rid
    answer: Any = None
    said: str | None = None
    try:
        answer = await original(serving, request, raw_request)
        choices = getattr(answer, "choices", None)
        said = choices[0].message.content if choices else None
    finally:
        if not hasattr(answer, "body_iterator"):
            remembered.ended(said)
    if hasattr(answer, "body_iterator"):
        answer.body_iterator = _until_ended(answer.body_iterator, remembered)
    return answer


async def _until_ended(pieces: AsyncIterator[Any], chat: RememberedChat) -> AsyncIterator[Any]:
    try:
        async for piece in pieces:
            yield piece
    finally:
        chat.ended(None)


async def _remembered(
    memory: ChatMemory, serving: Any, request: Any, raw_request: Any
) -> RememberedChat | None:
    wish = await _take_wish(request, raw_request)
    if not memory.may_apply(wish):
        return None
    reason = _why_not(serving, request, is_asked=wish is not None)
    if reason:
        memory.left_alone(reason)
        return None
    said = [(message.role, _text_of(message)) for message in request.messages]
    head = next(i for i, (role, _) in enumerate(said) if role not in _INSTRUCTIONS)
    return await memory.remember(
        AskedChat(
            wish=wish,
            system="\n".join(text for _, text in said[:head]),
            history=tuple(said[head:-1]),
            question=said[-1][1],
            max_new_tokens=_new_tokens(request),
            cache_salt=request.cache_salt,
            scope=raw_request.scope,
            rid=request.rid if isinstance(request.rid, str) else None,
        )
    )


async def _take_wish(request: Any, raw_request: Any) -> Any:
    """Read what the request says of the memory; what stands in ``custom_params`` is taken out, as it is no field of fusion."""
    given = request.custom_params
    if isinstance(given, Mapping) and _PARAM in given and not _is_engines(given[_PARAM]):
        request.custom_params = {key: value for key, value in given.items() if key != _PARAM}
        return given[_PARAM]
    # SGLang's schema drops a field that it does not know, so the body is read once more where it may hold it.
    body = await raw_request.body()
    if f'"{FIELD}"'.encode() not in body:
        return None
    sent = json.loads(body)
    return sent.get(FIELD) if isinstance(sent, dict) else None


def _is_engines(value: Any) -> bool:
    """Whether it is the engine's own field, an object of JSON that a client laid out itself."""
    return isinstance(value, str) and value.lstrip().startswith("{")


def _why_not(serving: Any, request: Any, *, is_asked: bool) -> str:
    """Why no memory can be of this request; empty where one can."""
    messages = request.messages
    # As :mod:`rag_pipeline.sglang_plugin.fusion.request.consent` has it: the engine approximates neither.
    if _new_tokens(request) == 0:
        return "no new token"
    if not is_asked and any(getattr(request, name) for name in _NUMBERS):
        return "numbers of the model's own"
    if not messages:
        return "no message"
    if request.tools or any(_has_tools(message) for message in messages):
        return "tools"
    if serving.tokenizer_manager.model_config.is_multimodal or not all(map(_is_text, messages)):
        return "pictures"
    roles = [message.role for message in messages]
    behind = [role for role in roles if role not in _INSTRUCTIONS]
    if roles[len(roles) - len(behind) :] != behind:
        return "instructions inside"
    if roles[-1] != "user" or not set(behind) <= {"user", "assistant"}:
        return "no question last"
    if not _text_of(messages[-1]).strip():
        return "an empty question"
    # What SGLang's own template would do otherwise, and prompts that somebody has laid out.
    if request.input_ids is not None or request.continue_final_message:
        return "a prompt of its own"
    if request.chat_template_kwargs or request.reasoning_effort is not None:
        return "template options"
    if request.lora_path or ":" in str(request.model) or request.extra_key:
        return "another model"
    if request.session_params or isinstance(request.cache_salt, list):
        return "a session"
    fields = request.custom_params
    if isinstance(fields, Mapping) and any(str(name).startswith(PARAM_PREFIX) for name in fields):
        return "fusion fields"
    return ""


def _new_tokens(request: Any) -> int | None:
    """Most tokens of the answer, as SGLang reads them; None where the client does not say."""
    wanted: int | None = request.max_completion_tokens or request.max_tokens
    return wanted


def _has_tools(message: Any) -> bool:
    return message.role in ("tool", "function") or bool(
        getattr(message, "tool_calls", None) or getattr(message, "tools", None)
    )


def _is_text(message: Any) -> bool:
    content = message.content
    if content is None or isinstance(content, str):
        return True
    return all(getattr(part, "type", None) == "text" for part in content)


def _text_of(message: Any) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    return "\n".join(str(part.text) for part in content or ())

"""Fields of OpenAI's schema that this server takes at the values that change no answer.

Clients and frameworks send many fields at their neutral value: ``message.model_dump()`` writes every
field of a message, most of them null; others send ``tools: []`` or ``logprobs: false``. Refusing those
would refuse the client. A value that would change the answer is refused, not dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_FIELDS = 64
"""Most fields of one object; every unknown one costs an error, made where everybody's answers stream."""

_Empty = Annotated[list[Any], Field(max_length=0)]
_Name = Annotated[str, Field(max_length=512)]


class Strict(BaseModel):
    """An object whose unknown fields are refused; null is as good as absent, for any field."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_FIELDS:
            raise ValueError(f"an object with {len(given)} fields; send at most {MAX_FIELDS}")
        return {name: value for name, value in given.items() if value is not None}


class TextFormat(Strict):
    """Plain text, which is what an answer is."""

    type: Literal["text"]


class NeutralMessage(Strict):
    """What ``model_dump()`` of an answer and frameworks write beside role and text."""

    tool_calls: _Empty | None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=1024)] | None = Field(
        default=None, description="Of an earlier answer; not read."
    )


class NeutralRequest(Strict):
    """What clients send beside the fields that this route honours."""

    tools: _Empty | None = Field(default=None, description="None: answers come from documents.")
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: _Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    audio: None = None
    web_search_options: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    n: Annotated[int, Field(ge=1, le=1, description="One answer a request.")] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        default=None, description="With temperature 0 only, where it changes nothing."
    )
    # Bookkeeping of OpenAI's platform: none of these changes an answer.
    user: _Name | None = None
    safety_identifier: _Name | None = None
    prompt_cache_key: _Name | None = None
    prompt_cache_retention: _Name | None = None
    service_tier: _Name | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None

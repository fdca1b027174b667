"""Requests and answers of the RAG routes, as the OpenAPI document shows them. Unknown fields are refused.

Lists stop at their first fault: a body is checked on the event loop, and may hold half a million of them.
"""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    create_model,
    model_validator,
)

from rag_pipeline.memory.config import MemoryConfig
from rag_pipeline.prompts.document_order import MAX_DOCUMENT_ORDER
from rag_pipeline.prompts.truncation import Truncation
from rag_pipeline.protocol.fields import MAX_ATTENTION, MAX_CONVERSATION
from rag_pipeline.server.openai_fields import NeutralMessage, NeutralRequest, Strict

MAX_K = 64
MAX_QUERY = 8000
"""Characters that are searched for."""
_TEXT_LIMIT = 200_000

_Text = Annotated[str, Field(max_length=_TEXT_LIMIT)]

Search = Literal["dense", "bm25", "hybrid"]
IndexName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Where = dict[str, Any]


class _OpenAnswer(BaseModel):
    model_config = ConfigDict(extra="allow")


class TextPart(Strict):
    """A part of a message; text only."""

    type: Literal["text"]
    text: _Text
    annotations: Annotated[list[Any], Field(max_length=1024)] | None = None


class RefusalPart(Strict):
    """A part of an answer that was a refusal."""

    type: Literal["refusal"]
    refusal: _Text

    @property
    def text(self) -> str:
        """What was said."""
        return self.refusal


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
# One arm is chosen by the kind of JSON value, so that a refusal names what is wrong with that arm.
Content = Annotated[
    Annotated[_Text, Tag("text")]
    | Annotated[list[Part], Field(max_length=1024, fail_fast=True), Tag("parts")],
    Discriminator(lambda given: "parts" if isinstance(given, list) else "text"),
]


class Message(NeutralMessage):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: _Text | None = None

    def text(self) -> str:
        """All text of the message."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or self.refusal or ""


_MEMORY_KINDS: dict[Any, Any] = {
    str: Annotated[str, Field(min_length=1, max_length=64)],
    int: Annotated[int, Field(strict=True)],
    float: Annotated[float, Field(strict=True, allow_inf_nan=False)],
}
"""How a field of that type is written in JSON; `MemoryConfig` says its range."""


def _memory_fields() -> dict[str, Any]:
    """Every field of `MemoryConfig`, so that one that it learns is a request's at once."""
    fields = {}
    for name, hint in get_type_hints(MemoryConfig).items():
        (kind,) = {*(get_args(hint) or (hint,))} - {NoneType}
        fields[name] = (_MEMORY_KINDS[kind] | None, None)
    return fields


_MemoryFields: Any = create_model("_MemoryFields", __base__=Strict, **_memory_fields())


class MemoryOptions(_MemoryFields):  # type: ignore[misc]
    """Memory of a long conversation, with the fields of `MemoryConfig`, which says their ranges; what is not said is the server's default."""


MemoryWish = Annotated[
    Annotated[str, Field(min_length=1, max_length=64), Tag("name")]
    | Annotated[MemoryOptions, Tag("options")],
    Discriminator(lambda given: "name" if isinstance(given, str) else "options"),
]


class RagOptions(Strict):
    """Retrieval and fusion of one request; the server's own settings where nothing is said."""

    index: IndexName | None = Field(default=None, description="Name of an index of this key.")
    k: Annotated[int, Field(ge=1, le=MAX_K, strict=True)] | None = Field(
        default=None, description="Chunks to retrieve."
    )
    search: Search | None = None
    where: Where | None = Field(default=None, description="Filter on chunk metadata.")
    query: Annotated[str, Field(min_length=1, max_length=MAX_QUERY)] | None = Field(
        default=None, description="Text to retrieve by; the last user message by default."
    )
    policy: Annotated[str, Field(max_length=64)] | None = Field(
        default=None,
        description="`prefix` (exact) or a fusion policy: query, cacheblend, epic, ...",
    )
    ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    attention: Annotated[str, Field(max_length=MAX_ATTENTION)] | None = Field(
        default=None,
        description="Which keys computed rows read: `dense` (all), or another method; the engine's default when unset.",
    )
    document_order: Annotated[str, Field(max_length=MAX_DOCUMENT_ORDER)] | None = Field(
        default=None,
        description="Where chunks stand: `retrieved`, `best_last`, `both_ends`, or a static attention method such as `power`: the best where it reads them.",
    )
    conversation: Annotated[str, Field(min_length=1, max_length=MAX_CONVERSATION)] | None = Field(
        default=None,
        description="Name of the conversation: what this turn computes is kept for the next turn of that name. With a fusion policy only.",
    )
    truncation: Truncation = Field(
        default="auto",
        description="`auto` cuts the oldest turns of a conversation that does not fit the context, `disabled` refuses it.",
    )
    memory: MemoryWish | None = Field(
        default=None,
        description="What a long conversation is answered from: `off` (all of it), a method such as `epicache` (a cache of fixed size, approximate), or an object; the server's default when unset.",
    )
    include_text: bool = Field(
        default=True, description="Whether citations carry their chunk's text."
    )


class StreamOptions(Strict):
    """OpenAI's options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(NeutralRequest):
    """OpenAI's chat completion request, with `rag` beside it.

    What would change the answer and cannot be honoured here is refused, not dropped.
    """

    model: Annotated[str, Field(max_length=512)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=2048, fail_fast=True)]
    rag: RagOptions = Field(default_factory=lambda: RagOptions())
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=200)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=200)]],
            Field(max_length=16, fail_fast=True),
        ]
        | None
    ) = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.messages[-1].role != "user" or not self.messages[-1].text().strip():
            raise ValueError("the last message must be the user's and hold at least one word")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options without stream; set stream to true")
        if self.seed is not None and self.temperature:
            raise ValueError(
                f"seed is {self.seed} with temperature {self.temperature}: sampling cannot be "
                "repeated here; set temperature to 0, or leave seed out"
            )
        return self

    @property
    def answer_tokens(self) -> int | None:
        """Most tokens of the answer, under either of OpenAI's names."""
        return self.max_completion_tokens or self.max_tokens


class SearchRequest(Strict):
    """A search without an answer."""

    query: Annotated[str, Field(min_length=1, max_length=MAX_QUERY, pattern=r"\S")]
    index: IndexName | None = None
    k: Annotated[int, Field(ge=1, le=MAX_K, strict=True)] | None = None
    search: Search | None = None
    where: Where | None = None


class Citation(_OpenAnswer):
    """A chunk of the prompt: its number, where it is from, and the prompt tokens that it fills."""

    number: int
    chunk_id: str
    document_id: str
    title: str
    path: str | None
    score: float
    text: str | None = None


class SearchAnswer(_OpenAnswer):
    """Chunks, best first."""

    object: Literal["list"] = "list"
    index: str
    data: list[Citation]


class ChatAnswer(_OpenAnswer):
    """OpenAI's chat completion, with `rag` beside it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    rag: dict[str, Any]


class ModelEntry(_OpenAnswer):
    """The one model that answers here."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelsAnswer(_OpenAnswer):
    """Models, as OpenAI's clients list them."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ErrorFields(_OpenAnswer):
    """One line that says what was given, what is allowed, and what to change."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorAnswer(_OpenAnswer):
    """Body of every refusal."""

    error: ErrorFields


class JsonDocument(Strict):
    """A document sent as text; the suffix of its name chooses the parser (``.txt`` without one)."""

    name: Annotated[str, Field(min_length=1, max_length=255)]
    text: Annotated[str, Field(min_length=1)]


class DocumentsRequest(Strict):
    """Texts sent as JSON, to be ingested into one index."""

    documents: Annotated[list[JsonDocument], Field(min_length=1, max_length=64, fail_fast=True)]
    index: IndexName | None = None


class JobAnswer(_OpenAnswer):
    """Where an upload stands."""

    id: str
    object: Literal["rag.ingest_job"] = "rag.ingest_job"
    index: str
    files: list[str]
    state: Literal["queued", "parsing", "embedding", "writing", "done", "failed"]
    progress: float
    documents: int
    chunks: int
    skipped: list[dict[str, str]]
    notes: list[dict[str, str]]
    error: str | None


class DocumentEntry(_OpenAnswer):
    """A document of an index."""

    id: str
    chunks: int


class DocumentsAnswer(_OpenAnswer):
    """Documents of an index in the order they were added, and the uploads of this key."""

    object: Literal["list"] = "list"
    index: str
    total: int
    data: list[DocumentEntry]
    jobs: list[JobAnswer]


class DeletedAnswer(_OpenAnswer):
    """Answer of ``DELETE``: what was removed."""

    id: str
    object: Literal["rag.document.deleted"] = "rag.document.deleted"
    deleted: bool
    chunks: int


class HealthAnswer(_OpenAnswer):
    """Whether the plugin is active, fusion is on, and what indexes and cache hold."""

    status: Literal["ok", "degraded"]
    activation: dict[str, Any]
    gate: dict[str, Any]
    index: dict[str, Any]
    cache: dict[str, Any]

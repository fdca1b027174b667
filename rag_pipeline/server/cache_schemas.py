"""Orders to the chunk cache over HTTP, and what comes back. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rag_pipeline.protocol.cache_order import MAX_KEYS, MAX_TTL_S
from rag_pipeline.server.openai_fields import Strict
from rag_pipeline.server.schemas import IndexName

KeyWord = Annotated[str, Field(pattern=r"^[0-9a-f]{4,64}$")]
"""A digest, or its first digits: fewer would name half the cache."""
TierName = Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_.-]*$")]

_Keys = Annotated[list[KeyWord], Field(max_length=MAX_KEYS, fail_fast=True)]
_SomeKeys = Annotated[list[KeyWord], Field(min_length=1, max_length=MAX_KEYS, fail_fast=True)]


class KeysOrder(Strict):
    """Chunks by their keys."""

    keys: _SomeKeys = Field(description="Keys of chunks, or their first digits (4 or more).")
    tier: TierName = Field(
        default="", description="Only this tier; all but a shared one by default."
    )


class PinOrder(KeysOrder):
    """Chunks to keep."""

    ttl_s: Annotated[float, Field(gt=0, le=MAX_TTL_S, allow_inf_nan=False)] | None = Field(
        default=None, description="Seconds that the pin holds; for good by default."
    )


class EvictOrder(Strict):
    """Chunks to remove, or what a folder may weigh."""

    keys: _Keys = Field(default=[], description="As of a pin.")
    tier: TierName = ""
    max_bytes: Annotated[int, Field(ge=0, strict=True)] | None = Field(
        default=None, description="Remove the longest unused of a folder until it weighs no more."
    )

    @model_validator(mode="after")
    def _check(self) -> EvictOrder:
        if not self.keys and self.max_bytes is None:
            raise ValueError("keys and max_bytes are both missing; give one")
        return self


class VerifyOrder(Strict):
    """What to read against its checksums."""

    tier: TierName = ""


class WarmOrder(Strict):
    """Chunks of an index to compute."""

    index: IndexName | None = Field(default=None, description="Name of an index of the operator.")
    offset: Annotated[int, Field(ge=0, le=1 << 40, strict=True)] = Field(
        default=0, description="First chunk: `next_offset` of the answer before."
    )
    limit: Annotated[int, Field(ge=1, le=10_000, strict=True)] = Field(
        default=100, description="At most so many chunks."
    )


class _OpenAnswer(BaseModel):
    model_config = ConfigDict(extra="allow")


class TierFigures(_OpenAnswer):
    """One tier; a shared one tells no numbers of chunks and bytes."""

    name: str
    chunks: int | None = None
    bytes: int | None = None
    hits: int | None = None
    misses: int | None = None
    hit_rate: float | None = None


class CacheAnswer(_OpenAnswer):
    """What the chunk cache holds, the nearest tier first; a tenant sees what is its own."""

    object: Literal["rag.cache"] = "rag.cache"
    tenant: str
    tiers: list[TierFigures]
    memory: dict[str, Any] = Field(
        default_factory=dict,
        description="Answers from memories of long conversations, and what these have cost.",
    )


class EntriesAnswer(_OpenAnswer):
    """One page of the records."""

    object: Literal["list"] = "list"
    total: int
    entries: list[dict[str, Any]]


class DoneAnswer(_OpenAnswer):
    """What an order did, by the keys of the chunks."""

    object: Literal["rag.cache.done"] = "rag.cache.done"

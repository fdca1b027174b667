"""Every setting: its key, type, bounds, default and one line of explanation.

The explanations feed the template of ``config init`` and the table in ``docs/configuration.md``;
``tests/config`` holds the defaults equal to those of the commands and of the engine's plugin.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PREFIX_POLICY = "prefix"
FUSION_POLICIES = ("full", "reuse", "cacheblend", "epic", "query", "adaptive")
"""Named here once more because the registry of policies imports torch; a test compares both."""

MEMORY_METHODS = (
    "off",
    "epicache",
    "epicache-shared",
    "streaming",
    "snapkv",
    "keydiff",
    "kvzip",
    "retrieval",
)
"""``off``, and the methods of :mod:`rag_pipeline.memory` that bound a conversation; named once more for the same reason."""


def _policy(text: str, names: tuple[str, ...]) -> str:
    base, colon, tail = text.partition(":")
    if base not in names:
        raise ValueError(f"choose one of {', '.join(names)}")
    if colon:
        if base == PREFIX_POLICY:
            raise ValueError("policy prefix takes no ratio")
        try:
            ratio = float(tail)
        except ValueError:
            ratio = -1.0
        if not 0.0 <= ratio <= 1.0:
            raise ValueError("the ratio behind the colon must be a number from 0 to 1")
    return text


def _fusion_policies() -> tuple[str, ...]:
    """Those of other distributions too; a policy that a program registers is known to that program only."""
    offered = (one.name for one in entry_points(group="rag_pipeline.policies"))
    return tuple(dict.fromkeys((*FUSION_POLICIES, *offered)))


def _ask_policy(text: str) -> str:
    return _policy(text, (PREFIX_POLICY, *_fusion_policies()))


def _fusion_policy(text: str) -> str:
    return _policy(text, _fusion_policies())


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Search = Annotated[Literal["dense", "bm25", "hybrid"], Field(description="How to search.")]
_TopK = Annotated[int, Field(ge=1, le=64, description="Chunks to retrieve.")]
_DocumentOrder = Annotated[
    str,
    Field(
        description="Where documents stand: retrieved, best_last, both_ends, or power[:OPTIONS]."
    ),
]
_ChunkTokens = Annotated[int, Field(ge=16, le=8192)]
_Overlap = Annotated[int, Field(ge=0, description="Tokens shared by neighbouring chunks.")]


class IngestSettings(_Section):
    """Defaults of ``rag-pipeline ingest``."""

    chunk_tokens: _ChunkTokens = Field(default=192, description="Most tokens in a chunk.")
    overlap: _Overlap = 0
    factory: str | None = Field(
        default=None, description="FAISS index_factory string; exact search when unset."
    )
    include: list[str] = Field(default=[], description="Globs of files to take.")
    exclude: list[str] = Field(default=[], description="Globs of files to leave.")
    sync: bool = Field(default=False, description="Also remove documents that are gone.")
    warm: bool = Field(default=False, description="Then compute the chunks' KV.")


class AskSettings(_Section):
    """Defaults of ``rag-pipeline ask``."""

    search: _Search = "dense"
    top_k: _TopK = 4
    document_order: _DocumentOrder = "retrieved"
    policy: Annotated[str, AfterValidator(_ask_policy)] = Field(
        default=PREFIX_POLICY,
        description="prefix (exact), or a fusion policy NAME or NAME:RATIO (query:0.15).",
    )
    max_new_tokens: int = Field(default=128, ge=1, description="Longest answer, in tokens.")
    stream: bool = Field(default=False, description="Print the answer as it comes.")


class ServeSettings(_Section):
    """Defaults of ``rag-pipeline serve``; SGLang's own flags are not settings."""

    indexes: list[str] = Field(
        default=[], description="Index folders or NAME=FOLDER; the shared index when empty."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=30000, ge=1, le=65535, description="Port to listen on.")
    tenants: str | None = Field(
        default=None, description="JSON file of further keys, each with its own indexes."
    )
    policy: Annotated[str, AfterValidator(_ask_policy)] = Field(
        default="query", description="For requests that name none; as ask.policy."
    )
    search: _Search = "dense"
    top_k: _TopK = 4
    document_order: _DocumentOrder = "retrieved"
    chunk_tokens: _ChunkTokens = Field(
        default=192, description="Most tokens in a chunk of a new index."
    )
    overlap: _Overlap = 0
    max_upload_mb: int = Field(default=16, ge=1, le=4096, description="Largest upload, MiB.")
    parse_seconds: int = Field(
        default=60, ge=1, le=3600, description="CPU seconds to read and split one file."
    )
    parse_memory_mb: int = Field(default=1024, ge=256, description="Memory for that, MiB.")
    job_seconds: int = Field(
        default=1800, ge=1, le=86400, description="Longest work on one upload, seconds."
    )
    max_index_chunks: int = Field(
        default=1_000_000, ge=1, description="Chunks in one index; an upload beyond it is refused."
    )
    api_key_file: str | None = Field(default=None, description="File of the operator's key.")
    admin_api_key_file: str | None = Field(
        default=None, description="File of the key of SGLang's administrative routes."
    )
    max_searches: int = Field(
        default=64,
        ge=1,
        description="Searches that wait or run, those of questions apart; one more is answered 503.",
    )
    max_questions: int = Field(
        default=128,
        ge=1,
        description="Questions that wait or are answered; one more is answered 503. Raise --max-queued-requests too.",
    )
    max_connections: int = Field(default=1024, ge=1, description="Connections open at once.")
    max_body_mb: int = Field(
        default=64, ge=1, le=4096, description="Largest request to SGLang's own routes, MiB."
    )
    stop_seconds: int = Field(
        default=15, ge=0, le=3600, description="For requests to end after SIGTERM."
    )


class ChatSettings(_Section):
    """Defaults of ``rag-pipeline chat``."""

    max_new_tokens: int = Field(default=256, ge=1, description="Longest answer, in tokens.")


class MemorySettings(_Section):
    """What long conversations are answered from: defaults of ``serve`` and ``chat``."""

    method: Literal[MEMORY_METHODS] = Field(  # type: ignore[valid-type]
        default="off",
        description="off: the whole conversation; epicache: a cache of fixed size, approximate.",
    )
    budget_tokens: int = Field(
        default=2048,
        ge=64,
        le=131_072,
        description="Tokens that a memory keeps per layer and head.",
    )
    episodes: int = Field(
        default=4,
        ge=1,
        le=16,
        description="Topics that a conversation is divided into, each with a memory.",
    )
    block_tokens: int = Field(
        default=512,
        ge=32,
        le=8192,
        description="Tokens that join a memory at once; what is newer stands in the prompt as it is.",
    )


class FusionSettings(_Section):
    """Switches of fusion for a whole engine; ``RAG_PIPELINE_FUSION`` takes them as JSON."""

    enabled: bool = Field(default=True, description="Off: no request is touched.")
    store_bytes: int = Field(
        default=2 << 30, gt=0, description="Bytes of chunk KV kept in memory by one rank."
    )
    eviction: str = Field(
        default="lru",
        description="Which chunks leave memory first: lru, lfu, fifo, or lookahead (what waiting requests need stays).",
    )
    policy: Annotated[str, AfterValidator(_fusion_policy)] = Field(
        default="query", description="Policy of requests that name none; NAME or NAME:RATIO."
    )
    automatic: bool = Field(
        default=False,
        description="Approximate unasked: look for stored chunks in every prompt, of any client.",
    )
    automatic_tenants: list[str] = Field(
        default=[],
        description="The same for single tenants, by `cache_salt` up to a `/`; a tenants file sets its own.",
    )
    background: bool = Field(
        default=True,
        description="Compute missing chunks while the engine is idle, and by `build_share` while it is busy.",
    )
    build_share: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Rows of such builds for each row that a busy engine computes; 0 to wait for idleness.",
    )
    max_background: int = Field(default=64, ge=0, description="Chunks waiting for that at most.")
    min_reused_tokens: int = Field(
        default=16, ge=1, description="With fewer loadable tokens a prompt is prefilled as usual."
    )
    checksums: bool = Field(default=False, description="Take a checksum of every record in memory.")
    self_check: bool = Field(
        default=True, description="Prove the path on the loaded model at start."
    )
    attention: str = Field(
        default="dense",
        description="Attention method of requests that name none, of any client; dense reads every key, others are "
        "approximate.",
    )
    attention_kernel: str = Field(
        default="auto",
        description="Attention kernel of fused passes; auto takes the best for the device.",
    )
    time_attention: bool = Field(
        default=False,
        description="Measure the attention of prompts: seconds and keys read, in `/server_info`; for benchmarks.",
    )
    conversation_memory: str = Field(
        default="turns",
        description="What turns of a conversation leave: turns (loaded in place), cached_attention (also past the window).",
    )
    passage_tokens: int = Field(
        default=768,
        ge=0,
        description="Neutral text that chunk KV is computed behind, in tokens; 0 for none.",
    )
    passage_file: str = Field(
        default="",
        description="File with that text; a sample of the index when unset, or the built-in prose.",
    )
    store_dir: str = Field(
        default="",
        description="Folder of chunk KV for engines started without a store of their own.",
    )
    tier: str = Field(
        default="disk",
        description="What that folder is opened as; other tiers come with their packages.",
    )
    store_dir_bytes: int = Field(
        default=16 << 30,
        ge=0,
        description="Byte budget of the folder of chunk KV; whoever holds most loses the longest unused chunks.",
    )
    store_codec: str = Field(
        default="plain",
        description="How chunk KV is written below memory: plain is lossless; fp8, kivi8, kivi4 are smaller, "
        "and approximate when they are read back.",
    )
    preload_layers: int = Field(
        default=0,
        ge=0,
        description="Layers of chunk KV that must have come from below memory before a prompt is computed.",
    )
    trace: bool = Field(
        default=False,
        description="Record when each layer of chunk KV was loaded, waited for and computed; /server_info shows the "
        "latest.",
    )
    remote: str = Field(
        default="",
        description="Store that several servers share: valkey://host:port, hicache+BACKEND://...",
    )
    store_tenants: str = Field(
        default="*",
        description="Tenants whose chunk KV is read at start, as digests; * for all; the commands set it.",
    )


class Settings(_Section):
    """All settings. A key of a section is written ``section.key``.

    Raises
    ------
    pydantic.ValidationError
        An unknown key, a wrong type, or a value out of bounds. :func:`.load_settings` turns it into
        one line.
    """

    model: str = Field(
        default="smollm2-135m",
        description="Language model: hub id, folder, GGUF file or packaged name.",
    )
    embedder: str | None = Field(
        default=None,
        description="Embedder: hub id, folder or packaged name; the index's own when unset, "
        "all-minilm-l6-v2 for a new index.",
    )
    index: str | None = Field(default=None, description="Index folder.")
    store: str | None = Field(
        default=None, description="Folder of chunk KV; below home when unset."
    )
    server: str | None = Field(default=None, description="URL of a running SGLang server to use.")
    home: str | None = Field(
        default=None, description="Folder of what the project makes; the platform's when unset."
    )
    plugin: Literal["on", "off"] = Field(
        default="on", description="off: the engine is stock SGLang."
    )
    fast_start: Literal["on", "off"] = Field(
        default="on", description="One import of SGLang for both of its child processes (CPU only)."
    )
    cpu_decode: Literal["exact", "fast"] = Field(
        default="exact", description="fast: decoding on the CPU may differ in a last bit."
    )
    cpu_kernels: Literal["native", "torch"] = Field(
        default="native",
        description="torch: fused passes on the CPU without the kernels that a C++ compiler builds.",
    )
    tpla: Literal["off", "identity", "hadamard", "pca", "output"] = Field(
        default="off",
        description="Slice the latents of an MLA model over the ranks of a CPU engine, in this basis; approximate.",
    )
    tpla_statistics: str | None = Field(
        default=None, description="File of `tpla calibrate`; the one of the model when unset."
    )
    ingest: IngestSettings = Field(default_factory=IngestSettings)
    ask: AskSettings = Field(default_factory=AskSettings)
    chat: ChatSettings = Field(default_factory=ChatSettings)
    serve: ServeSettings = Field(default_factory=ServeSettings)
    memory: MemorySettings = Field(default_factory=MemorySettings)
    fusion: FusionSettings = Field(default_factory=FusionSettings)

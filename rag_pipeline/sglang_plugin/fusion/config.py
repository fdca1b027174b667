"""Switches of fusion for a whole engine; they reach SGLang's processes through the environment."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunk_cache import CODECS, DISK_BYTES, LOSSLESS, TIERS, parse_remote_url, shown_url
from chunk_cache.eviction import DEFAULT_EVICTION, EvictionPolicy, create_eviction
from chunk_cache.policies import DEFAULT_POLICY, create_policy
from rag_kernels import ATTENTION_KERNELS
from rag_pipeline.config import kv_store_dir
from rag_pipeline.errors import EngineError
from rag_pipeline.protocol import DENSE_ATTENTION, FusionRequest, RequestError
from rag_pipeline.sglang_plugin.fusion.conversation_memories import CONVERSATION_MEMORIES

CONFIG_VARIABLE = "RAG_PIPELINE_FUSION"
"""Environment variable: ``off``, ``on`` (the defaults), or a JSON object of :class:`FusionConfig`."""

_OFF = frozenset({"off", "0", "false", "no"})
_ON = frozenset({"", "on", "1", "true", "yes"})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FusionConfig:
    """What an operator may set.

    Attributes
    ----------
    enabled : bool
        Off means that no request is touched.
    store_bytes : int
        Byte budget of the chunk-KV store of one rank.
    eviction : str
        Which chunks leave that store first (:data:`chunk_cache.eviction.EVICTIONS`); ``NAME`` or ``NAME:VARIANT``.
    policy : str
        Policy of requests that name none; ``NAME`` or ``NAME:RATIO``.
    automatic : bool
        Look for stored chunks in prompts that do not ask for it (:mod:`.consent`).
    automatic_tenants : tuple of str
        The same for single tenants: first parts (up to a ``/``) of the ``cache_salt`` of their requests.
    background : bool
        Compute missing chunks when the engine is idle, and within ``build_share`` when it is busy.
    build_share : float
        Rows of such builds for each row that a busy engine computes for clients; 0 to wait for idleness.
    max_background : int
        Bound of that queue; what does not fit is dropped and counted.
    min_reused_tokens : int
        Below this many loadable tokens a prompt is prefilled as usual.
    checksums : bool
        Take a checksum of every record.
    self_check : bool
        Prove the path on the loaded model at start, before the first request is fused.
    attention : str
        Attention method of requests that name none, those without fusion fields too (:mod:`.consent`).
    attention_kernel : str
        Attention kernel of fused passes (:data:`rag_kernels.ATTENTION_KERNELS`); ``auto`` for the best on the device.
    time_attention : bool
        Measure how long the attention of prompts takes and how many keys it reads; for benchmarks.
    conversation_memory : str
        What turns leave for the following ones (:data:`~.conversations.CONVERSATION_MEMORIES`).
    passage_tokens : int
        Length of the neutral passage that chunks are computed behind (:mod:`.passage`); 0 for none.
    passage_file : str
        UTF-8 file with the text of that passage, best in the manner of the documents; empty for the built-in prose.
    store_dir : str
        Folder that chunk KV is read from at start and written to when it is made; empty for none.
    tier : str
        What ``store_dir`` is opened as (:data:`chunk_cache.TIERS`).
    store_dir_bytes : int
        Byte budget of that folder, of all its models, ranks and tenants together.
    store_codec : str
        How KV is written to tiers below memory (:data:`chunk_cache.CODECS`); what is there is read whatever this says.
    preload_layers : int
        Layers of a request's chunks that must have come from a lower tier before it is computed; the others load
        meanwhile.
    trace : bool
        Record when each layer of chunk KV was loaded, waited for and computed (:class:`chunk_cache.Timeline`); the
        state in ``/server_info`` shows the latest.
    remote : str
        Address of a store that several servers share (:mod:`chunk_cache.tiers.remote.url`); empty for none. May hold
        a password, so it is left out of :func:`repr`, and :meth:`shown` is what others may see.
    store_tenants : str
        Digests (:func:`chunk_cache.tenant_mark`, joined by commas) of the tenants whose records are read at start;
        ``*`` for all. Records of nobody in particular are always read.
    """

    enabled: bool = True
    store_bytes: int = 2 << 30
    eviction: str = DEFAULT_EVICTION
    policy: str = DEFAULT_POLICY
    automatic: bool = False
    automatic_tenants: tuple[str, ...] = ()
    background: bool = True
    build_share: float = 0.1
    max_background: int = 64
    min_reused_tokens: int = 16
    checksums: bool = False
    self_check: bool = True
    attention: str = DENSE_ATTENTION
    attention_kernel: str = "auto"
    time_attention: bool = False
    conversation_memory: str = "turns"
    passage_tokens: int = 768
    passage_file: str = ""
    store_dir: str = ""
    tier: str = "disk"
    store_dir_bytes: int = DISK_BYTES
    store_codec: str = LOSSLESS
    preload_layers: int = 0
    trace: bool = False
    remote: str = dataclasses.field(default="", repr=False)
    store_tenants: str = "*"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            if type(value) is not wanted:
                kind = "a list" if wanted is tuple else wanted.__name__
                raise EngineError(f"{CONFIG_VARIABLE}: {field.name} is {value!r}; give {kind}.")
        if not all(isinstance(tenant, str) for tenant in self.automatic_tenants):
            raise EngineError(
                f"{CONFIG_VARIABLE}: automatic_tenants is {list(self.automatic_tenants)}; give strings."
            )
        if self.passage_tokens < 0:
            raise EngineError(
                f"{CONFIG_VARIABLE}: passage_tokens is {self.passage_tokens}; give 0 (none) or more."
            )
        if self.store_bytes <= 0 or self.max_background < 0 or self.min_reused_tokens < 1:
            raise EngineError(
                f"{CONFIG_VARIABLE}: store_bytes={self.store_bytes}, max_background="
                f"{self.max_background}, min_reused_tokens={self.min_reused_tokens}; the first and "
                "the last must be positive, the other not negative."
            )
        if not 0 <= self.build_share <= 1:
            raise EngineError(
                f"{CONFIG_VARIABLE}: build_share is {self.build_share}; give 0 (only when idle) to 1."
            )
        if self.preload_layers < 0:
            raise EngineError(
                f"{CONFIG_VARIABLE}: preload_layers is {self.preload_layers}; give 0 (load while computing) or more."
            )
        if self.store_dir_bytes < 0:
            raise EngineError(
                f"{CONFIG_VARIABLE}: store_dir_bytes is {self.store_dir_bytes}; give 0 (nothing is written) or more."
            )
        if self.attention_kernel not in ("auto", *ATTENTION_KERNELS.names()):
            allowed = ", ".join(("auto", *ATTENTION_KERNELS.names()))
            raise EngineError(
                f"{CONFIG_VARIABLE}: attention_kernel is {self.attention_kernel!r}; choose one of {allowed}."
            )
        if self.conversation_memory not in CONVERSATION_MEMORIES.names():
            allowed = ", ".join(CONVERSATION_MEMORIES.names())
            raise EngineError(
                f"{CONFIG_VARIABLE}: conversation_memory is {self.conversation_memory!r}; choose one of {allowed}."
            )
        if self.tier not in TIERS.names():
            raise EngineError(
                f"{CONFIG_VARIABLE}: tier is {self.tier!r}; choose one of {', '.join(TIERS.names())}."
            )
        if self.store_codec not in CODECS.names():
            raise EngineError(
                f"{CONFIG_VARIABLE}: store_codec is {self.store_codec!r}; choose one of {', '.join(CODECS.names())}."
            )
        try:
            if self.remote:
                parse_remote_url(self.remote)
            create_policy(self.policy)
            self.make_eviction()
            FusionRequest(attention=self.attention).make_attention()
        except (ValueError, RequestError) as error:
            raise EngineError(f"{CONFIG_VARIABLE}: {error}") from None

    def make_eviction(self) -> EvictionPolicy:
        """Make the eviction policy of the chunk-KV store, for these budgets."""
        disk_bytes = self.store_dir_bytes if self.store_dir else 0
        return create_eviction(self.eviction, memory_bytes=self.store_bytes, disk_bytes=disk_bytes)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> FusionConfig:
        """Read :data:`CONFIG_VARIABLE`.

        Raises
        ------
        EngineError
            The variable holds something else than ``on``, ``off`` or a JSON object of known fields.
        """
        text = (os.environ if environ is None else environ).get(CONFIG_VARIABLE, "").strip()
        if text.lower() in _OFF:
            return cls(enabled=False)
        if text.lower() in _ON:
            return cls()
        try:
            given: Any = json.loads(text)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise EngineError(
                f"{CONFIG_VARIABLE}={shown_url(text)!r}: give on, off, or a JSON object."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise EngineError(
                    f"{CONFIG_VARIABLE} has no field {key!r}; allowed: {', '.join(known)}."
                )
        # JSON has no tuples.
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.items()
        }
        return cls(**values)

    def store_folders(self, *given: Path | None) -> tuple[Path, ...]:
        """Folders that may hold this user's chunk KV: the common one, ``store_dir``, and those given."""
        named = [kv_store_dir(), Path(self.store_dir) if self.store_dir else None, *given]
        return tuple(dict.fromkeys(path.absolute() for path in named if path is not None))

    def shown(self) -> dict[str, Any]:
        """All fields as others may see them: an address without its secrets."""
        return dataclasses.asdict(self) | {"remote": shown_url(self.remote)}

    def to_env(self) -> str:
        """Text for :data:`CONFIG_VARIABLE` that reads back as this configuration."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

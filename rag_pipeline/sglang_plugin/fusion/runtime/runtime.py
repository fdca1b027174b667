"""The one object of a scheduler process that holds what fusion needs, or the reason why it is off."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from chunk_cache import (
    Fetcher,
    KVContext,
    MemoryStore,
    Pauses,
    RecordForm,
    TierChain,
    Timeline,
    hash_token_ids,
)
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.conversation_memories import CONVERSATION_MEMORIES
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.runtime.attention_clock import AttentionClock
from rag_pipeline.sglang_plugin.fusion.runtime.build_queue import BuildQueue
from rag_pipeline.sglang_plugin.fusion.runtime.build_share import BuildShare
from rag_pipeline.sglang_plugin.fusion.runtime.copy_stream import CopyStream
from rag_pipeline.sglang_plugin.fusion.runtime.device_timer import DeviceTimer
from rag_pipeline.sglang_plugin.fusion.runtime.fair_table import FairTable
from rag_pipeline.sglang_plugin.fusion.runtime.metrics import FusionMetrics
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts
from rag_pipeline.sglang_plugin.fusion.runtime.rank_group import RankGroup
from rag_pipeline.sglang_plugin.fusion.runtime.rates import Rates

if TYPE_CHECKING:
    from rag_pipeline.notices import Notice
    from rag_pipeline.sglang_plugin.fusion.builds.erased import ErasedText
    from rag_pipeline.sglang_plugin.fusion.conversations.base import ConversationMemory
    from rag_pipeline.sglang_plugin.fusion.management.desk import CacheDesk

logger = logging.getLogger(__name__)

_MAX_PREFIXES = 256
_BUILD_S = 3600.0
_MAX_FAULTS = 8
"""Failed forwards in a row after which each further one would only cost its requests time twice."""

TokenArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KnownPrefix:
    """A shared prefix that chunks were computed behind, and the context of those chunks."""

    ids: TokenArray
    context: KVContext
    tenant: RadixNamespace

    def begins(self, prompt: TokenArray) -> bool:
        """Whether a prompt starts with it and goes on."""
        return prompt.size > self.ids.size and np.array_equal(prompt[: self.ids.size], self.ids)


class FusionRuntime:
    """State of fusion in one process.

    Parameters
    ----------
    config : FusionConfig
        The operator's switches.
    facts : ModelFacts or None
        The loaded model; None when fusion is off.
    off_reason : str
        Why every prompt is prefilled as usual; empty when fusion works.
    group : RankGroup
        Tensor-parallel ranks.
    metrics : FusionMetrics
        Where numbers go.

    Notes
    -----
    A conversation memory that the settings name and that cannot be made turns fusion off.
    """

    def __init__(
        self,
        config: FusionConfig,
        facts: ModelFacts | None,
        *,
        off_reason: str = "",
        group: RankGroup | None = None,
        metrics: FusionMetrics | None = None,
    ) -> None:
        self.config = config
        self.facts = facts
        self.off_reason = off_reason
        self.group = group or RankGroup()
        self.metrics = metrics or FusionMetrics()
        # Its request gives a right to build back; the prefill that builds may take minutes on a slow machine.
        self.store = MemoryStore(
            config.store_bytes,
            checksums=config.checksums,
            build_timeout_s=_BUILD_S,
            slab=torch.cuda.is_available(),  # page-locked; on the host alone it would only copy once more
            eviction=config.make_eviction(),
        )
        self.missing = BuildQueue()
        self.build_share = BuildShare(config.build_share)
        self.rates = Rates()
        """How fast this rank computes, and loads from each tier."""
        self.timer = DeviceTimer(torch.cuda.is_available())
        self.attention_clock = AttentionClock(self.timer) if config.time_attention else None
        """Measures the attention of prompts, where that is asked for."""
        self.copies = CopyStream(torch.device("cuda")) if torch.cuda.is_available() else None
        """Brings chunk KV to the GPU beside the forward; None where it lies in the same memory."""
        self.epoch = 0
        """Updates of the weights so far, see :meth:`new_weights`."""
        self.in_update = False
        self.tree_is_old = False
        self.self_check = "not run"
        self.record_form: RecordForm | None = None
        """Shapes of this rank's records."""
        self.tiers: TierChain | None = None
        """Where finished records go besides memory, and where missing ones are looked for."""
        self.fetcher: Fetcher | None = None
        """Brings them from there into memory."""
        self.pauses = Pauses()
        """When this rank computes: what waits for the tiers is written between, if there is a pause."""
        self.queue_seen: list[tuple[str, int]] = []
        """The waiting requests that the store was told of last."""
        self.timeline = Timeline() if config.trace else None
        """Where loading and computing of layers are recorded."""
        self.erased: ErasedText | None = None
        self.desk: CacheDesk | None = None
        """Where an operator's orders come in."""
        self.passage: TokenArray = np.empty(0, dtype=np.int64)
        """Neutral text that chunks are computed behind; empty for none."""
        self.passage_text = ""
        """The text of it where it is not the built-in prose."""
        self.plain_passage = self.passage
        """What takes its place where it holds text that was deleted."""
        self.max_prompt = 0
        """Tokens that a prompt may hold in this engine."""
        self.page_size = 1
        """Tokens of a page of the pool: where the radix tree may cut a prefix."""
        self.mixes_decoding = False
        """Whether batches of prompts hold rows of running requests too (--enable-mixed-chunk)."""
        self._prefixes: FairTable[tuple[str, str], KnownPrefix] = FairTable()
        self._said: set[str] = set()
        self._faults = 0
        self.conversations = self._make_memory()

    def _make_memory(self) -> ConversationMemory:
        """Make the conversation memory that the settings name; one that cannot be made turns fusion off."""
        name = self.config.conversation_memory
        try:
            return CONVERSATION_MEMORIES.get(name)(self)
        except Exception as error:
            told = str(error) if isinstance(error, ValueError) else repr(error)
            reason = f"conversation memory {name!r} cannot be used: {' '.join(told.split())}"
            self.off_reason = self.off_reason or reason
            return CONVERSATION_MEMORIES.get("turns")(self)  # nothing is kept in it

    @property
    def is_on(self) -> bool:
        """Whether requests are fused."""
        return not self.off_reason and not self.in_update and self.facts is not None

    def turn_off(self, reason: str) -> None:
        """Prefill everything as usual from now on, and say so loudly."""
        self.off_reason = reason
        logger.error("Chunk-KV fusion is OFF: %s. Serving goes on by ordinary prefill.", reason)

    def say_once(self, key: str, message: str, *values: Any) -> None:
        """Log a warning the first time its key comes up."""
        if key not in self._said:
            self._said.add(key)
            logger.warning(message, *values)

    def say_fault(self, stage: str, error: Exception) -> None:
        """Log a fault that costs its requests nothing but speed, once per kind, with its traceback."""
        kind = f"{stage}: {type(error).__name__}"
        if kind not in self._said:
            self._said.add(kind)
            logger.error(
                "A fault of fusion (%s); its requests are prefilled as usual. Said once per kind of fault.",
                kind,
                exc_info=error,
            )

    def pass_failed(self, stage: str, error: Exception) -> None:
        """Note a failed fused forward; too many in a row turn fusion off."""
        self.say_fault(stage, error)
        self._faults += 1
        if self._faults >= _MAX_FAULTS and self.is_on:
            self.turn_off(f"{self._faults} fused forwards in a row failed, the last with {error!r}")

    def pass_succeeded(self) -> None:
        """Forget the faults so far: they were not in a row."""
        self._faults = 0

    def new_weights(self, *, in_update: bool, tree_is_old: bool) -> None:
        """Begin another epoch of the weights: no chunk of the old ones is found again, none in work is stored.

        Its identity is drawn and not read from the weights, so it is other whatever was changed, and no other
        process has it: what is stored from now on is of use to this engine only.

        Parameters
        ----------
        in_update : bool
            The weights are still being written, or their memory is released: nothing is stored or loaded.
        tree_is_old : bool
            The radix tree holds, or running requests will publish, KV of older weights until it is flushed.
        """
        self.epoch += 1
        self.in_update, self.tree_is_old = in_update, tree_is_old
        self.missing.clear()
        self._prefixes.clear()
        if self.tiers is not None:
            self.tiers.clear()
        if self.fetcher is not None:
            self.fetcher.clear()
        self.store.reset()
        if self.facts is not None:
            identity = f"{self.facts.fingerprint}+{secrets.token_hex(16)}"
            fields = self.facts.context_fields | {"model_fingerprint": identity}
            self.facts = dataclasses.replace(self.facts, context_fields=fields)
        try:
            self.conversations.forget()
        except Exception as error:
            # Its records are gone and the identity is new: it finds nothing whatever it still lists.
            self.say_fault("forget", error)

    def may_store(self, epoch: int, radix_len: int) -> bool:
        """Whether KV that a request computed is that of the weights in use.

        Parameters
        ----------
        epoch : int
            When the request was admitted.
        radix_len : int
            Tokens that it took from the radix tree, which may hold KV of older weights until it is flushed.
        """
        return epoch == self.epoch and not self.in_update and not (self.tree_is_old and radix_len)

    def prefix(self, prompt: TokenArray, prefix_len: int, tenant: RadixNamespace) -> KnownPrefix:
        """Register and return the prefix ``prompt[:prefix_len]`` of a tenant."""
        ids = prompt[:prefix_len]
        digest = hash_token_ids(ids)
        known = self._prefixes.get(tenant.owner, (tenant.salt, digest))
        if known is None:
            assert self.facts is not None
            known = KnownPrefix(
                ids=ids.copy(),
                context=self.facts.context(prefix_digest=digest, tenant=tenant.salt),
                tenant=tenant,
            )
            self._prefixes.put(tenant.owner, (tenant.salt, digest), known, _MAX_PREFIXES)
        return known

    def behind_passage(self, known: KnownPrefix) -> KnownPrefix | None:
        """Return the prefix with the passage behind it; None without a passage."""
        if not self.passage.size:
            return None
        ids = np.concatenate([known.ids, self.passage])
        return self.prefix(ids, int(ids.size), known.tenant)

    def prefix_of(self, namespace: str) -> KnownPrefix | None:
        """Known prefix that a namespace stands for."""
        for known in self._prefixes.values():
            if known.context.namespace == namespace:
                return known
        return None

    def forget_passage(self, notice: Notice) -> None:
        """Compute no more chunks behind a passage that holds erased text; the built-in prose takes its place.

        Called from another thread. Ranks would change at different moments, so several keep theirs. Where tenants are
        served the passage is no sample of an index but the operator's own: a tenant's deletion leaves it, or all
        others' chunks behind it were lost.
        """
        serves_tenants = self.config.store_tenants != "*"
        if (notice.reach.tenant and serves_tenants) or self.group.size > 1 or not self.passage_text:
            return
        if notice.is_about(self.passage_text, ""):
            self.passage, self.passage_text = self.plain_passage, ""
            # Replaced, not emptied: the scheduler may be reading it.
            self._prefixes = FairTable()

    def prefixes_of(self, prompt: TokenArray, tenant: RadixNamespace) -> list[KnownPrefix]:
        """Known prefixes of the tenant that the prompt begins with, longest first.

        None that is shorter than a worthwhile reuse: nothing, a start token or the opening of a chat template begins
        every prompt, so that one client's chunks behind it would be found in the prompts of all others.
        """
        least = self.config.min_reused_tokens
        found = [
            known
            for known in self._prefixes.of(tenant.owner)
            if known.tenant.salt == tenant.salt and known.ids.size >= least and known.begins(prompt)
        ]
        return sorted(found, key=lambda known: -known.ids.size)

    def status(self) -> dict[str, Any]:
        """JSON-ready state for ``/server_info`` and ``doctor``."""
        return {
            "on": self.is_on,
            "off_reason": self.off_reason,
            "self_check": self.self_check,
            "config": self.config.shown(),
            "store": self.store.stats().to_json(),
            "rates": self.rates.to_json(),
            "counts": self.metrics.to_json(),
            **(
                {}
                if self.attention_clock is None
                else {"attention": self.attention_clock.to_json()}
            ),
            **({} if self.timeline is None else {"trace": self.timeline.to_json()}),
        }


_RUNTIME: FusionRuntime | None = None


def get_runtime() -> FusionRuntime | None:
    """Return the runtime of this process; None before the scheduler is ready and elsewhere."""
    return _RUNTIME


def set_runtime(runtime: FusionRuntime | None) -> None:
    """Install the runtime of this process."""
    global _RUNTIME
    _RUNTIME = runtime

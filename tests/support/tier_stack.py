"""Tiers under a memory store, with the chain and the fetcher that an engine uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from chunk_cache import (
    Build,
    Candidate,
    ChunkKV,
    Fetch,
    Fetcher,
    KVContext,
    LoadError,
    MemoryStore,
    RecordForm,
    Tier,
    TierChain,
)

BUDGET = 1 << 28


class TierStack:
    """What a test does to tiers, and what was counted of it.

    Parameters
    ----------
    tiers : mapping of str to Tier
        The nearest first.
    record : ChunkKV
        Whose form all records have, and which is asked for where a test names none.
    context : KVContext
        Of its namespace.
    **options
        Of :class:`Fetcher`.

    Attributes
    ----------
    counts : Counter of str
        ``TIER.EVENT``.
    refused : list of Exception
        What the tiers refused.
    fault : callable or None
        Strikes once, when the next layer has come.
    """

    def __init__(
        self, tiers: Mapping[str, Tier], record: ChunkKV, context: KVContext, **options: object
    ) -> None:
        self.record, self.context = record, context
        self.counts: Counter[str] = Counter()
        self.refused: list[Exception] = []
        self.fault: Callable[[], object] | None = None
        self.store = MemoryStore(BUDGET)
        self.chain = TierChain(
            tiers,
            count=self._count,
            failed=lambda tier, error: self.refused.append(error),
        )
        form = RecordForm.of(record)
        self.fetcher = Fetcher(
            self.chain,
            self.store,
            form,
            count=self._count,
            took=self._took,
            **options,  # type: ignore[arg-type]
        )

    def _count(self, tier: str, kind: str) -> None:
        self.counts.update([f"{tier}.{kind}"])

    def _took(self, tier: str, num_bytes: int, seconds: float) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            fault()

    def begin(self, records: Sequence[ChunkKV]) -> list[Fetch]:
        """Begin to fetch, as a request does when it comes."""
        return self.fetcher.begin(
            [[Candidate(one.key, one.token_ids, self.context, "")] for one in records]
        )

    def fetch(self) -> bool:
        """Ask for the record as a request does, and use it as a forward does; whether every layer came."""
        record = self.record
        fetches = self.begin([record])
        assert self.fetcher.wait(lambda: all(one.has_header for one in fetches), 60)
        lease = self.store.acquire(record.key, record.token_ids)
        if lease is None:
            assert self.fetcher.drain(60)
            return False
        with lease:
            try:
                for layer in range(record.num_layers):
                    found = lease.record.layer(layer)
                    assert torch.equal(found.k, record.k[layer])
                    assert torch.equal(found.v, record.v[layer])
            except LoadError:
                return False
            finally:
                assert self.fetcher.drain(60)
        return True

    def may_be_computed(self) -> bool:
        """Whether the next request may compute the chunk at once; leaves it absent."""
        build = self.store.begin_build(self.record.key, self.record.token_ids, owner="test")
        if isinstance(build, Build):
            build.abort("test", failed=False)
            return True
        return False

    def close(self) -> None:
        """End the threads; nothing may be left in use."""
        assert self.fetcher.close(60)
        assert self.chain.close(60)
        self.store.check_integrity(expect_idle=True)

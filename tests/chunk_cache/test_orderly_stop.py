"""What waits for a tier when an engine stops is written, for a bounded time; what is not is counted."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
from shelf import Shelf

from chunk_cache import ChunkKV, KVContext, TierChain
from rag_pipeline.sglang_plugin.fusion.builds import persistence


class HeldShelf(Shelf):
    """Takes nothing before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def put(self, record: ChunkKV, *, context: Any = None, tenant: Any = None) -> bool:
        assert self.free.wait(60)
        return super().put(record)


@dataclasses.dataclass
class Stopping:
    """What :func:`persistence.close` touches of a runtime, the real parts of it."""

    tiers: TierChain
    counted: list[Any]
    fetcher: None = None

    @property
    def metrics(self) -> Any:
        return self

    def count_tier(self, *event: Any) -> None:
        self.counted.append(event)


@pytest.mark.parametrize("answers", [True, False])
def test_an_orderly_stop_writes_what_waits_or_counts_it(
    answers: bool,
    make_record: Callable[..., ChunkKV],
    context: KVContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(persistence, "FLUSH_S", 30.0 if answers else 0.05)
    quick, held = Shelf(), HeldShelf()
    runtime = Stopping(TierChain({"disk": held, "remote": quick}), [])
    records = [make_record(range(n, n + 9)) for n in range(3)]
    for record in records:
        runtime.tiers.put(record, context=context)
    if answers:
        threading.Timer(0.2, held.free.set).start()
    persistence.close(runtime)  # type: ignore[arg-type]
    if answers:
        assert len(held.records) == len(quick.records) == 3
        assert runtime.counted == []
    else:
        assert len(quick.records) == 3, "a tier that hangs keeps nothing from another"
        assert ("disk", "dropped", 3) in runtime.counted
        held.free.set()
    assert not runtime.tiers.put(records[0], context=context), "nothing is taken any more"

"""A conversation's memory of fixed size, built step by step in an engine of the test process."""

from __future__ import annotations

import json
from typing import Any

from fusion_helpers import PREFIX_IDS, report, tokens

from rag_pipeline.protocol import memory_id
from rag_pipeline.sglang_plugin.fusion.memory.records import name_of

BLOCK, BUDGET, PROBE, STEPS = 32, 20, 11, 4
HISTORY = tokens(BLOCK * STEPS, 41)
BLOCKS = [HISTORY[i : i + BLOCK] for i in range(0, len(HISTORY), BLOCK)]
PROBES = [tokens(PROBE, 50)] * STEPS
QUESTION = tokens(9, 2)


class Chat:
    """One conversation's memory, built step by step in an engine."""

    def __init__(self, local: Any, *, budget: int = BUDGET, rule: str = "epicache", **fields: Any):
        self.local, self.budget, self.rule, self.fields = local, budget, rule, fields
        self.prefix = PREFIX_IDS
        self.name, self.slots, self.seen = "", 0, 0
        self.history: list[int] = []

    def load(self) -> list[dict[str, Any]]:
        if not self.name:
            return []
        start = len(self.prefix)
        return [{"start": start, "end": start + self.slots, "id": self.name}]

    def begin(self) -> list[int]:
        """Prefix and placeholders: the last tokens of the history."""
        return [*self.prefix, *(self.history[-self.slots :] if self.slots else [])]

    def step(
        self, block: list[int], probe: list[int], own: list[list[int]] | None = None, **asked: Any
    ) -> dict[str, Any]:
        ids = [*self.begin(), *block]
        store = {"end": len(ids), "budget": self.budget, "rule": self.rule}
        if own:
            store["own"] = own
        memory = {"store": store, **asked} | ({"load": self.load()} if self.name else {})
        req = self.ask([*ids, *probe], memory, 1)
        pairs = [(start, end) for start, end in own or ()]
        wanted = memory_id(self.name, self.prefix, block, probe, self.rule, self.budget, pairs)
        self.history += block
        self.slots = min(self.budget, self.slots + len(block))
        self.name = wanted
        return report(req)["memory"]

    def ask(self, ids: list[int], memory: dict[str, Any], new: int = 4, **fields: Any) -> Any:
        fusion = {"prefix_len": len(self.prefix), "memory": json.dumps(memory)}
        return self.local.ask(ids, new, fusion=fusion, top=20, **(self.fields | fields))

    def answer(self, question: list[int], **asked: Any) -> Any:
        return self.ask([*self.begin(), *question], {"load": self.load(), **asked})

    def record(self) -> Any:
        """What the store holds under the name of the last step."""
        store = self.local.runtime.store
        for key in store.keys():  # noqa: SIM118 - not a mapping
            with store.borrow(key) as record:
                if record is not None and name_of(record) == self.name:
                    assert record.token_ids.tolist() == self.history[-self.slots :]
                    return record
        return None

    def build(self, steps: int = STEPS) -> list[dict[str, Any]]:
        return [self.step(b, p) for b, p in zip(BLOCKS[:steps], PROBES, strict=False)]

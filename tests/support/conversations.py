"""A chat that changes its topic, and an engine's bookkeeping of memory records without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Any

from memory_steps import stored_id

from rag_pipeline.errors import EngineError
from rag_pipeline.memory import Utterance
from rag_pipeline.protocol import GenerationPiece, GenerationRequest
from rag_pipeline.protocol.fields import parse_fields

TOPICS = {
    "garden": (
        "I planted tomatoes and basil in the raised bed behind the house.",
        "The roses need pruning before the first frost comes.",
        "Snails ate half of my lettuce seedlings last night.",
        "Compost from last autumn makes the soil dark and crumbly.",
        "The apple tree carries more fruit than in any year before.",
        "I water the cucumbers early, before the sun gets strong.",
    ),
    "music": (
        "My violin teacher wants me to play the sonata at the concert.",
        "The orchestra rehearses the symphony every Thursday evening.",
        "I bought a new bow, and the strings sound much warmer now.",
        "The pianist and I practise the duet twice per week.",
        "Our choir sings Bach at the church on Sunday.",
        "The conductor asked for a slower second movement.",
    ),
    "travel": (
        "The night train to Lisbon leaves from platform nine.",
        "We booked a small hotel near the harbour in Porto.",
        "My passport expires in March, so I must renew it.",
        "The flight to Reykjavik was delayed by six hours.",
        "We hiked along the coast and slept in a mountain hut.",
        "The ferry to the island sails only on weekends.",
    ),
}


def chat(*runs: tuple[str, int]) -> list[Utterance]:
    """Messages of the user and the assistant in turn, so many of each topic; each has a number, so no two are alike."""
    said: list[Utterance] = []
    for topic, count in runs:
        for place in range(count):
            text = TOPICS[topic][place % len(TOPICS[topic])]
            role = "assistant" if len(said) % 2 else "user"
            said.append(Utterance(role, f"{text} That is note {len(said)}."))
    return said


class RecordBook:
    """Takes requests as the engine does and keeps the ids of the records that it would have; computes nothing.

    It names a record by what it was sent, so a client whose ids differ from the engine's gets nothing.

    Parameters
    ----------
    before : callable, optional
        Called with each request in front of its answer; may raise.
    """

    context_length = 8192

    def __init__(self, before: Callable[[GenerationRequest], None] | None = None) -> None:
        self.records: dict[str, tuple[int, ...]] = {}
        self.requests: list[GenerationRequest] = []
        self.aborted = 0
        self._before = before
        self._lock = threading.Lock()

    def generate(self, request: GenerationRequest) -> Generator[GenerationPiece, None, None]:
        with self._lock:
            self.requests.append(request)
        if self._before is not None:
            self._before(request)
        ended = False
        try:
            yield GenerationPiece(text="", meta_info={})
            yield GenerationPiece(text="ok", meta_info=self._meta(request))
            ended = True
        finally:
            self.aborted += not ended

    def _meta(self, request: GenerationRequest) -> dict[str, Any]:
        (action,) = request.fusion.to_kv_hints()["actions"]
        asked = parse_fields(action["payload"], len(request.input_ids))
        assert len(request.input_ids) < self.context_length
        memory, ids = asked.memory, request.input_ids
        if memory is None:
            return {"cached_tokens": 0}
        for load in memory.load:
            known = self.records.get(load.id)
            if known is not None and known != ids[load.start : load.end]:
                raise EngineError(f"the slots of {load.id} hold other tokens")
        loaded = sum(load.id in self.records for load in memory.load) == len(memory.load)
        report: dict[str, Any] = {
            "loaded": memory.load_end - asked.prefix_len if memory.load and loaded else 0,
            "missed": int(not loaded),
            "stored": False,
        }
        if memory.store is not None and loaded:
            seen = ids[asked.prefix_len : memory.store.end]
            name = stored_id(asked, ids)
            self.records[name] = seen[-memory.store.budget :]
            report |= {"stored": True, "id": name}
        usage = {"exact_prefix_tokens": asked.prefix_len, "reused_tokens": report["loaded"]}
        return {"rag_fusion": {**usage, "recomputed_tokens": 0, "memory": report}}

"""One of two tensor-parallel ranks: drives its scheduler by the same script as the other, writes what it saw.

Usage: two_ranks.py RANK CASE.json OUT.json
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from rank_programs import RankProgram

    from rag_pipeline.sglang_plugin.fusion.forward import layer_pass as attention

    program = RankProgram()
    case, rank = program.case, program.rank
    engine = program.engine(case["model"])
    seen = {"on": engine.runtime.is_on, "self_check": engine.runtime.self_check, "runs": []}

    def told(req):
        info = (req.customized_info or {}).get("rag_fusion", [None])[0]
        return {
            "ids": list(req.output_ids),
            "logprobs": list(req.logprob.output_token_logprobs_val),
            "report": info,
        }

    def note(req):
        seen["runs"].append(told(req))

    prefix, chunks = case["prefix"], case["chunks"]
    for chunk in chunks:
        engine.build(prefix, chunk)
    store = engine.runtime.store
    lost = ""
    for key in store.keys():  # noqa: SIM118
        lease = store.acquire(key, chunks[1])
        if lease is not None:
            lost, seen["shard"] = key, list(lease.record.k.shape)
            lease.release()
    for fusion in case["policies"]:
        engine.flush()
        note(engine.ask(case["ids"], 4, fusion=fusion))
    # The turns of a conversation, which each rank keeps as its own head shard; then one rank loses the first turn.
    talk = case["policies"][3] | {"conversation": "c"}
    engine.flush()
    note(engine.ask(case["ids"], 4, fusion=talk))
    turn = [*case["ids"], *seen["runs"][-1]["ids"], 5]
    note(engine.ask(turn, 4, fusion=talk))
    if rank == 0:
        ((first, *_),) = engine.runtime.conversations.table._spaces.of("")
        assert store.evict(first.key)
    note(engine.ask(turn, 4, fusion=talk))
    # A fault on one rank only: both prefill as usual, in step.
    original, layer = attention.FusedPass._run_layer, 3 if rank == 1 else -1

    def fails(self, at, *args):
        if at.layer_id == layer:
            raise RuntimeError("injected")
        return original(self, at, *args)

    attention.FusedPass._run_layer = fails
    for fusion in (case["policies"][3], case["policies"][4]):
        engine.flush()
        note(engine.ask(case["ids"], 4, fusion=fusion))
    layer = 1 if rank == 0 else -1
    engine.flush()
    note(engine.ask(case["ids"], 4, fusion=case["policies"][5]))
    attention.FusedPass._run_layer = original
    # One rank loses a chunk: both must treat it as missing, or their shapes differ and they hang.
    if rank == 1:
        assert store.evict(lost)
    engine.flush()
    note(engine.ask(case["ids"], 4, fusion=case["policies"][1]))
    seen["memory"] = remembered(engine, told, rank)
    seen["tiers"] = restarted(engine, case, told)
    program.write(seen)


def remembered(engine, told, rank):
    """A conversation's record, made in three steps: what this rank's heads keep, an answer, and one after rank 1 lost it."""
    from memory_chats import QUESTION, Chat

    engine.fresh()
    chat = Chat(engine)
    stored = [step["stored"] for step in chat.build(3)]
    record = chat.record()
    answer = told(chat.answer(QUESTION))
    if rank == 1:
        engine.runtime.store.clear()
    return {
        "stored": stored,
        "positions": record.side["positions"].tolist(),
        "runs": [answer, told(chat.answer(QUESTION))],
    }


def restarted(engine, case, told):
    """A folder that both ranks share, each for its own head shards: before a restart, after it, and from the folder."""
    from rag_pipeline.sglang_plugin.fusion.admission import fetching
    from rag_pipeline.sglang_plugin.fusion.builds import persistence

    # Two busy processes: neither may give up on a header before it has come.
    fetching.HEADER_WAIT_S = 60.0
    runtime = engine.runtime
    runtime.config = dataclasses.replace(runtime.config, store_dir=case["store_dir"])

    def ask():
        engine.flush()
        run = told(engine.ask(case["ids"], 4, fusion=case["policies"][1]))
        assert runtime.fetcher.drain(60)
        counts = runtime.metrics.to_json()
        return run | {
            "loaded": counts.get("disk.loaded", 0),
            "fetched": counts.get("disk.fetched", 0),
        }

    engine.fresh()
    persistence.start_tiers(runtime, "no-model")
    for chunk in case["chunks"]:
        engine.build(case["prefix"], chunk)
    runs = [ask()]
    persistence.close(runtime)
    engine.fresh()
    persistence.start_tiers(runtime, "no-model")
    runs.append(ask())
    engine.fresh()
    runs.append(ask())
    persistence.close(runtime)
    return runs


main()

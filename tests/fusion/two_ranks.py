"""One of two tensor-parallel ranks: drives its scheduler by the same script as the other, writes what it saw.

Usage: two_ranks.py RANK PORT MODEL_FOLDER CASE.json OUT.json
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path


def main() -> None:
    rank, port, folder, case_file, out_file = sys.argv[1:6]
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "0|1"
    spec = importlib.util.spec_from_file_location("local", Path(__file__).with_name("conftest.py"))
    local = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local)
    case = json.loads(Path(case_file).read_text())
    engine = local.LocalEngine(folder, tp_size=2, nccl_port=int(port), world_rank=int(rank))
    seen = {"on": engine.runtime.is_on, "self_check": engine.runtime.self_check, "runs": []}

    def note(req):
        info = (req.customized_info or {}).get("rag_fusion", [None])[0]
        seen["runs"].append(
            {
                "ids": list(req.output_ids),
                "logprobs": list(req.logprob.output_token_logprobs_val),
                "report": info,
            }
        )

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
    # One rank loses a chunk: both must treat it as missing, or their shapes differ and they hang.
    if rank == "1":
        assert store.evict(lost)
    engine.flush()
    note(engine.ask(case["ids"], 4, fusion=case["policies"][1]))
    Path(out_file).write_text(json.dumps(seen))


main()

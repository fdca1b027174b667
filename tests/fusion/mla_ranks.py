"""One of two tensor-parallel ranks with multi-head latent attention: answers the case's prompts, writes what it said.

Usage: mla_ranks.py RANK CASE.json OUT.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def answers(engine: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Answers alone, behind a prefix hit, in a batch of three, and in pieces beside decoding."""
    from fusion_helpers import chunk_limit

    asked = {"alone": (case["long"], engine.ask(case["long"], 6))}
    asked["hit"] = (case["along"], engine.ask(case["along"], 6))
    batch = [engine.submit(ids, 6) for ids in case["batch"]]
    engine.run(*batch)
    asked |= {f"batch {at}": pair for at, pair in enumerate(zip(case["batch"], batch, strict=True))}
    engine.flush()
    with chunk_limit(engine, 32):
        first = engine.submit(case["batch"][1], 12)
        engine.step()
        later = engine.submit(case["long"], 4)
        engine.run(first, later)
    asked |= {"beside": (case["batch"][1], first), "pieces": (case["long"], later)}
    return {
        name: {
            "prompt": list(ids),
            "ids": list(req.output_ids),
            "cached": req.cached_tokens,
            "top": [req.logprob.output_top_logprobs_val, req.logprob.output_top_logprobs_idx],
        }
        for name, (ids, req) in asked.items()
    }


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from fused_runs import fused
    from rank_programs import RankProgram

    program = RankProgram()
    seen: dict[str, Any] = {}
    for name, folder in program.case["models"].items():
        engine = program.engine(folder)
        pool = engine.scheduler.tp_worker.model_runner.token_to_kv_pool
        layer = engine.scheduler.tp_worker.model_runner.model.model.layers[-1].self_attn
        seen[name] = {
            "pool": [type(pool).__name__, sorted({tuple(b.shape[1:]) for b in pool.kv_buffer})],
            "heads": layer.num_local_heads,
            "answers": answers(engine, program.case),
            "fused": fused(engine, program.case),
        }
        engine.close()
    program.write(seen)


main()

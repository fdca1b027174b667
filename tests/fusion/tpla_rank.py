"""One of the ranks over which latents are sliced: drives its scheduler by a script, and writes what it saw.

Usage: tpla_rank.py RANK CASE.json OUT.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def faults(engine: Any, case: dict[str, Any], rank: int) -> list[tuple[str, list[float]]]:
    """Answers of a fused prompt while rank 1 fails in a layer: before it has exchanged its slices there, and behind that."""
    from fusion_helpers import logprobs, report

    from rag_pipeline.sglang_plugin.fusion.forward.layer_pass import FusedPass

    told = []
    for name, layer in (("_run_layer", 2), ("_mask", 3)):
        original = getattr(FusedPass, name)

        def fails(
            fused: Any, at: Any, *args: Any, original: Any = original, layer: int = layer
        ) -> Any:
            if rank == 1 and layer == getattr(at, "layer_id", at):
                raise RuntimeError("injected")
            return original(fused, at, *args)

        setattr(FusedPass, name, fails)
        engine.flush()
        req = engine.ask(case["ids"], 4, fusion={"spans": case["spans"], "policy": "reuse"})
        setattr(FusedPass, name, original)
        told.append((report(req)["fallback"], logprobs(req)))
    return told


def turn_round_basis() -> None:
    """Let this process find eigenvectors of other signs, as another number of threads may do."""
    from rag_kernels import latent

    original = latent.create_basis

    def create_basis(*args: Any, **options: Any) -> Any:
        basis = original(*args, **options)
        basis[:, ::3] *= -1
        return basis

    latent.create_basis = create_basis


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from fused_runs import fused
    from fusion_helpers import chunk_limit
    from rank_programs import RankProgram

    program = RankProgram()
    case, rank = program.case, program.rank
    if rank:  # the ranks hold slices of one basis all the same
        turn_round_basis()
    engine = program.engine(case["model"])
    runner = engine.scheduler.tp_worker.model_runner

    def told(req: Any) -> dict[str, Any]:
        return {
            "ids": list(req.output_ids),
            "cached": req.cached_tokens,
            "values": req.logprob.output_top_logprobs_val,
            "tokens": req.logprob.output_top_logprobs_idx,
        }

    seen: dict[str, Any] = {
        "shapes": [list(buffer.shape[1:]) for buffer in runner.token_to_kv_pool.kv_buffer],
        "bytes": [
            buffer[0].numel() * buffer.element_size()
            for buffer in runner.token_to_kv_pool.kv_buffer
        ],
        "self_check": engine.runtime.self_check,
        "fused": fused(engine, case),
        "faults": faults(engine, case, rank),
        "runs": [told(engine.ask(ids, 6)) for ids in case["prompts"]],
    }
    reqs = [engine.submit(ids, 6) for ids in case["batch"]]
    engine.run(*reqs)
    seen["runs"] += [told(req) for req in reqs]
    engine.flush()
    with chunk_limit(engine, 32):
        seen["runs"].append(told(engine.ask(case["prompts"][0], 6)))
    seen["update"] = runner.weight_updater.update_weights_from_disk(case["model"], "auto")
    program.write(seen)


main()

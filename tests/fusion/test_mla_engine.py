"""Multi-head latent attention on a CPU: DeepSeek-V2 of random weights in the real engine, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fused_runs import check_fused, fused_case
from fusion_helpers import chunk_limit
from latent_answers import ALONG, BATCH, LONG, YARN, agrees, answers_agree, reference, said_as
from rank_programs import run_ranks

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "q_lora": {"q_lora_rank": 24},
    "yarn": {"rope_parameters": YARN},
    "dense": {"first_k_dense_replace": 5},
}
RANKED: dict[str, dict[str, Any]] = {
    "dense": VARIANTS["dense"],
    "experts": {"q_lora_rank": 24, "rope_parameters": YARN},
}


@pytest.fixture(params=VARIANTS)
def served(request: pytest.FixtureRequest, engine: Any, tiny_model: Any) -> tuple[Any, Any]:
    """An engine, and the same model by transformers."""
    name = f"deepseek-{request.param}"
    folder = tiny_model("deepseek_v2", name, **VARIANTS[request.param])
    return engine(name), reference(folder)


def test_prefill_prefix_hits_batches_and_decoding_are_those_of_transformers(
    served: tuple[Any, Any],
) -> None:
    answers_agree(*served)


def test_a_prompt_in_pieces_beside_decoding_is_the_same(served: tuple[Any, Any]) -> None:
    local, model = served
    with chunk_limit(local, 32):
        first = local.submit(BATCH[1], 12)
        local.step()
        later = local.submit(LONG, 4)
        local.run(first, later)
    agrees(model, BATCH[1], first)
    agrees(model, LONG, later)


def test_the_pool_holds_one_latent_and_one_position_part_per_token(served: tuple[Any, Any]) -> None:
    pool = served[0].scheduler.tp_worker.model_runner.token_to_kv_pool
    assert type(pool).__name__ == "MLATokenToKVPool"
    assert {tuple(buffer.shape[1:]) for buffer in pool.kv_buffer} == {(1, 32 + 8)}


def test_two_ranks_hold_half_the_heads_and_all_latents_and_say_what_transformers_says(
    tiny_model: Any, tmp_path: Path, warm_start: Any
) -> None:
    folders = {
        name: tiny_model("deepseek_v2", f"deepseek-{name}", **fields)
        for name, fields in RANKED.items()
    }
    case = {"models": {name: str(folder) for name, folder in folders.items()}}
    case |= {"long": LONG, "along": ALONG, "batch": BATCH, **fused_case()}
    one, two = run_ranks("mla_ranks.py", case, tmp_path, warm_start, engines=len(folders))
    assert one == two
    for name, folder in folders.items():
        seen, model = one[name], reference(folder)
        assert seen["pool"] == ["MLATokenToKVPool", [[1, 32 + 8]]]
        assert seen["heads"] == 4 // 2
        check_fused(seen["fused"])
        assert seen["answers"]["hit"]["cached"] == 100
        assert len(seen["answers"]) == 7
        for answer in seen["answers"].values():
            said_as(model, answer["prompt"], answer["ids"], answer["top"])

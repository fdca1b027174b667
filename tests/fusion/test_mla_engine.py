"""Multi-head latent attention on a CPU: DeepSeek-V2 of random weights in the real engine, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_runs import check_fused, fused_case
from fusion_helpers import chunk_limit, tokens
from rank_programs import run_ranks

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "rope_theta": 10000.0,
}
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
LONG = tokens(150, 60)
ALONG = [*LONG[:100], *tokens(23, 61)]
BATCH = [tokens(37, 62), tokens(60, 63), tokens(21, 64)]


@pytest.fixture(params=VARIANTS)
def served(request: pytest.FixtureRequest, engine: Any, tiny_model: Any) -> tuple[Any, Any]:
    """An engine, and the same model by transformers."""
    name = f"deepseek-{request.param}"
    folder = tiny_model("deepseek_v2", name, **VARIANTS[request.param])
    return engine(name), reference(folder)


def reference(folder: Path) -> Any:
    """The model by transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def agrees(model: Any, prompt: list[int], req: Any) -> None:
    """Log-probabilities of prompt's end and of every decoded token are the reference's."""
    likeliest = req.logprob.output_top_logprobs_val, req.logprob.output_top_logprobs_idx
    said_as(model, prompt, list(req.output_ids), likeliest)


def said_as(model: Any, prompt: list[int], said: list[int], likeliest: Any) -> None:
    """The reference says the same tokens, with the same log-probabilities of the likeliest."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *said[:-1]]])).logits[0, len(prompt) - 1 :]
    wanted = logits.double().log_softmax(-1)
    for row, values, ids in zip(wanted, *likeliest, strict=True):
        torch.testing.assert_close(
            torch.tensor(values).double(), row[torch.tensor(ids)], rtol=0, atol=1e-4
        )
    assert said == wanted.argmax(-1).tolist()


def test_prefill_prefix_hits_batches_and_decoding_are_those_of_transformers(
    served: tuple[Any, Any],
) -> None:
    local, model = served
    agrees(model, LONG, local.ask(LONG, 6))
    hit = local.ask(ALONG, 6)
    assert hit.cached_tokens == 100
    agrees(model, ALONG, hit)
    reqs = [local.submit(ids, 6) for ids in BATCH]
    local.run(*reqs)
    for ids, req in zip(BATCH, reqs, strict=True):
        agrees(model, ids, req)


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

"""What engines with latent attention (MLA) are asked, and transformers' word on what they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fusion_helpers import tokens

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
LONG = tokens(150, 60)
ALONG = [*LONG[:100], *tokens(23, 61)]
BATCH = [tokens(37, 62), tokens(60, 63), tokens(21, 64)]


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


def answers_agree(local: Any, model: Any) -> None:
    """An engine says what the reference says: alone, behind a prefix hit, in a batch, and decoding."""
    agrees(model, LONG, local.ask(LONG, 6))
    hit = local.ask(ALONG, 6)
    assert hit.cached_tokens == 100
    agrees(model, ALONG, hit)
    reqs = [local.submit(ids, 6) for ids in BATCH]
    local.run(*reqs)
    for ids, req in zip(BATCH, reqs, strict=True):
        agrees(model, ids, req)

"""A real LoRA adapter beside fused requests: each answers as it does alone."""

from __future__ import annotations

import json

import pytest
import torch
from fusion_helpers import logprobs, report, tokens
from safetensors.torch import save_file

RANK, HIDDEN, LAYERS = 4, 64, 5
OUTPUTS = {"q_proj": 64, "v_proj": 32}


PREFIX, CHUNKS, QUESTION = tokens(20, 1), [tokens(40, 10 + i) for i in range(2)], tokens(9, 2)
PROMPT = [*PREFIX, *CHUNKS[1], *CHUNKS[0], *QUESTION]
SPANS = [20, 60, 60, 100]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder in PEFT's format, with weights large enough to change the answer."""
    folder = tmp_path_factory.mktemp("adapter")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(OUTPUTS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for layer in range(LAYERS):
        for name, size in OUTPUTS.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator) * 0.3
            weights[f"{at}.lora_B.weight"] = torch.randn(size, RANK, generator=generator) * 0.3
    save_file(weights, folder / "adapter_model.safetensors")
    from sglang.srt.lora.lora_registry import LoRARef

    return LoRARef(lora_name="adapter", lora_path=str(folder), pinned=False)


@pytest.fixture
def local(engine, adapter, monkeypatch):
    if not torch.cuda.is_available():
        # SGLang's adapters ask for page-locked memory whatever the device is; without a driver there is none.
        for name in ("tensor", "zeros", "empty"):
            monkeypatch.setattr(torch, name, without_pinning(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return engine(
        "llama",
        enable_lora=True,
        lora_paths=[adapter],
        lora_backend="torch_native",
        max_loras_per_batch=2,
        max_lora_rank=RANK,
        lora_target_modules=list(OUTPUTS),
    )


def without_pinning(make):
    def made(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return made


def test_an_adapter_beside_a_fused_request(local, adapter):
    for chunk in CHUNKS:
        local.build(PREFIX, chunk)
    local.flush()
    plain = local.ask(PROMPT, 4, fusion={"mode": "off"})
    local.flush()
    adapted = local.ask(PROMPT, 4, lora_id=adapter.lora_id)
    assert logprobs(adapted) != pytest.approx(logprobs(plain), abs=1e-2)
    fuse = {"spans": SPANS, "policy": "full"}
    local.flush()
    fused = local.ask(PROMPT, 4, fusion=fuse)
    assert report(fused)["recomputed_tokens"] > 0
    assert logprobs(fused) == pytest.approx(logprobs(plain), abs=1e-4)

    # Asked for itself, the adapter's request is ordinary: the chunks were computed without it.
    local.flush()
    alone = local.ask(
        PROMPT, 4, fusion={"spans": SPANS, "policy": "reuse"}, lora_id=adapter.lora_id
    )
    assert (report(alone)["fallback"], report(alone)["reused_tokens"]) == ("lora", 0)
    assert logprobs(alone) == pytest.approx(logprobs(adapted), abs=1e-4)

    # In one batch with a fused one both are ordinary, and both right.
    for first in (True, False):
        local.flush()
        one = local.submit(PROMPT, 4, fusion=fuse)
        two = local.submit(PROMPT, 4, lora_id=adapter.lora_id)
        if first:
            local.scheduler.waiting_queue.reverse()
        assert local.step().batch_size() == 2
        local.run(one, two)
        assert report(one)["fallback"] == "beside_lora"
        assert logprobs(one) == pytest.approx(logprobs(plain), abs=1e-4)
        assert logprobs(two) == pytest.approx(logprobs(adapted), abs=1e-4)


def test_nothing_is_stored_of_what_an_adapter_computed(local, adapter):
    build = {"mode": "build", "spans": [20, 60]}
    req = local.ask([*PREFIX, *CHUNKS[0]], 1, fusion=build, lora_id=adapter.lora_id)
    assert report(req)["built_chunks"] == 0
    assert local.runtime.store.stats().chunks_now == 0

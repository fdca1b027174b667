"""Tiny models of random weights behind a real tokenizer: engines that start and answer at once.

``python -m rag_eval.benchmarks.tiny_model --family mixtral --out FOLDER`` writes one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag_eval.arguments import OneLineParser
from rag_eval.command import refusals_in_one_line
from rag_eval.errors import EvalError

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "mixtral",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "deepseek_v2",
)
"""What a tiny model can be; of Gemma 3 the text model."""

WINDOW = 24
"""Tokens that a sliding-window layer of a tiny model sees: fewer than stand in a chunk."""

_TANH = "gelu_pytorch_tanh"
_OWN_HEAD = ("mixtral", "qwen3_moe")
"""Families that SGLang loads with output weights of their own, whatever the configuration says."""


def tiny_config(family: str, **given: Any) -> Any:
    """Configuration of a tiny model of a family.

    Parameters
    ----------
    family : str
        One of :data:`FAMILIES`.
    **given
        Fields of the configuration in the place of the tiny model's own; ``vocab_size`` among them.

    Raises
    ------
    EvalError
        No such family.
    """
    import transformers

    common: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": family.startswith("gemma"),
    } | given
    gemma = {"head_dim": 16, "query_pre_attn_scalar": 16, "hidden_activation": _TANH}
    match family:
        case "llama":
            return transformers.LlamaConfig(**common)
        case "qwen2":
            return transformers.Qwen2Config(use_sliding_window=False, **common)
        case "qwen3":
            return transformers.Qwen3Config(use_sliding_window=False, head_dim=16, **common)
        case "mistral":
            return transformers.MistralConfig(sliding_window=None, head_dim=16, **common)
        case "mixtral":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            return transformers.MixtralConfig(sliding_window=None, **experts, **common)
        case "qwen3_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
            return transformers.Qwen3MoeConfig(
                head_dim=16, norm_topk_prob=True, **experts, **common
            )
        case "deepseek_v2":
            latent = {"kv_lora_rank": 32, "q_lora_rank": None, "v_head_dim": 16}
            heads = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "num_key_value_heads": 4}
            # The first layer is dense, the others choose two of four experts.
            experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
            groups = {
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "moe_layer_freq": 1,
            }
            sizes: dict[str, Any] = {"moe_intermediate_size": 64, "routed_scaling_factor": 1.0}
            # SGLang reads what published checkpoints have and transformers has no field for.
            sizes |= {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
            return transformers.DeepseekV2Config(
                **(latent | heads | experts | groups | sizes | common | heads | given)
            )
        case "gemma2":
            caps = {"attn_logit_softcapping": 5.0, "hidden_act": _TANH, "sliding_window": WINDOW}
            return transformers.Gemma2Config(**caps, **gemma, **common)
        case "gemma3":
            # A window in every layer but each second one.
            kinds = ("sliding_attention", "full_attention")
            layers = [kinds[at % 2] for at in range(common["num_hidden_layers"])]
            return transformers.Gemma3TextConfig(
                sliding_window=WINDOW, layer_types=layers, **gemma, **common
            )
    raise EvalError(f"family {family!r} is unknown; allowed: {', '.join(FAMILIES)}")


def write_tiny_model(
    folder: Path,
    like: Path,
    *,
    family: str = "llama",
    layers: int = 4,
    context: int = 4096,
    tied: bool = True,
    peaked: bool = False,
) -> Path:
    """Write a model of random fp32 weights, always the same ones.

    Parameters
    ----------
    folder : Path
        Where to; made if it is not there.
    like : Path
        Folder of the model whose vocabulary, tokenizer and chat template it gets.
    family : str
        One of :data:`FAMILIES`.
    layers, context : int
        Layers, and the longest prompt in tokens.
    tied : bool
        Whether embedding and output share their weights; in Mixtral and Qwen3-MoE they never do.
    peaked : bool
        See :func:`peak_attention`.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    EvalError
        No such family.
    """
    import torch
    from transformers import AutoModelForCausalLM

    known = json.loads((like / "config.json").read_text("utf-8"))
    config = tiny_config(
        family,
        vocab_size=known["vocab_size"],
        num_hidden_layers=layers,
        max_position_embeddings=context,
        tie_word_embeddings=tied and family not in _OWN_HEAD,
        bos_token_id=known.get("bos_token_id"),
        eos_token_id=known.get("eos_token_id"),
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    if peaked:
        peak_attention(model)
    model.to(torch.float32).save_pretrained(folder)
    for file in like.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder / file.name)
    return folder


def peak_attention(model: Any) -> None:
    """Draw a model's matrices anew, large enough for attention to matter: a wrong key changes the answer."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:  # experts are stacked
                scale = 3.0 if "q_proj" in name or "k_proj" in name else 1.5
                parameter.normal_(0.0, scale / parameter.shape[1] ** 0.5)


@refusals_in_one_line
def main(words: Sequence[str] | None = None) -> int:
    """Write a model of peaked random weights.

    Parameters
    ----------
    words : sequence of str, optional
        Command line without the program; that of the process by default.
    """
    parser = OneLineParser(prog="python -m rag_eval.benchmarks.tiny_model", description=__doc__)
    add = parser.add_argument
    add("--family", choices=FAMILIES, default="llama", help="what the model is")
    add("--out", type=Path, required=True, help="folder of the model")
    add("--like", default="smollm2-135m", help="model that lends its tokenizer and chat template")
    add("--context", type=int, default=8192, help="longest prompt in tokens")
    given = parser.parse_args(words)
    from rag_pipeline import resolve_llm

    like = resolve_llm(given.like).path
    print(
        write_tiny_model(given.out, like, family=given.family, context=given.context, peaked=True)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

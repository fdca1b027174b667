"""The cap on a model's output logits in torch operations, where SGLang knows a Triton kernel only."""

from __future__ import annotations

import torch


def softcap_logits(
    full_logits: torch.Tensor,
    final_logit_softcapping: float | None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cap logits in place, or into `output`, as SGLang's Triton kernel does; a cap of None only copies."""
    capped = full_logits if output is None else output.copy_(full_logits)
    if final_logit_softcapping is not None:
        capped.div_(final_logit_softcapping).tanh_().mul_(final_logit_softcapping)
    return capped

"""Attention kernels at a model's shape: chosen rows and block masks against dense causal attention in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rag_eval.gpu_check.timing import time_calls
from rag_kernels import (
    ATTENTION_KERNELS,
    AttentionCall,
    BlockMask,
    RequestBlocks,
    choose_kernel,
    plan_position_causal,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Heads of one attention layer; those of Llama-3.1-8B."""

    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128


SHARES = (0.05, 0.15, 0.3, 1.0)
DENSITIES = (0.1, 0.25, 0.5)


def time_attention(
    shape: Shape, lengths: tuple[int, ...], device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    """Time dense prefill, and each kernel with chosen rows and with blocks; ``vs_dense`` is against the best dense."""
    for length in lengths:
        pools = _Pools(shape, length, device)
        dense = {name: time_calls(call, device, repeats) for name, call in pools.dense().items()}
        best = min(entry["ms"] for entry in dense.values())
        for name, entry in dense.items():
            yield {
                "tokens": length,
                "what": f"dense {name}",
                "vs_dense": entry["ms"] / best,
            } | entry
        if pools.without_flashinfer:
            yield {
                "tokens": length,
                "what": "dense flashinfer",
                "refused": pools.without_flashinfer,
            }
        for kernel in ATTENTION_KERNELS.names():
            if kernel == "reference" or ATTENTION_KERNELS.get(kernel)().refuse_device(device):
                continue
            for share in SHARES:
                yield pools.entry(f"{kernel} rows {share:.0%}", kernel, share, None, best, repeats)
            for density in DENSITIES:
                yield pools.entry(
                    f"{kernel} blocks {density:.0%}", kernel, 1.0, density, best, repeats
                )


class _Pools:
    """Random queries, keys and values of one prompt, slots shuffled as an engine's are after a while."""

    def __init__(self, shape: Shape, length: int, device: torch.device) -> None:
        self.shape, self.length, self.device = shape, length, device
        self.without_flashinfer = ""
        """Why FlashInfer's dense prefill is not among those that were timed; empty where it is."""
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.generator = torch.Generator().manual_seed(length)
        self.slots = torch.randperm(length, generator=self.generator).to(device)
        self.q = torch.randn(length, shape.q_heads, shape.dim, device=device, dtype=self.dtype)
        self.k, self.v = torch.randn(
            2, length, shape.kv_heads, shape.dim, device=device, dtype=self.dtype
        )

    def dense(self) -> dict[str, Callable[[], object]]:
        """Dense causal prefill by those who do it best: torch's flash kernel, FlashInfer's where it is there."""
        q, k, v = (part.transpose(0, 1)[None].contiguous() for part in (self.q, self.k, self.v))

        def torch_flash() -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        found: dict[str, Callable[[], object]] = {"torch": torch_flash}
        try:
            found["flashinfer"] = self._flashinfer()
        except Exception as error:
            self.without_flashinfer = repr(error)[:300]
        return found

    def _flashinfer(self) -> Callable[[], object]:
        import flashinfer

        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(128 << 20, dtype=torch.uint8, device=self.device), "NHD", backend="auto"
        )
        ends = torch.tensor([0, self.length], dtype=torch.int32)
        wrapper.plan(
            ends,
            ends,
            self.slots.to(torch.int32),
            torch.ones(1, dtype=torch.int32),
            self.shape.q_heads,
            self.shape.kv_heads,
            self.shape.dim,
            1,
            causal=True,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )
        pools = (self.k.unsqueeze(1), self.v.unsqueeze(1))
        wrapper.run(self.q, pools)
        return lambda: wrapper.run(self.q, pools)

    def entry(
        self,
        what: str,
        kernel: str,
        share: float,
        density: float | None,
        best: float,
        repeats: int,
    ) -> dict[str, Any]:
        """Time one kernel."""
        told: dict[str, Any] = {"tokens": self.length, "what": what}
        count = max(1, round(share * self.length))
        rows = torch.randperm(self.length, generator=self.generator)[:count].sort().values
        plan = plan_position_causal(
            [rows],
            [self.slots],
            num_q_heads=self.shape.q_heads,
            num_kv_heads=self.shape.kv_heads,
            head_dim=self.shape.dim,
            device=self.device,
            kernel=kernel,
        )
        call = AttentionCall(
            q_RNH=self.q[rows.to(self.device)],
            k_pool=self.k,
            v_pool=self.v,
            plan=plan,
            scale=self.shape.dim**-0.5,
            mask=None if density is None else self._mask(density),
        )
        chosen = choose_kernel(kernel, self.device)
        refusal = chosen.refuse(call)
        if refusal is not None:
            return told | {"refused": refusal}
        try:
            taken = time_calls(lambda: chosen.attend(call), self.device, repeats)
        except Exception as error:
            return told | {"failed": repr(error)[:300]}
        return told | {"vs_dense": taken["ms"] / best} | taken

    def _mask(self, density: float) -> BlockMask:
        query_block, key_block = 64, 64
        sides = (-(-self.length // query_block), -(-self.length // key_block))
        allowed = torch.rand(self.shape.q_heads, *sides, device=self.device) < density
        return BlockMask(
            requests=(RequestBlocks(allowed=allowed, query_block=query_block, key_block=key_block),)
        )

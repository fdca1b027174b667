"""CPU attention backends side by side: ``python -m rag_eval.benchmarks.attention [--json]``.

This project's ``rag_cpu`` against SGLang's ``torch_native``, one attention layer of a model's shape,
both through their real ``init_forward_metadata`` and ``forward_*`` on the same pool. The two take
turns within every repeat, so a neighbour's load falls on both. Planning, which an engine does once
for all layers, is charged to each call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import (
    benchmark_parser,
    run_benchmark,
    time_in_turns,
    versions_of,
)
from rag_eval.command import Progress

__all__ = ["Case", "default_cases", "main", "run"]

BACKENDS = ("rag_cpu", "rag_cpu fast", "torch_native")
"""``fast`` is ``RAG_PIPELINE_CPU_DECODE=fast``; it differs from the default in decode only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One batch: ``new`` tokens behind ``cached`` ones for each of ``batch`` requests."""

    name: str
    new: int
    cached: int
    batch: int = 1
    decode: bool = False


def default_cases() -> list[Case]:
    """Prefill, short extends and decoding, at the lengths that the table has rows for."""
    return [
        Case(name="extend 64 behind 2,400", new=64, cached=2400),
        Case(name="extend 512 behind 2,400", new=512, cached=2400),
        Case(name="cold prefill 2,400", new=2400, cached=0),
        Case(name="decode behind 2,400, batch 1", new=1, cached=2400, decode=True),
        Case(name="decode behind 2,400, batch 8", new=1, cached=2400, batch=8, decode=True),
        Case(name="decode behind 200, batch 8", new=1, cached=200, batch=8, decode=True),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Heads of one attention layer; the default is SmolLM2-135M."""

    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64


class _Pool:
    """The part of SGLang's KV pool that an attention backend touches, for one layer."""

    def __init__(self, slots: int, shape: Shape) -> None:
        size = (slots, shape.kv_heads, shape.head_dim)
        generator = torch.Generator().manual_seed(0)
        self.k = torch.randn(size, generator=generator).bfloat16()
        self.v = torch.randn(size, generator=generator).bfloat16()

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.k

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.v


def _backend(name: str, pool: _Pool, req_to_token: torch.Tensor) -> Any:
    """A backend without an engine around it: its constructor would ask for a whole model."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from rag_pipeline.sglang_plugin.cpu.attention_backend import RagCpuAttentionBackend
    from rag_pipeline.sglang_plugin.cpu.slot_plan import PADDING_ALLOWED

    kind: Any = TorchNativeAttnBackend if name == "torch_native" else RagCpuAttentionBackend
    backend: Any = object.__new__(kind)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=req_to_token)
    backend.token_to_kv_pool = pool
    backend._fast_decode = name == "rag_cpu fast"
    backend._padding = PADDING_ALLOWED if backend._fast_decode else 1.0
    backend._window_pool = backend.use_sliding_window_kv_pool = False
    return backend


def _batch(case: Case, shape: Shape) -> tuple[Any, Any, torch.Tensor, _Pool, torch.Tensor]:
    from sglang.srt.layers.radix_attention import AttentionType
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    total = case.new + case.cached
    pool = _Pool(total * case.batch + 64, shape)
    # Requests stand in blocks of the pool with the newest tokens elsewhere, as after a warm prefix.
    req_to_token = torch.arange(total * case.batch, dtype=torch.int32).view(case.batch, total)
    if case.cached:
        req_to_token = req_to_token.clone()
        req_to_token[:, case.cached :] += 17 + case.batch
    tokens = case.new * case.batch
    q = torch.randn(tokens, shape.heads * shape.head_dim).bfloat16()
    layer = SimpleNamespace(
        layer_id=0,
        tp_q_head_num=shape.heads,
        tp_k_head_num=shape.kv_heads,
        qk_head_dim=shape.head_dim,
        v_head_dim=shape.head_dim,
        head_dim=shape.head_dim,
        scaling=shape.head_dim**-0.5,
        sliding_window_size=-1,
        logit_cap=0.0,
        is_cross_attention=False,
        attn_type=AttentionType.DECODER,
    )
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE if case.decode else ForwardMode.EXTEND,
        req_pool_indices=torch.arange(case.batch),
        seq_lens=torch.full((case.batch,), total),
        extend_prefix_lens=torch.full((case.batch,), case.cached),
        extend_seq_lens=torch.full((case.batch,), case.new),
        encoder_lens=None,
        out_cache_loc=None,
    )
    return batch, layer, q, pool, req_to_token.remainder(pool.k.shape[0])


def run(cases: list[Case], *, shape: Shape | None = None, repeats: int = 9) -> dict[str, Any]:
    """Measure.

    Parameters
    ----------
    cases : list of Case
        What to run.
    shape : Shape, optional
        Heads; SmolLM2-135M when not given.
    repeats : int
        Timed calls of each backend in each case, after one that is not timed.

    Returns
    -------
    dict
        ``cases`` (a list of rows: medians in ms of wall and process CPU time, ``speedup`` in wall
        time, ``max_abs_diff`` between the two outputs), ``repeats``, ``threads``, ``versions``.
    """
    shape = shape or Shape()
    rows = []
    for case in cases:
        batch, layer, q, pool, req_to_token = _batch(case, shape)
        backends = {name: _backend(name, pool, req_to_token) for name in BACKENDS}

        def call(
            name: str,
            backends: dict[str, Any] = backends,
            arguments: tuple[Any, Any, Any] = (batch, layer, q),
            decode: bool = case.decode,
        ) -> torch.Tensor:
            forward_batch, layer_, query = arguments
            backend = backends[name]
            backend.init_forward_metadata(forward_batch)
            forward = backend.forward_decode if decode else backend.forward_extend
            out: torch.Tensor = forward(query, None, None, layer_, forward_batch, False)
            return out

        with torch.inference_mode():
            outputs = {name: call(name).float() for name in BACKENDS}
            calls = {name: functools.partial(call, name) for name in BACKENDS}
            timers = time_in_turns(calls, repeats)
        median = {name: timer.report()["wall_ms_p50"] for name, timer in timers.items()}
        rows.append(
            {
                **asdict(case),
                "wall_ms_p50": median,
                "cpu_ms_p50": {
                    name: timer.report()["cpu_ms_p50"] for name, timer in timers.items()
                },
                "speedup": median["torch_native"] / median["rag_cpu"],
                "max_abs_diff": float((outputs["rag_cpu"] - outputs["torch_native"]).abs().max()),
            }
        )
    return {
        "cases": rows,
        "shape": asdict(shape),
        "dtype": "bfloat16",
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "versions": versions_of("rag-pipeline", "sglang", "torch"),
    }


def table(result: dict[str, Any]) -> str:
    """The report as text, one line per case."""
    heads = f"{'ours':>10}{'fast':>9}{'stock':>9}" * 2
    lines = [
        f"{'':31}{'wall ms':>28}{'process CPU ms':>28}",
        f"{'':31}{heads}{'speed-up':>10}{'diff':>9}",
    ]
    for row in result["cases"]:
        times = "".join(
            f"{ms['rag_cpu']:10.2f}{ms['rag_cpu fast']:9.2f}{ms['torch_native']:9.2f}"
            for ms in (row["wall_ms_p50"], row["cpu_ms_p50"])
        )
        lines.append(f"{row['name']:31}{times}{row['speedup']:9.1f}x{row['max_abs_diff']:9.1e}")
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    lines.append(f"medians of {result['repeats']}, {result['threads']} thread(s), {versions}")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBenchConfig:
    """How often, and on how many cores."""

    repeats: int = 9
    """Timed calls of each backend in each case."""
    threads: int | None = None
    """Torch threads; torch's own choice when not given."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "repeats")
        if self.threads is not None:
            require_at_least(self, 1, "threads")


def _run_defaults(config: AttentionBenchConfig, progress: Progress) -> dict[str, Any]:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return run(default_cases(), repeats=config.repeats)


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.attention", __doc__)
    return run_benchmark(parser, AttentionBenchConfig, _run_defaults, table, words)


if __name__ == "__main__":
    sys.exit(main())

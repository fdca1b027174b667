"""Benchmark of the kernels on this machine's CPU: one layer's work, without any engine.

``python -m rag_eval.benchmarks.kernels --json``

The defaults are SmolLM2-135M's heads and a prompt of 40 system, 2,400 chunk and 20 question tokens. Timed,
wall clock and process CPU time, in turn so that a busy machine hits all alike, medians reported:

``attention full``, ``attention rows``, ``attention question``
    :func:`rag_kernels.position_causal_attention` for all rows; for the recomputed share and the question;
    for the question alone.
``torch causal full``, ``torch masked rows``, ``torch masked rows in 4``
    torch's fused attention on gathered K and V: causal for all rows; with a bool mask for the same share, in one
    call and in four position-sorted calls with keys cut off.
``load``, ``load unmoved``, ``shift``, ``mass``, ``deviation``, ``plan attention``, ``plan shift``
    Six chunks loaded with and without rotation, mean shift of all rows that stay, attention mass of the
    question, K and V deviation of all reused rows, and the host work done once per forward pass.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import (
    benchmark_parser,
    run_benchmark,
    time_in_turns,
    versions_of,
)
from rag_eval.command import Progress
from rag_eval.errors import EvalError
from rag_kernels import (
    RotarySpec,
    gather_kv,
    kv_deviation,
    load_spans_inplace,
    mean_shift_inplace,
    plan_mean_shift,
    plan_position_causal,
    plan_span_load,
    position_causal_attention,
    query_attention_mass,
)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KernelBenchConfig:
    """Sizes of a run."""

    system_tokens: int = 40
    """Exact prefix."""
    chunks: int = 6
    """Reused chunks."""
    chunk_tokens: int = 400
    """Tokens a chunk."""
    question_tokens: int = 20
    """Fresh tokens at the end."""
    recomputed: int = 344
    """Reused tokens computed anew: what a 15% budget leaves the query policy."""
    q_heads: int = 9
    """Query heads."""
    kv_heads: int = 3
    """Key/value heads."""
    head_dim: int = 64
    """Head size."""
    repeats: int = 7
    """Timed calls of every kind."""
    threads: int = 1
    """Torch threads; on a shared machine one thread gives the steadiest ratios."""
    seed: int = 0
    """Of the numbers and of the recomputed positions."""
    dtype: str = "bf16"
    """bf16, fp16 or fp32."""

    def __post_init__(self) -> None:
        sizes = ("chunks", "chunk_tokens", "question_tokens", "recomputed", "repeats", "threads")
        require_at_least(self, 1, *sizes, "q_heads", "kv_heads", "head_dim")
        require_at_least(self, 0, "seed", "system_tokens")
        if self.dtype not in _DTYPES:
            raise EvalError(f"--dtype is {self.dtype!r}; choose one of {', '.join(_DTYPES)}.")
        if self.q_heads % self.kv_heads:
            raise EvalError(
                f"--q-heads {self.q_heads} must be a multiple of --kv-heads {self.kv_heads}."
            )
        if self.recomputed > self.chunks * self.chunk_tokens:
            raise EvalError(f"--recomputed {self.recomputed} exceeds the reused tokens; lower it.")

    @property
    def prompt_tokens(self) -> int:
        """System part, all chunks and question together."""
        return self.system_tokens + self.chunks * self.chunk_tokens + self.question_tokens


def run(config: KernelBenchConfig, progress: Progress) -> dict[str, Any]:
    """Time every operation; see the module."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        timers = time_in_turns(_operations(config), config.repeats, progress)
    finally:
        torch.set_num_threads(threads_before)
    timings = {
        name: timer.report("wall_ms_p50", "cpu_ms_p50", "cpu_ms_min", "n")
        for name, timer in timers.items()
    }
    full, rows = timings["attention full"], timings["attention rows"]
    return {
        "config": dataclasses.asdict(config),
        "prompt_tokens": config.prompt_tokens,
        "timings": timings,
        "rows_over_full_cpu": rows["cpu_ms_p50"] / full["cpu_ms_p50"],
        "rows_share": (config.recomputed + config.question_tokens) / config.prompt_tokens,
        "versions": versions_of("python", "torch"),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _operations(config: KernelBenchConfig) -> dict[str, Callable[[], object]]:
    random = torch.Generator().manual_seed(config.seed)
    dtype, total = _DTYPES[config.dtype], config.prompt_tokens
    heads: dict[str, Any] = {
        "num_q_heads": config.q_heads,
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
    }
    scale = config.head_dim**-0.5

    def normal(rows: int, count: int) -> Tensor:
        return torch.randn(rows, count, config.head_dim, generator=random).to(dtype)

    k_pool, v_pool = normal(4 * total, config.kv_heads), normal(4 * total, config.kv_heads)
    slots = torch.randperm(4 * total, generator=random)[:total]
    first, end = config.system_tokens, total - config.question_tokens
    spans = [
        (first + i * config.chunk_tokens, first + (i + 1) * config.chunk_tokens)
        for i in range(config.chunks)
    ]
    chosen = torch.randperm(end - first, generator=random)[: config.recomputed] + first
    question = torch.arange(end, total)
    rows = torch.cat([chosen.sort().values, question])
    q = normal(total, config.q_heads)
    q_rows, q_question = q[rows], q[question]
    new_k, new_v = normal(rows.numel(), config.kv_heads), normal(rows.numel(), config.kv_heads)
    chunk_k, chunk_v = (
        normal(config.chunk_tokens, config.kv_heads),
        normal(config.chunk_tokens, config.kv_heads),
    )
    many_k, many_v = normal(end - first, config.kv_heads), normal(end - first, config.kv_heads)
    spec = RotarySpec.from_inv_freq(
        10000.0 ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    )

    def attention(positions: Tensor, queries: Tensor) -> Callable[[], object]:
        plan = plan_position_causal([positions], [slots], **heads)
        return lambda: position_causal_attention(queries, k_pool, v_pool, plan, scale)

    def torch_causal() -> object:
        k, v = (gather_kv(p, slots).transpose(0, 1)[None] for p in (k_pool, v_pool))
        return scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True
        )

    def torch_masked(parts: int) -> Callable[[], object]:
        step = -(-rows.numel() // parts)
        cut = [rows[lo : lo + step] for lo in range(0, rows.numel(), step)]
        masks = [torch.arange(int(part[-1]) + 1)[None, :] <= part[:, None] for part in cut]

        def attend() -> object:
            k, v = (gather_kv(p, slots).transpose(0, 1)[None] for p in (k_pool, v_pool))
            outputs = []
            for queries, mask in zip(q_rows.split(step), masks, strict=True):
                seen = mask.shape[1]
                outputs.append(
                    scaled_dot_product_attention(
                        queries.transpose(0, 1)[None],
                        k[:, :, :seen],
                        v[:, :, :seen],
                        attn_mask=mask,
                        enable_gqa=True,
                    )
                )
            return outputs

        return attend

    def load(delta: int) -> Callable[[], object]:
        places = [slots[start:stop] for start, stop in spans]
        plan = plan_span_load(places, [delta] * len(spans), spec)
        k_srcs, v_srcs = [chunk_k] * len(spans), [chunk_v] * len(spans)
        return lambda: load_spans_inplace(k_pool, v_pool, k_srcs, v_srcs, plan)

    shift = plan_mean_shift(spans, rows, slots, spec)
    reused = slots[first:end]
    return {
        "attention full": attention(torch.arange(total), q),
        "torch causal full": torch_causal,
        "attention rows": attention(rows, q_rows),
        "torch masked rows": torch_masked(1),
        "torch masked rows in 4": torch_masked(4),
        "attention question": attention(question, q_question),
        "load": load(400),
        "load unmoved": load(0),
        "shift": lambda: mean_shift_inplace(k_pool, v_pool, new_k, new_v, shift),
        "mass": lambda: query_attention_mass(q_question, k_pool, slots, question, total, scale),
        "deviation": lambda: kv_deviation(
            many_k, gather_kv(k_pool, reused), many_v, gather_kv(v_pool, reused), "kv"
        ),
        "plan attention": lambda: plan_position_causal([rows], [slots], **heads),
        "plan shift": lambda: plan_mean_shift(spans, rows, slots, spec),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text, one line per operation."""
    lines = [
        f"{name:24} CPU median {value['cpu_ms_p50']:8.2f} ms   least {value['cpu_ms_min']:8.2f}"
        f"   wall {value['wall_ms_p50']:8.2f}   n={value['n']}"
        for name, value in report["timings"].items()
    ]
    config = report["config"]
    lines.append(
        f"{100 * report['rows_share']:.1f}% of the rows take {100 * report['rows_over_full_cpu']:.1f}% of the CPU time "
        f"of all rows ({report['prompt_tokens']} tokens, {config['dtype']}, {config['threads']} thread(s))"
    )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.kernels", __doc__)
    return run_benchmark(parser, KernelBenchConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())

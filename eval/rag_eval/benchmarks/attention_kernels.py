"""Attention kernels of the CPU side by side: shares of rows, shares of blocks, lengths and threads.

``python -m rag_eval.benchmarks.attention_kernels --json``

One layer of each shape, bf16, keys at random slots of a pool twice as large. For every length and number of threads,
in turns so that a busy machine hits all alike, medians reported:

``torch causal``
    torch's fused attention over gathered keys, causal, all rows: what full prefill computes.
``rows SHARE``
    That share of all rows, drawn at random: what a fused pass computes. 1 is all rows by our own kernel.
``blocks DENSITY``
    All rows, of each query block that share of the key blocks before its own, drawn at random per key/value head, and
    its own: what a sparse method leaves. Its ``density`` is the share of key and row pairs that are read.
``METHOD``
    All rows by a static attention method, its mask made before.
``decode``, ``decode METHOD``
    The last row alone as a decode step of the engine on the CPU reads it: slots planned, keys and values gathered,
    attention. Its ``density`` is the share of the keys that the plan gathers.

Each has its time over that of ``torch causal`` (``vs_torch``) and of ``rows 1`` (``vs_all_rows``), decode steps over
that of ``decode`` in place of both, by wall clock and by CPU time of the process; with one thread on a busy machine the latter is what to read.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import (
    benchmark_parser,
    keep_measured,
    run_benchmark,
    time_in_turns,
    versions_of,
)
from rag_eval.benchmarks.named_methods import static_density, static_named
from rag_eval.command import Progress
from rag_eval.errors import EvalError
from rag_kernels import (
    BlockMask,
    RequestBlocks,
    gather_kv,
    plan_position_causal,
    position_causal_attention,
)
from rag_kernels.attention.torch_sdpa import decode_attention
from rag_kernels.sparse.static_blocks import StaticBlocks
from rag_pipeline.sglang_plugin.cpu.slot_plan import SlotPlan, plan_kept_slots
from rag_pipeline.sglang_plugin.fusion.forward.sparse_decode import kept_positions

_SHAPES = {
    "smollm2-135m": (9, 3, 64),
    "qwen2.5-coder-0.5b": (14, 2, 64),
    "llama-8b": (32, 8, 128),
}
"""Query heads, key/value heads and head size by the name of a model that has them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionKernelsConfig:
    """What is compared."""

    lengths: str = "2400,8192,16384"
    """Tokens of the prompt, comma between."""
    shape: str = "smollm2-135m"
    """Heads of smollm2-135m, qwen2.5-coder-0.5b or llama-8b."""
    kernel: str = "auto"
    """Attention kernel; auto is what the engine takes."""
    threads: str = "1,2"
    """Torch threads, comma between."""
    rows: str = "0.05,0.15,0.3"
    """Shares of rows; all rows are always there."""
    densities: str = "0.1,0.25,0.5,1"
    """Shares of blocks; empty for none."""
    methods: str = ""
    """Static attention methods, comma between: prompt and decode step."""
    block: int = 64
    """Tokens of a query block and of a key block."""
    repeats: int = 5
    """Timed calls of every kind."""
    seed: int = 0
    """Of the numbers, rows and blocks."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "block", "repeats")
        require_at_least(self, 0, "seed")
        if self.shape not in _SHAPES:
            raise EvalError(f"--shape is {self.shape!r}; choose one of {', '.join(_SHAPES)}.")
        for name in ("lengths", "threads"):
            if any(number < 1 or number != int(number) for number in _numbers(self, name)):
                raise EvalError(f"--{name} is {getattr(self, name)!r}; give whole numbers above 0.")
        for text in self.method_names:
            _ = static_named(text)
        for name in ("rows", "densities"):
            if any(not 0.0 < share <= 1.0 for share in _numbers(self, name)):
                raise EvalError(f"--{name} is {getattr(self, name)!r}; give shares up to 1.")

    @property
    def method_names(self) -> list[str]:
        """:attr:`methods` one by one."""
        return [word for word in self.methods.split(",") if word.strip()]


def _numbers(config: AttentionKernelsConfig, name: str) -> list[float]:
    text = str(getattr(config, name))
    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise EvalError(f"--{name} is {text!r}; give numbers with commas between.") from None


def run(config: AttentionKernelsConfig, progress: Progress) -> dict[str, Any]:
    """Time every call; see the module."""
    before = torch.get_num_threads()
    cases: list[dict[str, Any]] = []
    try:
        with keep_measured(lambda: cases) as end:
            for length in map(int, _numbers(config, "lengths")):
                calls, density, kernel = _calls(config, length)
                for threads in map(int, _numbers(config, "threads")):
                    torch.set_num_threads(threads)
                    progress(f"{length} tokens, {threads} thread(s)")
                    timers = time_in_turns(calls, config.repeats, progress)
                    times = {name: timer.report() for name, timer in timers.items()}
                    cases.append(
                        {
                            "tokens": length,
                            "threads": threads,
                            "kernel": kernel,
                            "calls": {
                                name: {
                                    **time,
                                    "density": density.get(name, 1.0),
                                    "vs_torch": _ratios(time, times[_base(name, "torch causal")]),
                                    "vs_all_rows": _ratios(time, times[_base(name, "rows 1")]),
                                }
                                for name, time in times.items()
                            },
                        }
                    )
    finally:
        torch.set_num_threads(before)
    return {
        "config": dataclasses.asdict(config),
        "cases": cases,
        "versions": versions_of("python", "torch"),
        "capability": torch.backends.cpu.get_cpu_capability(),
    } | end.report()


def _base(name: str, other: str) -> str:
    return "decode" if name.startswith("decode") else other


def _ratios(time: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    return {
        clock: round(time[f"{clock}_ms_p50"] / base[f"{clock}_ms_p50"], 4)
        for clock in ("wall", "cpu")
    }


def _calls(
    config: AttentionKernelsConfig, length: int
) -> tuple[dict[str, Callable[[], object]], dict[str, float], str]:
    """Calls by name, the density of those with blocks, and the kernel that computes them."""
    random = torch.Generator().manual_seed(config.seed)
    q_heads, kv_heads, dim = _SHAPES[config.shape]
    k_pool, v_pool = torch.randn(2, 2 * length, kv_heads, dim, generator=random).bfloat16()
    q = torch.randn(length, q_heads, dim, generator=random).bfloat16()
    slots = torch.randperm(2 * length, generator=random)[:length]
    kernels = set()

    def attention(positions: torch.Tensor, mask: BlockMask | None) -> Callable[[], object]:
        plan = plan_position_causal(
            [positions],
            [slots],
            num_q_heads=q_heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            kernel=config.kernel,
        )
        kernels.add(plan.kernel)
        rows = q[positions]
        return lambda: position_causal_attention(rows, k_pool, v_pool, plan, dim**-0.5, mask=mask)

    def torch_causal() -> object:
        k, v = (gather_kv(pool, slots).transpose(0, 1)[None] for pool in (k_pool, v_pool))
        return scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True
        )

    calls: dict[str, Callable[[], object]] = {"torch causal": torch_causal}
    for share in [*_numbers(config, "rows"), 1.0]:
        count = max(1, round(share * length))
        chosen = torch.randperm(length, generator=random)[:count].sort().values
        calls[f"rows {share:g}"] = attention(chosen, None)
    density = {}
    blocks = -(-length // config.block)
    for share in _numbers(config, "densities"):
        allowed = torch.rand(kv_heads, blocks, blocks, generator=random) < share
        mask = BlockMask(
            requests=(
                RequestBlocks(allowed=allowed, query_block=config.block, key_block=config.block),
            )
        )
        read = (allowed | torch.eye(blocks, dtype=torch.bool)).tril(-1).sum() / kv_heads
        # The blocks of the diagonal are half full.
        pairs = float(read) + blocks / 2
        density[f"blocks {share:g}"] = pairs / (blocks * (blocks - 1) / 2 + blocks / 2)
        calls[f"blocks {share:g}"] = attention(torch.arange(length), mask)
    for text in config.method_names:
        method = static_named(text)
        plan = plan_position_causal(
            [torch.arange(length)],
            [slots],
            num_q_heads=q_heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            kernel=config.kernel,
        )
        mask = method.prepare(plan, [0])
        calls[text] = attention(torch.arange(length), mask)
        density[text] = static_density(method, length)
    if config.method_names:
        one = SimpleNamespace(req_pool_indices=torch.tensor([0]), seq_lens=torch.tensor([length]))

        def decode(kept: torch.Tensor | None) -> SlotPlan:
            return plan_kept_slots(one, slots[None], [kept], padding=1.0)

        def step(method: StaticBlocks | None) -> Callable[[], object]:
            def call() -> object:
                kept = None if method is None else kept_positions(method, length - 1)
                own = decode(kept).buckets[0].slots
                return decode_attention(q[-1:], k_pool[own], v_pool[own], scale=dim**-0.5)

            return call

        calls["decode"] = step(None)
        for text in config.method_names:
            method = static_named(text)
            calls[f"decode {text}"] = step(method)
            density[f"decode {text}"] = (
                decode(kept_positions(method, length - 1)).keys_read / length
            )
    return calls, density, "/".join(sorted(kernels))


def table(report: dict[str, Any]) -> str:
    """The report as text: wall and CPU time, and what they are of torch's and of our own dense call."""
    lines = []
    for case in report["cases"]:
        lines.append(
            f"{case['tokens']} tokens, {case['threads']} thread(s), kernel {case['kernel']}"
            f"{'':8}wall ms    CPU ms   density   of torch, wall (CPU)   of all rows"
        )
        lines += [
            f"  {name:42}{call['wall_ms_p50']:10.2f}{call['cpu_ms_p50']:10.2f}{call['density']:10.3f}"
            f"{call['vs_torch']['wall']:9.3f} ({call['vs_torch']['cpu']:.3f})"
            f"{call['vs_all_rows']['wall']:12.3f} ({call['vs_all_rows']['cpu']:.3f})   n={call['n']}"
            for name, call in case["calls"].items()
        ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.attention_kernels", __doc__)
    return run_benchmark(parser, AttentionKernelsConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())

"""PowerAttention against other static patterns at equal blocks, on toy transformers trained from scratch.

``python -m rag_eval.benchmarks.power_toy --json``

The paper (arXiv 2503.03588) trains a 7B model; what can be tried in minutes on a CPU is its argument: at equal blocks
per row, the pattern decides how far information moves within the layers. The task is passkey recall. A prompt is filler
with one passkey in a random block, and every token behind it is to name the passkey. The depth is chosen so that a
sliding window cannot carry it over the whole prompt. Every pattern gets the same model, data, seeds and steps.

Accuracy is that of the tokens of all blocks behind the passkey's block, by pair of blocks, so that no pattern gains by
where its borders lie. ``reachable`` is what the pattern allows at most: pairs of blocks between which there is a path of
as many hops as there are layers. Sinks carry nothing here: the passkey never stands in the first block.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, keep_measured, run_benchmark, versions_of
from rag_eval.benchmarks.named_methods import named_method
from rag_eval.command import Progress, no_progress
from rag_eval.errors import EvalError
from rag_kernels.sparse.static_blocks import StaticBlocks

_FILLERS, _PASSKEYS = 16, 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PowerToyConfig:
    """Sizes of a run: by default the paper's patterns for 128 blocks, 32K tokens in blocks of 256.

    The last row of each reads 10 blocks. LongNet's read 24 there and 12.5 on average, of PowerAttention's 8.9: it gets
    segments with which it reads 10.2 on average.
    """

    patterns: str = "power,streaming,strided,dilated,longnet:segment=7"
    """Static attention methods that are compared, and ``dense`` where wanted."""
    blocks: int = 128
    """Blocks of a prompt."""
    block_tokens: int = 1
    """Tokens of a block; more cost time and change nothing in what the patterns reach."""
    layers: int = 4
    """Layers of the model."""
    width: int = 32
    """Width of the model."""
    heads: int = 2
    """Attention heads."""
    steps: int = 1200
    """Steps of training."""
    batch: int = 16
    """Prompts of a step."""
    learning_rate: float = 6e-3
    """Highest rate of AdamW; it rises over the first tenth of the steps and falls to zero."""
    seeds: int = 3
    """Models per pattern, each of other weights and data."""
    tested: int = 2000
    """Prompts that the accuracy is taken from."""

    def __post_init__(self) -> None:
        sizes = ("block_tokens", "layers", "heads", "steps", "batch", "seeds", "tested")
        require_at_least(self, 1, *sizes)
        require_at_least(self, 3, "blocks")
        if self.width < 1 or self.width % self.heads:
            raise EvalError(f"width is {self.width}; it must be a multiple of heads, {self.heads}")
        for text in self.names:
            _ = _blocks_read(text, self.blocks)

    @property
    def names(self) -> list[str]:
        """:attr:`patterns` one by one."""
        return self.patterns.split(",")


def _blocks_read(text: str, blocks: int) -> Tensor:
    """Which blocks each block of rows reads by a pattern; bool ``[blocks, blocks]``."""
    method = named_method(text)
    if method.name == "dense":
        return torch.ones(blocks, blocks, dtype=torch.bool).tril()
    if not isinstance(method, StaticBlocks):
        raise EvalError(f"{text!r} chooses by the prompt; give patterns that are static")
    return method.allowed(0, blocks - 1)


def reachable(read: Tensor, layers: int) -> Tensor:
    """Pairs of blocks with a path of at most so many hops; bool ``[blocks, blocks]``."""
    hop = read.float()
    found = torch.eye(len(read))
    for _ in range(layers):
        found = ((found @ hop) > 0).float()
    return found.bool()


class _Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor, may_read: Tensor) -> Tensor:
        batch, length, width = h.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.before_attention(h)).chunk(3, dim=-1)
        )
        read = scaled_dot_product_attention(q, k, v, attn_mask=may_read)
        h = h + self.out(read.transpose(1, 2).reshape(batch, length, width))
        return h + self.mlp(self.before_mlp(h))


class ToyModel(nn.Module):  # type: ignore[misc]
    """A causal transformer without position embeddings: what carries the passkey has no place to learn by heart.

    Parameters
    ----------
    config : PowerToyConfig
        Its sizes.
    read : Tensor
        bool ``[blocks, blocks]``: which blocks each block of rows reads.
    """

    def __init__(self, config: PowerToyConfig, read: Tensor) -> None:
        super().__init__()
        tokens = config.block_tokens
        may_read = read.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).tril()
        self.register_buffer("may_read", may_read)
        self.embed = nn.Embedding(_FILLERS + _PASSKEYS, config.width)
        self.stack = nn.ModuleList(_Layer(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.answer = nn.Linear(config.width, _PASSKEYS)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the passkey at each token; ``[batch, tokens, passkeys]`` from ids ``[batch, tokens]``."""
        h = self.embed(ids)
        for layer in self.stack:
            h = layer(h, self.may_read)
        logits: Tensor = self.answer(self.norm(h))
        return logits


def draw_prompts(
    config: PowerToyConfig, count: int, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Filler with one passkey each, in any block but the first and the last.

    Returns
    -------
    tuple of Tensor
        Ids ``[count, tokens]``, passkeys ``[count]`` and the positions at which they stand ``[count]``.
    """
    length = config.blocks * config.block_tokens
    ids = torch.randint(_FILLERS, (count, length), generator=random)
    keys = torch.randint(_PASSKEYS, (count,), generator=random)
    places = torch.randint(
        config.block_tokens, length - config.block_tokens, (count,), generator=random
    )
    ids[torch.arange(count), places] = _FILLERS + keys
    return ids, keys, places


def train(config: PowerToyConfig, read: Tensor, seed: int, progress: Progress) -> ToyModel:
    """Train a model with a pattern; every token behind the passkey counts alike."""
    torch.manual_seed(seed)
    model = ToyModel(config, read)
    random = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1
    )
    at = torch.arange(config.blocks * config.block_tokens)
    for step in range(config.steps):
        ids, keys, places = draw_prompts(config, config.batch, random)
        is_behind = at[None, :] > places[:, None]
        wanted = keys[:, None].expand_as(ids)[is_behind]
        loss = cross_entropy(model(ids)[is_behind], wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            progress(f"step {step + 1} of {config.steps}, loss {float(loss.detach()):.3f}")
    return model


def accuracy_by_pair(config: PowerToyConfig, model: ToyModel, seed: int) -> Tensor:
    """Share of right answers by block of the asking token and block of the passkey; NaN where there is none.

    Returns
    -------
    Tensor
        ``[blocks, blocks]``, pairs at a distance of at least 1.
    """
    random = torch.Generator().manual_seed(2000 + seed)
    shape = (config.blocks, config.blocks)
    right, asked = torch.zeros(shape), torch.zeros(shape)
    row = torch.arange(config.blocks * config.block_tokens) // config.block_tokens
    for _ in range(-(-config.tested // config.batch)):
        ids, keys, places = draw_prompts(config, config.batch, random)
        with torch.inference_mode():
            is_right = model(ids).argmax(-1) == keys[:, None]
        key = places // config.block_tokens
        for index in range(config.batch):
            right[:, key[index]].index_add_(0, row, is_right[index].float())
            asked[:, key[index]].index_add_(0, row, torch.ones(len(row)))
    is_pair = torch.ones(shape, dtype=torch.bool).tril(-1)
    return torch.where(is_pair & (asked > 0), right / asked, float("nan"))


def run(config: PowerToyConfig, progress: Progress = no_progress) -> dict[str, Any]:
    """Train and test every pattern.

    Returns
    -------
    dict
        ``patterns{NAME}`` with ``blocks_last_row``, ``blocks_mean``, ``reachable`` (share of pairs), ``accuracy`` of
        all pairs, ``far_accuracy`` of those in the farther half, ``accuracy_reachable`` and ``accuracy_unreachable``
        (each ``median``, ``values`` by seed and ``n``), ``chance``, ``config``, ``seconds``, ``versions``. An
        interrupted run has the patterns and seeds that were finished.
    """
    began = time.perf_counter()
    found: dict[str, list[Tensor]] = {name: [] for name in config.names}
    with keep_measured(lambda: any(found.values())) as end:
        for seed in range(config.seeds):
            for name in config.names:
                progress(f"{name}, seed {seed + 1} of {config.seeds}")
                model = train(config, _blocks_read(name, config.blocks), seed, progress)
                found[name].append(accuracy_by_pair(config, model, seed))
    return {
        "benchmark": "power_toy",
        "patterns": {name: _summary(config, name, pairs) for name, pairs in found.items() if pairs},
        "chance": 1 / _PASSKEYS,
        "config": dataclasses.asdict(config),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": versions_of("python", "torch"),
    } | end.report()


def _summary(config: PowerToyConfig, name: str, pairs: list[Tensor]) -> dict[str, Any]:
    read = _blocks_read(name, config.blocks)
    row = torch.arange(config.blocks)
    distance = row[:, None] - row[None, :]
    is_pair = distance > 0
    is_pair[:, 0] = False  # no passkey stands there
    reaches = reachable(read, config.layers)
    parts = {
        "accuracy": is_pair,
        "far_accuracy": is_pair & (distance >= config.blocks // 2),
        "accuracy_reachable": is_pair & reaches,
        "accuracy_unreachable": is_pair & ~reaches,
    }
    counts = read.sum(dim=1)
    return {
        "blocks_last_row": int(counts[-1]),
        "blocks_mean": round(float(counts.float().mean()), 3),
        "reachable": round(float(reaches[is_pair].float().mean()), 4),
    } | {part: _spread([_mean(found[chosen]) for found in pairs]) for part, chosen in parts.items()}


def _mean(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.mean()) if known.numel() else None


def _spread(values: list[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    median = float(torch.tensor(known, dtype=torch.float64).quantile(0.5))
    return {
        "median": round(median, 4),
        "values": [round(value, 4) for value in known],
        "n": len(known),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text: a line per pattern, accuracies as the median over seeds and the values of all."""
    lines = [
        f"{'pattern':<32}{'blocks: last, mean':>20}{'reachable':>11}{'accuracy (all seeds)':>34}{'far half':>10}"
    ]
    for name, numbers in report["patterns"].items():
        all_pairs, far = numbers["accuracy"], numbers["far_accuracy"]
        seeds = " ".join(f"{value:.3f}" for value in all_pairs["values"])
        blocks = f"{numbers['blocks_last_row']}, {numbers['blocks_mean']:.1f}"
        lines.append(
            f"{name:<32}{blocks:>20}{numbers['reachable']:>11.3f}"
            f"{all_pairs['median']:>12.3f} ({seeds}){far['median']:>10.3f}"
        )
    config = report["config"]
    lines.append(
        f"{config['layers']} layers of width {config['width']}, {config['blocks']} blocks of "
        f"{config['block_tokens']} tokens, {config['steps']} steps of {config['batch']} prompts; "
        f"chance {report['chance']:.3f}; {report['seconds']} s"
    )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark from a command line; returns the exit code."""
    parser = benchmark_parser("python -m rag_eval.benchmarks.power_toy", __doc__)
    return run_benchmark(parser, PowerToyConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())

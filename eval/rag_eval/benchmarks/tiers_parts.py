"""The parts of ``bench tiers``: what each starts, and how its pairs become a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rag_eval.benchmarks.tiers_config import FIGURES, TiersConfig
from rag_eval.benchmarks.tiers_engine import TierSession, Timed, chat, memory_and_tier, saving
from rag_eval.benchmarks.ttft_prompts import Point, make_prompts
from rag_eval.command import Progress
from rag_eval.errors import EvalError

TURNS = 8
_SENTENCE = 96
"""Tokens that a chunk of whole sentences may fall short of its size, and is cut by."""


class TiersBench:
    """One run: its prompts, its engines, what was found; a method per part.

    Parameters
    ----------
    config : TiersConfig
        What to measure.
    folder : Path
        For files of the run.
    progress : callable
        Told of each step.
    """

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

    def prompts(self, number: int, *, salt: int = 0, shape: Point | None = None) -> list[Any]:
        """Prompts of equal shape without a common chunk, as their chunks are built."""
        config = self.config
        shape = shape or Point(chunks=config.chunks, chunk_tokens=config.chunk_tokens)
        point = Point(chunks=number * shape.chunks, chunk_tokens=shape.chunk_tokens + _SENTENCE)
        seen, _ = make_prompts(point, self.maker, question_tokens=24, seed=config.seed + salt)
        # To the token, so that the sides of a ratio load and compute the same.
        least = min(shape.chunk_tokens, *(len(chunk.ids) for chunk in seen.chunks))
        chunks = [replace(chunk, ids=chunk.ids[:least]) for chunk in seen.chunks]
        return [
            replace(seen, chunks=tuple(chunks[i : i + shape.chunks]))
            for i in range(0, len(chunks), shape.chunks)
        ]

    @contextmanager
    def engine(
        self, tier: str = "", /, *, beside: TierSession | None = None, **settings: Any
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

    def room(self, prompt: Any) -> int:
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
        room = self.room(prompts[0])
        with self.engine("disk", store_dir=str(folder), store_bytes=room) as engine:
            asked = self.stored(engine, prompts)
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
            room = self.room(prompts[0])
            with self.engine("remote", remote=server.url, store_bytes=room) as engine:
                asked = self.stored(engine, prompts)
                pairs, skipped = memory_and_tier(
                    engine, asked, self.mode, self.config.repeats, self.progress
                )
        finally:
            server.kill()
        self.note("ttft_remote_vs_memory", pairs, left_out=skipped)

    def stored(self, engine: TierSession, prompts: Sequence[Any]) -> list[Any]:
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
        tokens = self.config.chunks * self.config.chunk_tokens
        shape = Point(chunks=TURNS, chunk_tokens=max(16, tokens // TURNS))
        texts = self.prompts(2 * self.config.repeats, salt=2, shape=shape)
        with self.engine() as engine:
            for kind in ("with a stored chunk", "plain"):  # the last is the figure
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
                self.details[figure] |= {name: told.get(name) for name in names}
                self.details[f"{figure}, {kind}"] = self.details[figure]


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [round(value, 4) for value in values]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [round(first, 4), round(third, 4)]

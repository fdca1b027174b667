"""One server under test: its chunks computed, each mode served alone, each mode at rising rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_eval.benchmarks.workload import Workload, build_bodies, single_request
from rag_eval.errors import EvalError

if TYPE_CHECKING:
    from rag_eval.benchmarks.load_client import LoadRun
    from rag_eval.runner.modes import Mode
    from rag_eval.runner.prompts import EvalPrompt

PROBES = 3
"""Prompts served alone, before the load, to prove that a mode does what its name says."""
_TIMEOUT_S = 3600.0


@contextmanager
def reached_server(
    url: str | None,
    folder: Path,
    engine_args: Mapping[str, Any],
    progress: Callable[[str], None],
) -> Iterator[tuple[str, Callable[[], float] | None]]:
    """Reach a running server, or start one for as long as the block lasts.

    Parameters
    ----------
    url : str or None
        Of the running server; ``None`` starts one.
    folder : Path
        Model folder; a running server must serve this model.
    engine_args : mapping
        Arguments of the server that is started.
    progress : callable
        Told that one is started.

    Yields
    ------
    tuple
        The URL, and what tells the CPU time of the server's processes: ``None`` where they are not
        ours.
    """
    if url:
        from rag_pipeline.generation import ServerBackend

        backend = ServerBackend(url)
        try:
            backend.check_model(folder)
            yield backend.url, None
        finally:
            backend.close()
        return
    from rag_eval.benchmarks.local_server import local_server

    progress("starting the server")
    with local_server(folder, engine_args) as server:
        yield server.url, server.cpu_seconds


class ServerUnderTest:
    """One server and the prompts it is measured by.

    Parameters
    ----------
    url : str
        Base URL.
    folder : Path
        Folder of its model.
    workload : Workload
        The prompts.
    output_tokens : int
        Tokens of every answer.
    seed : int
        Of the arrivals.
    cpu_seconds : callable or None
        CPU time of the server's processes so far; ``None`` where they are not ours.
    progress : callable
        Told what was found, a line each.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        workload: Workload,
        *,
        output_tokens: int,
        seed: int,
        cpu_seconds: Callable[[], float] | None,
        progress: Callable[[str], None],
    ) -> None:
        import httpx

        from rag_pipeline.models.stock_tokenizer import load_stock_tokenizer

        self._url, self._workload = url, workload
        self._output_tokens, self._seed = output_tokens, seed
        self._cpu_seconds, self._progress = cpu_seconds, progress
        self._client = httpx.Client(timeout=_TIMEOUT_S, trust_env=False)
        self._tokenizer = load_stock_tokenizer(folder)

    def warm(self) -> dict[str, Any]:
        """Compute every chunk of the corpus once."""
        cpu_before = self._cpu_seconds() if self._cpu_seconds else 0.0
        started = time.perf_counter()
        bodies = build_bodies(self._workload.corpus)
        for body in bodies:
            self._generate(body)
        cpu_s = round(self._cpu_seconds() - cpu_before, 2) if self._cpu_seconds else None
        wall_s = round(time.perf_counter() - started, 2)
        chunks = len(self._workload.corpus.chunks)
        self._progress(f"{chunks} chunks computed in {wall_s} s")
        return {"chunks": chunks, "wall_s": wall_s, "cpu_s": cpu_s}

    def probe(self, mode: Mode) -> dict[str, Any]:
        """Serve a few prompts alone: what a mode does, and how long it takes without a queue."""
        from rag_pipeline.protocol import fusion_report

        prompts = self._workload.prompts[:PROBES]
        reports = []
        for prompt in prompts:
            self._flush()
            meta = self._generate(single_request(prompt, mode, 1))["meta_info"]
            report = fusion_report(meta) if mode.fused else {}
            if report is None or (mode.fused and not report["reused_tokens"]):
                reason = (report or {}).get("fallback") or "no report"
                raise EvalError(
                    f"mode {mode.name!r} is not served by {self._url}: {reason}; leave it out"
                )
            reports.append(report)
        runs = []
        for prompt in prompts:
            self._flush()
            # The load generator waits behind every prompt, the last one too: at this rate for nothing.
            runs.append(self._load([prompt], mode, rate=1e6, bound=1.0))
        found = {
            "ttft_p50_s": round(float(statistics.median(run.ttft_p50_s for run in runs)), 4),
            "latency_p50_s": round(float(statistics.median(run.latency_p50_s for run in runs)), 4),
        }
        if mode.fused:
            shares = [report["computed_fraction"] for report in reports]
            found["computed_fraction"] = round(statistics.median(shares), 4)
        computed = f", {found['computed_fraction']:.0%} computed" if mode.fused else ""
        self._progress(
            f"{mode.name} alone: TTFT p50 {found['ttft_p50_s']:.2f} s, "
            f"latency p50 {found['latency_p50_s']:.2f} s{computed}"
        )
        return found

    def drive(
        self, modes: list[Mode], rates: tuple[float, ...], bound: float
    ) -> Iterator[dict[str, Any]]:
        """Every mode at every rate, until it is saturated."""
        going = list(modes)
        for rate in rates:
            for mode in list(going):
                self._flush()
                run = self._load(self._workload.prompts, mode, rate=rate, bound=bound)
                if run.saturated:
                    going.remove(mode)
                yield {"mode": mode.name, **run.to_json()}
                self._progress(
                    f"{mode.name} at {rate:g}/s: TTFT p50 {run.ttft_p50_s:.2f} s, p99 "
                    f"{run.ttft_p99_s:.2f} s, {run.output_tokens_per_s:.1f} tokens/s, goodput "
                    f"{run.goodput_per_s:.2f}/s{', saturated' if run.saturated else ''}"
                )

    def threads(self) -> int:
        """Threads of the server's scheduler, as it says itself; 0 without the plugin."""
        from rag_pipeline.sglang_plugin import activation_of

        return int(activation_of(self._url).threads)

    def close(self) -> None:
        """Close the connections; the server runs on."""
        self._client.close()

    def _load(
        self, prompts: Sequence[EvalPrompt], mode: Mode, *, rate: float, bound: float
    ) -> LoadRun:
        from rag_eval.benchmarks.load_client import run_load

        return run_load(
            self._url,
            prompts,
            mode,
            rate=rate,
            output_tokens=self._output_tokens,
            ttft_bound_s=bound,
            tokenizer=self._tokenizer,
            seed=self._seed,
            cpu_seconds=self._cpu_seconds,
        )

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        response = self._client.post(f"{self._url}/generate", json=body)
        if response.status_code != 200:
            line = " ".join(response.text.split())[:200]
            raise EvalError(f"the server at {self._url} refused a request: {line}")
        answer: dict[str, Any] = response.json()
        return answer

    def _flush(self) -> None:
        """Empty the radix tree, and start every mode with the shared prefix in it."""
        deadline = time.monotonic() + 120
        while self._client.post(f"{self._url}/flush_cache").status_code != 200:
            if time.monotonic() > deadline:
                raise EvalError(f"the server at {self._url} stays busy; is somebody else using it?")
            time.sleep(0.2)
        prefix = list(self._workload.corpus.prefix_ids)
        self._generate({"input_ids": prefix, "sampling_params": {"max_new_tokens": 1}})

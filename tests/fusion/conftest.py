"""SGLang's real scheduler, model runner, radix tree and pools in the test process, on tiny random models.

No process is started and nothing listens: a test queues requests, turns the scheduler's loop by hand and reads
the finished ``Req``. One scheduler at a time lives in the process; asking for other settings replaces it.
"""

from __future__ import annotations

import gc
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_helpers import CHUNKS, VOCAB, store_chunks

from rag_eval.benchmarks.tiny_model import peak_attention, tiny_config


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with a random-weight model of a family; weights large enough for attention to matter."""
    made: dict[str, Path] = {}

    def make(family: str, name: str = "", **overrides: Any) -> Path:
        key = name or family
        if Path(key).is_dir():  # a model that a test made itself
            return Path(key)
        if key not in made:
            from transformers import AutoModelForCausalLM

            torch.manual_seed(7)
            common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
            model = AutoModelForCausalLM.from_config(tiny_config(family, **(common | overrides)))
            peak_attention(model)
            folder = tmp_path_factory.mktemp(key)
            model.to(torch.float32).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


class _Sink:
    """Takes the place of the socket to the detokenizer."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send_output(self, payload: Any, *args: Any) -> None:
        self.sent.append(payload)


class LocalEngine:
    """A scheduler that is driven by hand."""

    def __init__(self, model: Path | str, *, world_rank: int = 0, **settings: Any) -> None:
        from sglang.srt.managers.scheduler import Scheduler
        from sglang.srt.plugins import load_plugins
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import PortArgs, ServerArgs

        load_plugins()
        arguments: dict[str, Any] = {
            "model_path": str(model),
            "dtype": "float32",
            "device": "cpu",
            "max_total_tokens": 8192,
            "max_running_requests": 16,
            "mem_fraction_static": 0.2,
            "chunked_prefill_size": -1,
            "disable_overlap_schedule": True,
            "skip_tokenizer_init": True,
            "random_seed": 1,
            "log_level": "error",
        } | settings
        server_args = ServerArgs(**arguments)
        publish(
            server_args,
            role="scheduler",
            ranks=SpawnRanks(world_rank=world_rank, dp_rank=None, gpu_id=world_rank),
        )
        self.scheduler = Scheduler(server_args, PortArgs.init_new(server_args))
        self.sink = _Sink()
        self.scheduler.output_streamer.send_to_detokenizer = self.sink
        self._count = 0
        self._results: list[Any] = []

    @property
    def runtime(self) -> Any:
        from rag_pipeline.sglang_plugin.fusion.runtime.runtime import get_runtime

        return get_runtime()

    def submit(
        self,
        ids: Sequence[int],
        new: int = 4,
        *,
        fusion: dict[str, Any] | None = None,
        top: int = 5,
        **fields: Any,
    ) -> Any:
        """Queue a request; ``fusion`` are fields without their ``rag_`` prefix."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
        from sglang.srt.sampling.sampling_params import SamplingParams

        custom = {f"rag_{key}": value for key, value in (fusion or {}).items()} or None
        params = SamplingParams(
            temperature=0.0, max_new_tokens=new, ignore_eos=True, custom_params=custom
        )
        params.normalize(None)
        self._count += 1
        arguments: dict[str, Any] = {
            "rid": f"test-{self._count}",
            "input_text": "",
            "input_ids": array("q", ids),
            "input_embeds": None,
            "mm_inputs": None,
            "token_type_ids": [],
            "sampling_params": params,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": top,
            "token_ids_logprob": None,
            "stream": False,
            "time_stats": APIServerReqTimeStats(),
        } | fields
        self.scheduler.process_input_requests([TokenizedGenerateReqInput(**arguments)])
        return self.scheduler.waiting_queue[-1]

    def step(self) -> Any:
        """One turn of the loop: normal, or overlapped when the scheduler was made so."""
        scheduler = self.scheduler
        with torch.inference_mode():
            plan = scheduler.get_next_batch_to_run(
                running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
            )
            scheduler.running_batch = plan.running_batch
            batch = plan.batch_to_run
            if not scheduler.enable_overlap:
                if batch:
                    scheduler.process_batch_result(batch, scheduler.run_batch(batch))
                else:
                    scheduler.on_idle()
                scheduler.last_batch = batch
                return batch
            result = None
            if batch:
                result = scheduler.run_batch(batch)
                self._results.append((batch.copy(), result))
            if scheduler.last_batch:
                scheduler.process_batch_result(*self._results.pop(0))
            elif batch is None:
                scheduler.on_idle()
            scheduler.launch_batch_sample_if_needed(result, batch)
            scheduler.last_batch = batch
            return batch

    def run(self, *reqs: Any, limit: int = 3000) -> None:
        """Turn the loop until all requests are finished."""
        for _ in range(limit):
            if all(req.finished() for req in reqs):
                return
            self.step()
        raise AssertionError("the requests did not finish")

    def ask(self, ids: Sequence[int], new: int = 4, **fields: Any) -> Any:
        """Submit and run one request."""
        req = self.submit(ids, new, **fields)
        self.run(req)
        return req

    def settle(self) -> None:
        """Turn the loop until nothing is left to do."""
        for _ in range(3000):
            if self.scheduler.is_fully_idle():
                self.step()
                return
            self.step()
        raise AssertionError("the scheduler does not come to rest")

    def flush(self) -> None:
        """Empty radix tree and pools (chunks stay)."""
        self.settle()
        # Emptying the allocator's cache too would collect garbage each time: half a second.
        assert self.scheduler.flush_cache(empty_cache=False), "the cache was not flushed"

    def build(self, prefix: list[int], chunk: list[int], **fields: Any) -> Any:
        """Store a chunk behind a prefix."""
        ids = prefix + chunk
        fusion = {"mode": "build", "spans": [len(prefix), len(ids)]}
        return self.ask(ids, 1, fusion=fusion, **fields)

    def fresh(self) -> None:
        """Empty everything, chunks and counters too."""
        self.runtime.missing.clear()
        self.flush()
        self.runtime.store.clear()
        self.runtime.metrics.counts.clear()

    def close(self) -> None:
        """Make room for another scheduler in this process."""
        from sglang.srt.distributed.parallel_state import (
            destroy_distributed_environment,
            destroy_model_parallel,
        )
        from sglang.srt.runtime_context import reset_context

        from rag_pipeline.sglang_plugin.fusion.runtime.runtime import set_runtime

        set_runtime(None)
        destroy_model_parallel()
        destroy_distributed_environment()
        reset_context()


@pytest.fixture(scope="session")
def _engines(tiny_model: Callable[..., Path]) -> Iterator[Callable[..., LocalEngine]]:
    alive: dict[str, Any] = {"key": None, "engine": None}

    def get(family: str = "llama", **settings: Any) -> LocalEngine:
        key = (family, tuple(sorted(settings.items())))
        if alive["key"] != key:
            if alive["engine"] is not None:
                alive["engine"].close()
                alive["engine"] = None
                gc.collect()  # its pools, before the next ones are made
            alive["engine"] = LocalEngine(tiny_model(family), **settings)
            alive["key"] = key
        engine: LocalEngine = alive["engine"]
        return engine

    yield get
    if alive["engine"] is not None:
        alive["engine"].close()


@pytest.fixture
def engine(_engines: Callable[..., LocalEngine]) -> Iterator[Callable[..., LocalEngine]]:
    """Get an engine for a family and settings, empty of prompts and chunks."""
    used: list[LocalEngine] = []

    def get(family: str = "llama", **settings: Any) -> LocalEngine:
        made = _engines(family, **settings)
        made.fresh()
        used.append(made)
        return made

    yield get
    for made in {id(e): e for e in used}.values():
        made.settle()
        made.runtime.store.check_integrity(expect_idle=True)


@pytest.fixture
def stocked(engine: Callable[..., LocalEngine]) -> LocalEngine:
    """The tiny Llama's engine with the first two chunks in its store."""
    made: LocalEngine = store_chunks(engine("llama"), CHUNKS[:2])
    return made


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def make_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Make the world's server with a default attention method; one at a time is the runtime of this process."""
    from fusion_world import checks
    from method_spaces import method_server

    from rag_pipeline.sglang_plugin.fusion.runtime.runtime import set_runtime

    # That what is called exact is plain prefill: of a method's own namespace it is not.
    for name in ("check", "_check_spans"):
        monkeypatch.setattr(checks.Plan, name, lambda plan: None)
    yield method_server
    set_runtime(None)


@pytest.fixture
def memory_lives(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Begin lives of an engine that keeps memories; they end before the test's folder goes."""
    from memory_lives import Engine

    made: list[Any] = []

    def begin(**settings: Any) -> Any:
        made.append(Engine(**settings))
        return made[-1]

    yield begin
    for one in made:
        one.end()

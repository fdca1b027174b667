"""From a scheduler that is ready to a runtime, or to the reason why fusion stays off."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch

from chunk_cache import TIERS, RecordForm, hash_token_ids
from rag_kernels import choose_kernel
from rag_pipeline.errors import EngineError
from rag_pipeline.protocol import FUSION_KEY, FusionRequest
from rag_pipeline.protocol.cache_order import CACHE_KEY, CacheOrder
from rag_pipeline.sglang_plugin.fusion.builds import persistence as disk
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.management.desk import CacheDesk
from rag_pipeline.sglang_plugin.fusion.request import internal as internal_requests
from rag_pipeline.sglang_plugin.fusion.request.consent import refuse_engine
from rag_pipeline.sglang_plugin.fusion.runtime.attention_methods import is_useless
from rag_pipeline.sglang_plugin.fusion.runtime.metrics import FusionMetrics
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import (
    ModelFacts,
    UnsupportedModelError,
    read_model,
)
from rag_pipeline.sglang_plugin.fusion.runtime.passage import passage_ids, read_passage
from rag_pipeline.sglang_plugin.fusion.runtime.rank_group import RankGroup
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import (
    FusionRuntime,
    get_runtime,
    set_runtime,
)
from rag_pipeline.sglang_plugin.fusion.runtime.support import refuse_settings, refuse_tree
from rag_pipeline.sglang_plugin.fusion.self_check.check import SelfCheckError, run_self_check

logger = logging.getLogger(__name__)


def after_scheduler_init(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Run after ``Scheduler.__init__``: the model is loaded, the pools exist, no request has come."""
    runtime = build_runtime(scheduler)
    agree_on_start(runtime)
    set_runtime(runtime)
    if runtime.is_on and runtime.config.self_check:
        prove(runtime, scheduler)
    disk.start_tiers(runtime, tokenizer_folder(scheduler.server_args))


def tokenizer_folder(server_args: Any) -> str:
    """Folder of an engine's tokenizer, where there is one; a name of the hub is looked up in its cache."""
    # SGLang leaves the path empty where it is that of the model.
    given = str(server_args.tokenizer_path or server_args.model_path)
    if Path(given).exists():
        return str(Path(given).absolute())
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(given, "tokenizer.json")
    except ValueError:  # no name of the hub either
        file = None
    return str(Path(file).parent) if isinstance(file, str) else given


def agree_on_start(runtime: FusionRuntime) -> None:
    """Turn fusion off on every rank where it is off on one, or where one was told something else."""

    def told() -> tuple[bool, str]:
        settings = dataclasses.asdict(runtime.config)
        for name in (
            "store_dir",
            "passage_file",
        ):  # folders may differ, what was read from them may not
            del settings[name]
        settings["max_prompt"] = runtime.max_prompt
        settings["passage"] = hash_token_ids(runtime.passage)
        return runtime.is_on, json.dumps(settings, sort_keys=True)

    seen = runtime.group.gather(told)
    if not runtime.is_on:
        return
    if not all(is_on for is_on, _ in seen):
        runtime.turn_off("it is off on another tensor-parallel rank")
    elif len(set(seen)) > 1:
        runtime.turn_off(
            "the tensor-parallel ranks have different settings or passages of fusion; start all alike"
        )


def prove(runtime: FusionRuntime, scheduler: Any) -> None:
    """Run the self-check and turn fusion off on every rank where it fails on one."""
    fault = ""
    try:
        errors = run_self_check(runtime, scheduler)
        runtime.self_check = "passed: " + ", ".join(f"{k} {v:.2g}" for k, v in errors.items())
    except SelfCheckError as error:
        fault = str(error)
    except Exception as error:
        logger.exception("The self-check of fusion broke off")
        fault = f"{type(error).__name__}: {error}"
    if not runtime.group.all_true(not fault) and not fault:
        fault = "it failed on another rank"
    if fault:
        runtime.self_check = f"failed: {fault}"
        runtime.turn_off(f"self-check failed: {fault}")
    else:
        logger.info("Self-check of chunk-KV fusion %s", runtime.self_check)
    # What was looked up for the proof, nobody asked for.
    runtime.store.forget_counts()
    runtime.metrics.forget()


def after_internal_state(result: Any, controller: Any, *args: Any, **kwargs: Any) -> None:
    """Run after ``get_internal_state``: ``/server_info`` shows what fusion is doing."""
    runtime = get_runtime()
    if runtime is not None:
        order = CacheOrder.decode(getattr(args[0], "rid", None) if args else None)
        if order is not None:
            result.internal_state[CACHE_KEY] = _desk(runtime).take(order)
        # Where fusion is off nobody serves the queue, and nobody need wait for it.
        builds = len(runtime.missing) + internal_requests.running(controller.scheduler)
        waiting = builds if runtime.is_on else 0
        waiting += disk.pending(runtime)
        result.internal_state[FUSION_KEY] = runtime.status() | {"pending": waiting}


def _desk(runtime: FusionRuntime) -> CacheDesk:
    """The desk of this process; made for the first order."""
    if runtime.desk is None:
        runtime.desk = CacheDesk(runtime)
    return runtime.desk


def build_runtime(scheduler: Any) -> FusionRuntime:
    """Make the runtime of a scheduler process; a fault turns fusion off."""
    config = FusionConfig.from_env()
    runner = scheduler.tp_worker.model_runner
    collector = getattr(scheduler, "metrics_collector", None)
    enabled = bool(getattr(scheduler.server_args, "enable_metrics", False))
    metrics = FusionMetrics(
        export=enabled and collector is not None,
        labels=getattr(collector, "labels", None),
    )
    group, form = _rank_group(), None
    reason = refuse_engine(scheduler.server_args) or refuse_settings(scheduler.server_args)
    facts = None
    reason = reason or refuse_tree(scheduler.tree_cache)
    if reason is None and not scheduler.is_generation:
        reason = "the model does not generate"
    if reason is None:
        try:
            facts = read_model(runner, tp_rank=group.rank, tp_size=group.size)
        except UnsupportedModelError as error:
            reason = str(error)
        except Exception as error:
            logger.exception("Reading the model for fusion failed")
            reason = f"{type(error).__name__}: {error}"
    if facts is not None:
        reason = _refuse_named(config, runner.token_to_kv_pool.get_key_buffer(0).device)
        form = _record_form(facts, runner.token_to_kv_pool)
    text = ""
    try:
        text = read_passage(config.passage_file)
    except EngineError as error:
        reason = reason or str(error)
    runtime = FusionRuntime(config, facts, off_reason=reason or "", group=group, metrics=metrics)
    runtime.record_form = form
    runtime.max_prompt = int(scheduler.max_req_input_len)
    runtime.page_size = int(scheduler.token_to_kv_pool_allocator.page_size)
    runtime.mixes_decoding = bool(scheduler.is_mixed_chunk)
    tokenizer, length = getattr(scheduler, "tokenizer", None), config.passage_tokens
    runtime.passage = passage_ids(tokenizer, length, runtime.max_prompt, text=text)
    runtime.plain_passage = runtime.passage
    if config.passage_file:
        runtime.passage_text = text
        runtime.plain_passage = passage_ids(tokenizer, length, runtime.max_prompt)
    default = FusionRequest(attention=config.attention).make_attention()
    if facts is not None and default is not None:
        is_useless(runtime, default)  # said now, not with the first request
    if runtime.off_reason:
        logger.warning("Chunk-KV fusion is off for this engine: %s", runtime.off_reason)
    else:
        assert facts is not None
        logger.info(
            "Chunk-KV fusion is on: %d layers, %d KV heads of %d, weights %s, policy %s",
            facts.num_layers,
            facts.num_kv_heads,
            facts.head_dim,
            facts.fingerprint[:12],
            config.policy,
        )
    return runtime


def _record_form(facts: ModelFacts, pool: Any) -> RecordForm:
    """Shapes of this rank's records, as its layout would make them of a slot."""
    slot = torch.zeros(1, dtype=torch.int64, device=pool.get_key_buffer(0).device)
    return RecordForm(facts.layout.name, *facts.layout.gather(pool, facts.num_layers, slot))


def _refuse_named(config: FusionConfig, device: torch.device) -> str | None:
    """Reason why what the settings name, perhaps of another distribution, cannot be used on a device, or None."""
    try:
        choose_kernel(config.attention_kernel, device)
        TIERS.get(config.tier)
    except ValueError as error:
        return str(error)
    return None


def _rank_group() -> RankGroup:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return RankGroup(parallel.tp_group if parallel.tp_size > 1 else None)

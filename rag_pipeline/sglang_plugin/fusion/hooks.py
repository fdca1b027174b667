"""Every SGLang internal that fusion hooks, in one table with the function that goes there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rag_pipeline.sglang_plugin.fusion import startup
from rag_pipeline.sglang_plugin.fusion.admission import admit as admission
from rag_pipeline.sglang_plugin.fusion.admission import next_batch
from rag_pipeline.sglang_plugin.fusion.admission import prefill_adder as batching
from rag_pipeline.sglang_plugin.fusion.admission import radix_tree as radix
from rag_pipeline.sglang_plugin.fusion.builds import idle as background
from rag_pipeline.sglang_plugin.fusion.builds import persistence
from rag_pipeline.sglang_plugin.fusion.forward import layer_pass as attention
from rag_pipeline.sglang_plugin.fusion.forward import model_forward as forward
from rag_pipeline.sglang_plugin.fusion.forward import report as usage
from rag_pipeline.sglang_plugin.fusion.forward import row_operations as rows
from rag_pipeline.sglang_plugin.fusion.request import internal as internal_requests
from rag_pipeline.sglang_plugin.fusion.request import validation
from rag_pipeline.sglang_plugin.fusion.runtime import weight_updates
from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_hooks, add_targets
from rag_pipeline.sglang_plugin.internals import INTERNALS

_SRT = "sglang.srt."
_TOKENIZER = _SRT + "managers.tokenizer_manager.TokenizerManager."
_SCHEDULER = _SRT + "managers.scheduler.Scheduler."
_ADDER = _SRT + "managers.schedule_policy.PrefillAdder."
_WEIGHTS = _SRT + "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_STREAMER = _SRT + "managers.scheduler_components.output_streamer.SchedulerOutputStreamer."


def _row(
    path: str, kind: str, why: str, hook: Callable[..., Any], *params: str
) -> tuple[HookTarget, Callable[..., Any]]:
    return HookTarget(path=path, kind=kind, why=why, params=params), hook


def hook_rows() -> list[tuple[HookTarget, Callable[..., Any]]]:
    """Targets and hooks; importing this module imports torch but no part of SGLang."""
    return [
        _row(
            _TOKENIZER + "_create_tokenized_object",
            "after",
            "malformed spans become HTTP 400 before a scheduler sees them",
            validation.after_tokenize,
            "obj",
            "input_ids",
        ),
        _row(
            _TOKENIZER + "update_request_meta_info",
            "around",
            "the usage report of a response is one dict, absent where there is none",
            usage.around_update_meta_info,
            "meta_info",
            "state",
            "customized_info",
            "index",
            "finish_reason",
        ),
        _row(
            _TOKENIZER + "_coalesce_streaming_chunks",
            "after",
            "the usage report stays one dict when streamed messages are joined",
            usage.after_coalesce,
            "out_list",
        ),
        _row(
            _SCHEDULER + "__init__",
            "after",
            "build the runtime when model and pools exist",
            startup.after_scheduler_init,
        ),
        _row(
            _SRT + "managers.schedule_batch.Req.__init__",
            "after",
            "hang fusion's state on a request",
            admission.after_req_init,
            "kv_hints",
            "sampling_params",
            "extra_key",
            "cache_salt",
        ),
        _row(
            _ADDER + "add_one_req",
            "around",
            "match, lease, and charge only rows that will be computed",
            batching.around_add_one_req,
            "req",
        ),
        _row(
            _ADDER + "add_chunked_req",
            "around",
            "charge the next piece of a long prompt by its computed rows",
            batching.around_add_chunked_req,
            "req",
        ),
        _row(
            _SRT + "mem_cache.common.release_kv_cache",
            "after",
            "a finished, aborted or retracted request gives its leases back",
            admission.after_release,
            "req",
        ),
        _row(
            _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.match_prefix",
            "around",
            "KV of an attention method is found in whole blocks of rows",
            radix.around_match_prefix,
            "params",
        ),
        _row(
            _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint",
            "around",
            "fused KV never enters the exact namespace",
            radix.around_checkpoint,
            "req",
            "up_to",
        ),
        _row(
            _SRT + "model_executor.forward_batch_info.ForwardBatch.init_new",
            "after",
            "the last place where a batch's requests are visible",
            forward.after_init_new,
            "batch",
            "model_runner",
        ),
        _row(
            _SRT + "model_executor.model_runner.ModelRunner.forward",
            "around",
            "probing passes, the smaller batch, capture",
            forward.around_model_forward,
            "forward_batch",
        ),
        _row(
            _SRT + "layers.radix_attention.RadixAttention.forward",
            "around",
            "load, write and attend by position in fused batches",
            attention.around_radix_attention,
            "q",
            "k",
            "v",
            "forward_batch",
            "save_kv_cache",
        ),
        _row(
            _SRT + "layers.layernorm.RMSNorm.forward_native",
            "around",
            "norms of a fused pass on a CPU, one call each",
            rows.around_norm,
            "x",
            "residual",
            "post_residual_addition",
        ),
        _row(
            _SRT + "layers.rotary_embedding.base.RotaryEmbedding.forward_native",
            "around",
            "rotations of a fused pass on a CPU, one call each",
            rows.around_rotation,
            "positions",
            "query",
            "key",
            "offsets",
            "fused_set_kv_buffer_arg",
        ),
        _row(
            _SRT + "layers.activation.SiluAndMul.forward_native",
            "around",
            "gated units of a fused pass on a CPU, one call each",
            rows.around_gate,
            "x",
        ),
        _row(
            _SRT + "layers.quantization.unquant.UnquantizedLinearMethod.apply",
            "around",
            "products of a fused pass on a CPU, cut for few rows",
            rows.around_linear,
            "layer",
            "x",
            "bias",
        ),
        _row(
            _STREAMER + "is_request_level_customized_info_key",
            "around",
            "the usage report is sent once per request",
            usage.around_request_level_key,
            "key",
        ),
        _row(
            _STREAMER + "stream_output",
            "before",
            "requests that this process made for itself are answered to nobody",
            internal_requests.before_stream_output,
            "reqs",
        ),
        _row(
            _SCHEDULER + "flush_cache",
            "after",
            "an empty tree holds no KV of older weights",
            weight_updates.after_flush,
        ),
        _row(
            _SCHEDULER + "on_idle",
            "before",
            "missing chunks are computed when there is nothing else to do",
            background.before_idle,
        ),
        _row(
            _SCHEDULER + "get_next_batch_to_run",
            "before",
            "an engine that is never idle computes missing chunks too; the waiting queue says what is needed next",
            next_batch.before_next_batch,
            "running_batch",
        ),
        _row(
            _SRT + "managers.scheduler_components.idle_sleeper.IdleSleeper.maybe_sleep",
            "around",
            "an engine with --sleep-on-idle stays awake while chunks wait to be computed",
            background.around_idle_sleep,
        ),
        _row(
            _SRT
            + "managers.scheduler_components.internal_state.SchedulerInternalStateController."
            + "get_internal_state",
            "after",
            "state and counters of fusion in /server_info, and orders to its cache",
            startup.after_internal_state,
            "recv_req",
        ),
        _row(
            _SRT
            + "model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph",
            "around",
            "a fused batch has rows of its own and runs eagerly",
            attention.around_can_run_graph,
            "forward_batch",
        ),
        _row(
            _SCHEDULER + "release_host_resources",
            "before",
            "an engine that is stopped in order writes what waits for its tiers",
            persistence.before_release,
        ),
        *(
            _row(
                _WEIGHTS + name,
                "around",
                "chunk KV of other weights must not be found, nor stored as that of these",
                weight_updates.around_update,
            )
            for name in (
                "update_weights_from_disk",
                "update_weights_from_distributed",
                "update_weights_from_tensor",
                "update_weights_from_ipc",
                "begin_weight_update",
                "end_weight_update",
                "release_memory_occupation",
                "resume_memory_occupation",
            )
        ),
    ]


def register_hooks() -> None:
    """Add the rows to the project's hook table and register the hooks with SGLang."""
    # Importing the model runner makes SGLang call the platform, which checks the table so far: a row about
    # a module that is half imported would be called missing. So it is imported before ours are added.
    import sglang.srt.model_executor.model_runner  # noqa: F401

    add_hooks(hook_rows())
    add_targets(INTERNALS)

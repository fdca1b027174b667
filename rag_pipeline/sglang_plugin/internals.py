"""SGLang internals that are called or read, not hooked: rows of the hook table, so that a release that lost one is refused.

A test compares these rows with the sources of this package: what is imported from SGLang, and what is read of its objects.
"""

from __future__ import annotations

from rag_pipeline.sglang_plugin.hook_table import HookTarget

_SRT = "sglang.srt."


def _row(path: str, why: str, *params: str, has: str = "") -> HookTarget:
    return HookTarget(
        path=_SRT + path, kind="uses", why=why, params=params, attributes=tuple(has.split())
    )


_SCHEDULER = "managers.scheduler.Scheduler"
_RUNNER = "model_executor.model_runner.ModelRunner"

INTERNALS = (
    # -- the scheduler's turn, as the self-check takes it, and requests of our own
    _row(
        _SCHEDULER,
        "its state, and where its parts are",
        has="enable_overlap is_generation is_mixed_chunk last_batch max_req_input_len metrics_collector model_config "
        "running_batch server_args token_to_kv_pool_allocator tokenizer tp_worker waiting_queue chunked_req tree_cache",
    ),
    _row(f"{_SCHEDULER}.handle_generate_request", "queue a request of our own", "recv_req"),
    _row(
        f"{_SCHEDULER}.get_next_batch_to_run",
        "one turn of the loop in the self-check",
        "running_batch",
        "last_batch",
    ),
    _row(f"{_SCHEDULER}.run_batch", "as above", "batch"),
    _row(f"{_SCHEDULER}.launch_batch_sample_if_needed", "as above", "batch_result", "cur_batch"),
    _row(f"{_SCHEDULER}.process_batch_result", "as above", "batch", "result"),
    _row(f"{_SCHEDULER}.flush_cache", "the self-check leaves nothing behind"),
    _row(f"{_SCHEDULER}.is_fully_idle", "background builds wait for idleness"),
    _row(f"{_SCHEDULER}.collect_inflight_reqs", "chunk builds that are under way are counted"),
    _row("managers.tp_worker.TpModelWorker", "the way to the model runner", has="model_runner"),
    _row(
        "managers.io_struct.TokenizedGenerateReqInput",
        "a request of our own",
        *[
            "rid",
            "input_text",
            "input_ids",
            "input_embeds",
            "mm_inputs",
            "token_type_ids",
            "sampling_params",
        ],
        *["return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob", "stream"],
        *["extra_key", "cache_salt"],
    ),
    _row(
        "sampling.sampling_params.SamplingParams",
        "its parameters, and those of clients",
        *["temperature", "max_new_tokens", "ignore_eos", "custom_params"],
        has="custom_params max_new_tokens normalize",
    ),
    _row(
        "managers.schedule_batch.Req",
        "what a request wants, where it stands, and what it gets",
        has="beam_group cache_salt customized_info decision_layout extend_end extra_key finished finished_output finished_reason "
        "full_untruncated_fill_ids input_embeds is_dllm kv kv_hints logprob logprob_start_len lora_id "
        "multi_item_delimiter_indices multimodal_inputs origin_input_ids origin_input_ids_unpadded "
        "output_ids_through_stop positional_embed_overrides prefix_len return_hidden_states return_indexer_topk "
        "return_logprob return_pooled_hidden_states return_routed_experts return_sampling_mask rid sampling_params session token_indices_to_pool token_type_ids",
    ),
    _row(
        "managers.schedule_batch.ReqKvInfo",
        "slots of a request",
        has="cache_protected_len req_pool_idx",
    ),
    _row("managers.schedule_batch.ScheduleBatch", "requests of a batch", has="is_empty reqs"),
    _row("managers.schedule_batch.FINISH_ABORT", "turns of aborted requests are not kept"),
    _row(
        "managers.schedule_policy.PrefillAdder",
        "budgets count rows that are computed",
        has="budget_state can_run_list rem_chunk_tokens rem_input_tokens running_batch",
    ),
    _row(
        "managers.schedule_policy.AddReqResult",
        "a request that must wait is told so",
        has="CONTINUE OTHER",
    ),
    # -- the forward
    _row(
        _RUNNER,
        "the model and its pools",
        has="attn_backend dtype lora_manager model model_config req_to_token_pool token_to_kv_pool token_to_kv_pool_allocator "
        "decode_attention_backend_str prefill_attention_backend_str server_args use_mla_backend",
    ),
    _row(f"{_RUNNER}._forward_raw", "probing passes", "forward_batch", "pp_proxy_tensors"),
    _row(
        "configs.model_config.ModelConfig",
        "limits and architecture",
        has="context_len hf_config is_multimodal model_path vocab_size",
    ),
    _row(
        "model_executor.forward_batch_info.ForwardBatch",
        "rows and lengths of a batch, replaced in a fused one",
        has="batch_size extend_input_logprob_token_ids_gpu extend_logprob_start_lens_cpu extend_num_tokens "
        "extend_prefix_lens extend_prefix_lens_cpu extend_seq_lens extend_seq_lens_cpu extend_start_loc forward_mode "
        "global_num_token_non_padded global_num_token_non_padded_cpu input_ids lora_ids mm_inputs "
        "model_specific_states orig_seq_lens out_cache_loc positions req_pool_indices req_pool_indices_cpu "
        "return_logprob rids seq_lens seq_lens_cpu seq_lens_sum spec_info token_ids_logprobs top_logprobs_nums",
    ),
    _row(
        "model_executor.forward_batch_info.ForwardMode",
        "which batches may be fused",
        has="is_decode is_draft_extend_v2 is_extend is_extend_without_speculative is_idle is_target_verify",
    ),
    _row("model_executor.forward_context.get_token_to_kv_pool", "the pool that a layer writes"),
    _row(
        "layers.radix_attention.RadixAttention",
        "shapes and scales of a layer",
        has="attn_type is_cross_attention k_scale layer_id logit_cap logit_capping_method qk_head_dim scaling sliding_window_size "
        "tp_k_head_num tp_q_head_num tp_v_head_num v_head_dim v_scale",
    ),
    _row("layers.radix_attention.AttentionType", "which layers are causal", has="DECODER"),
    # -- memory
    _row("mem_cache.base_prefix_cache.MatchPrefixParams", "what the tree holds of a prompt", "key"),
    _row(
        "mem_cache.base_prefix_cache.MatchResult",
        "as above",
        has="device_prefix_len host_hit_length",
    ),
    _row("mem_cache.radix_cache.RadixKey", "as above", "token_ids", "extra_key", "cache_salt"),
    _row("mem_cache.memory_pool.ReqToTokenPool", "slots by position", has="req_to_token"),
    _row(
        "mem_cache.memory_pool.MHATokenToKVPool",
        "chunk KV is read and written here",
        has="dtype get_key_buffer get_value_buffer set_kv_buffer store_dtype",
    ),
    *(
        _row(
            f"mem_cache.allocator.{allocator}",
            "free slots are borrowed for the draft's pass, and counted",
            has="available_size get_all_free_pages get_kvcache page_size size",
        )
        for allocator in ("token.TokenToKVPoolAllocator", "paged.PagedTokenToKVPoolAllocator")
    ),
    _row("mem_cache.memory_pool.KVWriteLoc", "the CPU backend writes through it"),
    _row(
        "mem_cache.swa_memory_pool.SWAKVPool",
        "the CPU backend serves sliding windows too",
        has="layers_mapping swa_layer_nums translate_loc_from_full_to_swa",
    ),
    # -- processes and settings
    _row("runtime_context.get_parallel", "tensor-parallel ranks"),
    _row(
        "layers.attention.attention_registry.ATTENTION_BACKENDS", "the CPU backend is one of them"
    ),
    _row("layers.attention.attention_registry.register_attention_backend", "as above"),
    _row("layers.attention.base_attn_backend.AttentionBackend", "its base class"),
    _row(
        "plugins.hook_registry.HookRegistry",
        "hooks are registered, applied and proved by it",
        has="_hooks _patched apply_hooks register",
    ),
    _row("plugins.hook_registry.HookType", "kinds of hooks", has="AFTER AROUND BEFORE"),
    _row("plugins.load_plugins", "the launcher loads plugins before it reads flags"),
)
"""What every process of SGLang has loaded anyway when the plugin is registered."""

LAUNCHING = (
    _row("platforms.current_platform", "which platform really runs"),
    _row("platforms.cpu.CpuDeviceMixin", "base of the CPU platform"),
    _row("platforms.device_mixin.PlatformEnum", "as above"),
    _row("platforms.interface.PlatformCapabilities", "as above"),
    _row("platforms.interface.SRTPlatform", "as above"),
    _row("arg_groups.choices", "the CPU backend is an allowed word"),
    _row("mem_cache.allocation", "the CPU platform's own allocation"),
    _row(
        "entrypoints.engine.Engine",
        "how children are started, and ended",
        has="get_all_child_pids shutdown",
    ),
    _row("entrypoints.http_server.app", "the routes are added to it"),
    _row("entrypoints.http_server.get_global_state", "the tokenizer manager of this process"),
    _row("entrypoints.http_server.launch_server", "SGLang's own server"),
    _row("managers.detokenizer_manager", "imported once for both children"),
    _row("managers.scheduler", "as above"),
    _row("models.registry", "as above"),
    _row("managers.io_struct.GenerateReqInput", "requests of the RAG routes"),
    _row("managers.io_struct.GetInternalStateReq", "orders to the chunk cache", has="rid"),
    _row(
        "managers.tokenizer_manager.TokenizerManager",
        "requests of the RAG routes, and their end",
        has="abort_request allow_auto_truncate auto_create_handle_loop context_len event_loop generate_request "
        "get_internal_state get_internal_state_communicator max_req_input_len num_reserved_tokens "
        "validate_total_tokens _dispatch_to_scheduler _subprocess_watchdog",
    ),
    _row("managers.io_struct.ShutdownReq", "schedulers are asked to end before they are killed"),
    _row("utils.cudacore_pyspy_dump_utils.collect_scheduler_processes", "and waited for"),
    _row("server_args.ServerArgs", "settings of an engine"),
    _row("server_args.prepare_server_args", "SGLang's own parser"),
    _row("utils.auth.AuthDecision", "one key for each tenant"),
    _row("utils.auth.AuthLevel", "as above"),
    _row("utils.kill_process_tree", "children end with the engine"),
)
"""What only the process that launches an engine uses; it imports these when it does, and says so where one is gone."""

HICACHE = (
    _row(
        "mem_cache.storage.StorageBackendFactory",
        "storage backends by name",
        has="_registry create_backend",
    ),
    _row(
        "mem_cache.hicache_storage.HiCacheStorageConfig",
        "what a backend is told",
        *["tp_rank", "tp_size", "pp_rank", "pp_size", "attn_cp_rank", "attn_cp_size"],
        *["is_mla_model", "enable_storage_metrics", "is_page_first_layout", "model_name"],
        "extra_config",
    ),
    _row(
        "mem_cache.hicache_storage.HiCacheStorage",
        "pages in and out",
        has="batch_get batch_get_v1 batch_set batch_set_v1 register_mem_pool_host",
    ),
    _row(
        "mem_cache.hicache_storage.HiCacheFile",
        "pages are deleted",
        has="_get_suffixed_key file_path",
    ),
    _row(
        "mem_cache.storage.mooncake_store.mooncake_store.MooncakeStore",
        "pages are deleted",
        has="_tag_keys mla_suffix store",
    ),
)
"""What an engine with a remote tier ``hicache+...`` uses; checked when that is opened."""

QUANTISED = (
    _row(
        "layers.linear.LinearBase",
        "a layer of each kind of quantised weights is tried",
        has="input_size quant_method",
    ),
    _row(
        "layers.moe.fused_moe_triton.FusedMoE",
        "experts are known by their class",
    ),
)
"""What a scheduler has loaded with its model."""

SPECULATING = (
    _row("speculative.eagle_utils", "kernels around drafted tokens are replaced"),
    _row("speculative.spec_utils", "as above"),
    _row("mem_cache.memory_pool", "as above"),
    _row("speculative.ngram_worker.NGRAMWorker", "the worker that drafts"),
    _row(
        "speculative.ngram_info.NgramVerifyInput",
        "trees of drafts, for the CPU backend",
        *["custom_mask", "draft_token_num"],
    ),
)
"""What an engine on a CPU uses for NGRAM speculation."""

"""Where a fused forward makes the host wait for a GPU: once before it writes anything, and once per choice of rows.

The forward is the real one, over tensors that pretend to be on a GPU (:mod:`pretend_gpu`); kernels compute nothing.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from pretend_gpu import GPU, GpuTensor, pretend_gpu
from store_writing import CONTEXT

from chunk_cache import ChunkKey, ChunkKV, Match, layout_named
from chunk_cache.policies import create_policy
from rag_kernels import ATTENTION_METHODS, RotarySpec, create_attention_method
from rag_kernels.attention.choice import kernel_named
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.forward.fused_forward import FusedForward
from rag_pipeline.sglang_plugin.fusion.forward.fused_item import BatchEntry
from rag_pipeline.sglang_plugin.fusion.forward.plan import Piece
from rag_pipeline.sglang_plugin.fusion.request.holdings import LeasedSpan
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.model_facts import ModelFacts
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime

LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 5, 4, 2, 64, 50
DTYPE = torch.bfloat16
PREFIX, CHUNK, CHUNKS, QUESTION = 8, 300, 2, 40
PROMPT = PREFIX + CHUNK * CHUNKS + QUESTION


class NoKernel:
    """In the place of a Triton kernel: launched, it does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


class PagedWrapper:
    """In the place of FlashInfer's: copies what it is planned with as that does, and computes nothing."""

    planned = 0

    def __init__(self, workspace, layout, **options):
        self._device = workspace.device

    def plan(self, qo, kv, indices, last, *sizes, **options):
        for table in (qo, kv, last):
            table.to("cpu")
        for table in (qo, kv, indices, last):
            table.to(self._device, non_blocking=True)
        PagedWrapper.planned += 1

    def run(self, q, pools, *positions):
        return torch.empty_like(q)


class Runner:
    """What a fused forward uses of SGLang's model runner, all of it on the GPU."""

    def __init__(self, gpu, requests):
        size = requests * PROMPT + 65
        table = torch.randperm(size - 1)[: requests * PROMPT].view(requests, PROMPT) + 1
        used = torch.zeros(size, dtype=torch.bool)
        used[table] = True
        free = (~used).nonzero().flatten()[1:]
        self.gpu = gpu
        self.pools = [
            [gpu.put(torch.zeros(size, KV_HEADS, DIM, dtype=DTYPE)) for _ in range(2)]
            for _ in range(LAYERS)
        ]
        self.req_to_token_pool = types.SimpleNamespace(req_to_token=gpu.put(table.to(torch.int32)))
        self.token_to_kv_pool = types.SimpleNamespace(
            get_key_buffer=lambda layer: self.pools[layer][0],
            get_value_buffer=lambda layer: self.pools[layer][1],
        )
        self.token_to_kv_pool_allocator = types.SimpleNamespace(
            page_size=1, get_all_free_pages=lambda: gpu.put(free)
        )
        self.model_config = types.SimpleNamespace(context_len=8192)
        self.lora_manager = None
        self.dtype = DTYPE
        self.layers = [
            types.SimpleNamespace(
                layer_id=index,
                tp_q_head_num=HEADS,
                tp_k_head_num=KV_HEADS,
                tp_v_head_num=KV_HEADS,
                qk_head_dim=DIM,
                v_head_dim=DIM,
            )
            for index in range(LAYERS)
        ]

    def run(self, fused):
        """Every layer's attention over random activations."""
        rows = fused.attention.num_rows
        for layer in self.layers:
            q, k, v = (
                self.gpu.put(torch.randn(rows, heads * DIM).to(DTYPE))
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            fused.run_layer(layer, self.token_to_kv_pool, q, k, v)

    def _forward_raw(self, view, proxies):
        (fused,) = (view.model_specific_states or {}).values()
        self.run(fused)
        logits = self.gpu.put(torch.randn(int(view.batch_size), VOCAB))
        return types.SimpleNamespace(logits_output=types.SimpleNamespace(next_token_logits=logits))


def make_runtime(kernel, layers):
    facts = ModelFacts(
        layers=tuple(layers),
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        scaling=DIM**-0.5,
        rotary=RotarySpec.from_inv_freq(10000.0 ** -(torch.arange(0, DIM, 2) / DIM)),
        layout=layout_named("heads"),
        fingerprint="w",
        context_fields={},
        qkv_share=0.16,
    )
    runtime = FusionRuntime(FusionConfig(attention_kernel=kernel), None)
    runtime.facts = facts
    return runtime


def make_state(policy, method):
    ids = np.random.default_rng(1).integers(2, VOCAB, PROMPT)
    spans = []
    for number in range(CHUNKS):
        start = PREFIX + number * CHUNK
        chunk = ids[start : start + CHUNK].astype(np.int32)
        shape = (LAYERS, CHUNK, KV_HEADS, DIM)
        record = ChunkKV(
            key=ChunkKey.of(CONTEXT, chunk),
            token_ids=chunk,
            base_position=5,
            k=torch.randn(shape).to(DTYPE).pin_memory(),
            v=torch.randn(shape).to(DTYPE).pin_memory(),
        )
        spans.append(
            LeasedSpan(
                match=Match(start, start + CHUNK, record.key),
                lease=types.SimpleNamespace(record=record, release=lambda: None),
            )
        )
    request = FusionRequest(spans=tuple((span.start, span.end) for span in spans))
    state = RequestState(request, policy, ids)
    state.begin_attempt(PREFIX, 0)
    state.lease(spans)
    state.resolve()
    if method:
        state._found.method = create_attention_method(method + METHOD_OPTIONS.get(method, ""))
    return state


def make_batch(gpu, requests):
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    length = PROMPT - PREFIX
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=requests,
        input_ids=gpu.put(torch.randint(2, VOCAB, (requests * length,))),
        req_pool_indices=gpu.put(torch.arange(requests)),
        seq_lens=gpu.put(torch.full((requests,), PROMPT)),
        out_cache_loc=gpu.put(torch.zeros(requests * length, dtype=torch.int64)),
        seq_lens_sum=requests * PROMPT,
        seq_lens_cpu=torch.full((requests,), PROMPT),
        orig_seq_lens=gpu.put(torch.full((requests,), PROMPT)),
        positions=gpu.put(torch.arange(PREFIX, PROMPT).repeat(requests)),
        extend_prefix_lens_cpu=[PREFIX] * requests,
        extend_seq_lens_cpu=[length] * requests,
        global_num_token_non_padded=gpu.put(torch.tensor(requests * length)),
        global_num_token_non_padded_cpu=requests * length,
    )


def forward(monkeypatch, policy, requests=2, method="", kernel="triton"):
    """Run a forward; the waits of the host."""
    from rag_kernels import load_triton, mass_triton, shift_triton
    from rag_kernels.attention import triton as attention

    for module, name in (
        (attention, "position_causal_kernel"),
        (load_triton, "load_spans_kernel"),
        (mass_triton, "mass_statistics_kernel"),
        (mass_triton, "mass_kernel"),
        (shift_triton, "chunk_shift_kernel"),
        (shift_triton, "add_shift_kernel"),
    ):
        monkeypatch.setattr(module, name, NoKernel())
    flashinfer = types.SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=PagedWrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    torch.manual_seed(0)
    with pretend_gpu() as gpu:
        runner, batch = Runner(gpu, requests), make_batch(gpu, requests)
        runtime = make_runtime(kernel, runner.layers)
        entries = []
        for index in range(requests - 1):  # the last one is ordinary
            name, *options = policy.split(",")
            given = {key: int(value) for key, value in (one.split("=") for one in options)}
            state = make_state(create_policy(name, **given), method)
            req = types.SimpleNamespace(
                full_untruncated_fill_ids=state.prompt.tolist(),
                kv=types.SimpleNamespace(cache_protected_len=PREFIX),
            )
            piece = Piece(start=PREFIX, end=PROMPT, is_last=True)
            entries.append(BatchEntry(index=index, req=req, state=state, piece=piece))
        view, fused = FusedForward(runtime, runner, batch, entries).prepare()
        runner.run(fused)
        assert isinstance(view.positions, GpuTensor)
        assert view.positions.device == GPU
        return gpu.waits, view.extend_seq_lens_cpu[0]


METHOD_OPTIONS = {
    # So that the method has something to choose in prompts as short as these.
    "sale": ":min_tokens=64+segment=64+local_window=64+thresholds=0.01",
}
LOOK = "write_guard.py"
CHOICE = "host_copy.py"


@pytest.mark.parametrize("method", ["", *ATTENTION_METHODS.names()])
@pytest.mark.parametrize("policy", ["reuse", "epic:0.2"])
def test_without_a_signal_the_host_waits_once(policy, method, monkeypatch):
    waits, rows = forward(monkeypatch, policy, 3, method)
    assert (rows > QUESTION) == (policy != "reuse")
    assert len(waits) == 1, waits
    assert LOOK in waits[0]


def test_each_choice_of_rows_is_one_wait_whatever_the_number_of_requests(monkeypatch):
    for policy, choices in (
        ("query:0.3,draft_tokens=0", 1),
        ("query:0.3", 2),
        ("cacheblend:0.9", 3),
    ):
        for requests in (2, 4):
            waits, rows = forward(monkeypatch, policy, requests)
            assert rows > QUESTION
            assert [line.split(":")[0].split("/")[-1] for line in waits] == [
                LOOK,
                *[CHOICE] * choices,
            ], waits


@pytest.mark.parametrize("method", ["", "power:block=64+window=2+dense_layers=1"])
def test_flashinfer_is_planned_without_a_wait_once_per_pass_and_kind_of_layer(method, monkeypatch):
    monkeypatch.setattr(PagedWrapper, "planned", 0)
    kernel = kernel_named("flashinfer")
    monkeypatch.setattr(kernel, "_wrappers", {})
    waits, _ = forward(monkeypatch, "query:0.3,draft_tokens=0", 3, method, "flashinfer")
    assert len(waits) == 2, waits
    # Scattered rows of both passes, the ordinary request's run in the final one; with a method once more, for its mask.
    assert PagedWrapper.planned == 3 * (2 if method else 1)
    assert kernel.batch_faults == 0

"""SGLang's out-of-tree platform for a machine that has nothing but CPU cores."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from rag_pipeline.errors import EngineError
from rag_pipeline.sglang_plugin.cpu.backend_name import (
    ATTENTION_BACKEND,
    offer_attention_backend,
)
from rag_pipeline.sglang_plugin.cpu.detect import core_groups
from rag_pipeline.sglang_plugin.cpu.softcap import softcap_logits
from rag_pipeline.sglang_plugin.hook_table import HookTarget, add_targets

__all__ = ["RagCpuPlatform"]

NGRAM = "NGRAM"
logger = logging.getLogger(__name__)

_AS_FP16 = ("float32", "float16")
"""Types of checkpoints that SGLang serves in fp16."""
_LAST_LOC = "sglang.srt.mem_cache.allocation.get_last_loc"
_SOFTCAP = "sglang.kernels.ops.activation.softcap._softcap_logits"
_PARAMS = ("req_to_token", "req_pool_indices_tensor", "prefix_lens_tensor")
_TARGETS = (
    HookTarget(
        path=_LAST_LOC,
        kind="assigned",
        why="the last slot of a prefix without Triton, for pages above one token",
        params=_PARAMS,
    ),
    HookTarget(
        path="sglang.srt.mem_cache.allocation.get_last_loc_torch",
        kind="uses",
        why="what it is replaced by",
        params=_PARAMS,
    ),
    HookTarget(
        path=_SOFTCAP,
        kind="assigned",
        why="the cap on a model's output logits (Gemma 2) without Triton",
        params=("full_logits", "final_logit_softcapping", "output"),
    ),
)


def computes_bf16() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this CPU: AVX-512, AMX, or Arm with bf16.

    Without, torch falls back to plain loops: on an AVX2 machine they took a hundred times as long as fp32.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def checkpoint_dtype(model_path: str) -> str:
    """Name of the type that a model's folder says its weights have; empty where there is no such folder."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")
    except (OSError, ValueError, AttributeError):
        return ""


class RagCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """Real scheduler, radix tree and paged pools on any CPU; no AMX, no ``sgl_kernel`` needed.

    SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``) needs a special build of its kernels and
    AMX or Arm; this platform needs the wheels of PyPI only. It is out of tree (``PlatformEnum.OOT``),
    so every choice that SGLang keys on CUDA falls back to plain torch.
    """

    _enum = PlatformEnum.OOT
    device_name = "rag_cpu"
    # No Triton, no graphs: SGLang then takes its torch allocators and eager runners.
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        super().__init__()
        offer_attention_backend()

    def get_default_attention_backend(self) -> str:
        """Return ``rag_cpu``."""
        return ATTENTION_BACKEND

    def get_device(self, device_id: int = 0) -> Any:
        """Return the device's name; every rank computes on the same one."""
        # A name, not a torch.device: SGLang's argument resolution splits what it gets at ":".
        return "cpu"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """Return False: there is no device to pin memory for."""
        return False

    def get_torch_profiler_activity_str(self) -> str:
        """Return what ``/start_profile`` calls this device."""
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """Return what torch's profiler records here."""
        return torch.profiler.ProfilerActivity.CPU

    def get_dispatch_key_name(self) -> str:
        """Return ``native``: plain torch forwards of SGLang's fused operations."""
        return "native"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Choose the attention backend, the dtype and, for several ranks, the cores of each; refuse what cannot run here.

        SGLang has already filled in ``intel_amx`` where the user named no backend and the device
        is an x86 CPU; out of tree it cannot work, its kernels are not in the wheels of PyPI. (On
        Arm it fills in ``torch_native``, which a user may also have asked for, so there the name
        has to be given; :func:`rag_pipeline.sglang_plugin.create_engine` does.)

        ``dtype`` "auto" becomes fp32 where the CPU computes no bf16, and bf16 where SGLang would take fp16, that is for
        checkpoints of fp32 and fp16: CPUs emulate it, 65 times slower than bf16 as measured here. Speculation needs
        our backend: no other one that runs here masks the keys of a tree. Decode context parallelism is refused: no
        backend that runs here reads tokens that are dealt out over the ranks, and SGLang would only fail at the first
        prompt.

        SGLang refuses more ranks than NUMA nodes unless ``SGLANG_CPU_OMP_THREADS_BIND`` names the
        cores of each. With one rank the variable stays unset, because setting it also makes
        SGLang give up on reading the memory size.
        """
        if server_args.dcp_size > 1:
            raise EngineError(
                f"dcp_size {server_args.dcp_size}: decode context parallelism needs kernels that there are for GPUs "
                "only; start with dcp_size=1, tensor parallelism alone."
            )
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND
        algorithm, backend = server_args.speculative_algorithm, server_args.attention_backend
        if algorithm is not None and backend != ATTENTION_BACKEND:
            raise EngineError(
                f"attention_backend {backend!r} cannot attend over trees of drafted tokens on a CPU; take "
                f"{ATTENTION_BACKEND!r}, or start without speculative_algorithm."
            )
        if server_args.dtype == "auto" and not computes_bf16():
            server_args.dtype = "float32"
            logger.info("This CPU has no bf16 instructions: float32. --dtype bfloat16 forces bf16.")
        elif server_args.dtype == "auto" and checkpoint_dtype(server_args.model_path) in _AS_FP16:
            server_args.dtype = "bfloat16"
            logger.info(
                "This CPU computes bf16 much faster than fp16. --dtype float16 forces fp16."
            )
        ranks = int(server_args.tp_size) * int(server_args.pp_size) * int(server_args.dp_size)
        if ranks > 1:
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", core_groups(ranks))

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Whether an algorithm runs here: NGRAM, whose drafts need no model."""
        return algorithm == NGRAM

    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        """Return SGLang's NGRAM worker once what it calls on a GPU is replaced.

        Raises
        ------
        EngineError
            For any other algorithm: its draft model needs compiled kernels.
        """
        if algorithm != NGRAM:
            raise EngineError(
                f"speculative_algorithm {algorithm!r} needs kernels that there are for GPUs only; take 'NGRAM' or none."
            )
        from rag_pipeline.sglang_plugin.cpu.speculation import install

        return install()

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        """Return what finds the slots of drafted tokens."""
        from rag_pipeline.sglang_plugin.cpu.speculation import cache_locs

        return cache_locs

    def init_backend(self) -> None:
        """Register the attention backend in the worker (called once there by SGLang)."""
        from sglang.kernels.ops.activation import softcap
        from sglang.srt.mem_cache import allocation

        from rag_pipeline.sglang_plugin.cpu.attention_backend import register_backend
        from rag_pipeline.sglang_plugin.cpu.mla import rotate_without_yarn
        from rag_pipeline.sglang_plugin.hook_table import fail_hard, verify_targets

        with fail_hard():
            add_targets(_TARGETS)
            verify_targets(_TARGETS)
            register_backend()
            rotate_without_yarn()
            # SGLang takes the torch variant for its own CPU backend by *name* and a Triton kernel
            # for any other, in spite of capabilities.supports_triton (pages above one token). Set
            # by hand: this runs inside an import, where HookRegistry could not apply other hooks.
            allocation.get_last_loc = allocation.get_last_loc_torch
            softcap._softcap_logits = softcap_logits

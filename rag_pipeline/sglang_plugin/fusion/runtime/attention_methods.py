"""The attention method of a request, for the weights that this process has loaded."""

from __future__ import annotations

import functools
from pathlib import Path

from rag_kernels import AttentionMethod
from rag_pipeline.errors import ModelError
from rag_pipeline.models.fingerprint import fingerprint_checkpoint
from rag_pipeline.protocol import FusionRequest
from rag_pipeline.sglang_plugin.fusion.runtime.layer_rules import rules_of
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime


def method_for_weights(runtime: FusionRuntime, request: FusionRequest) -> AttentionMethod | None:
    """Make the method that a request names; None for dense attention.

    A method that was calibrated for other weights, or that the model's layers make useless, reads everything, which
    is said once.
    """
    method = request.make_attention()
    if method is None or runtime.facts is None:
        return method
    if is_useless(runtime, method):
        return None
    folder = (
        "" if runtime.epoch else runtime.facts.model_path
    )  # updated weights are no checkpoint's
    try:
        return _for_checkpoint(method, folder)
    except ValueError as error:
        runtime.say_once(f"attention {method.identity}", "Prompts read every key: %s", error)
        return None


def is_useless(runtime: FusionRuntime, method: AttentionMethod) -> bool:
    """Whether a method has no business with the loaded model's layers, or cannot say; why is said once."""
    assert runtime.facts is not None
    reason: str | None
    try:
        reason = method.refuse_layers([rules_of(layer) for layer in runtime.facts.layers])
    except Exception as error:  # the method may be another distribution's
        runtime.say_fault(f"attention method {method.name} on layers", error)
        reason = f"it failed on the model's layers: {type(error).__name__}: {error}"
    if reason is None:
        return False
    runtime.say_once(
        f"attention {method.name}",
        "Prompts read every key: attention method %r does nothing for this model, %s; "
        "choose another one, or none",
        method.name,
        reason,
    )
    return True


@functools.lru_cache(maxsize=256)
def _for_checkpoint(method: AttentionMethod, folder: str) -> AttentionMethod:
    return method.for_model(_fingerprint(folder) if folder else "")


@functools.lru_cache(maxsize=8)
def _fingerprint(folder: str) -> str:
    try:
        return fingerprint_checkpoint(Path(folder))
    except ModelError:  # weights of another format
        return ""

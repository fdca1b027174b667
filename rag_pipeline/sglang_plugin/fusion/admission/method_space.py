"""Where the radix tree keeps what an attention method computed: a namespace of its own, never the exact one.

What one method computed for a prefix is right for every later prompt of that method that begins alike, where the rows of
a prefix do not depend on what follows. That holds for whole units of a method only
(:attr:`rag_kernels.AttentionMethod.prefix_unit`), and the tree cuts at multiples of its pages: what is found there, and
what is published, is cut to whole units (``radix_tree.py``). So requests of a method that name no chunks and no conversation match and publish in the method's space of
their tenant. Its name holds the method with every option, what it was calibrated to, and the epoch of the weights.

Nothing else is published there: a request that reads every key after all, be it by a fault, stops publishing. Decoded
tokens are published where decoding is part of the method (``acts_on_decode``) and was done by it; a method that
leaves decoding dense publishes the prompt alone.
"""

from __future__ import annotations

from typing import Any

from rag_pipeline.sglang_plugin.fusion.request.consent import refuse_asked
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace, method_space
from rag_pipeline.sglang_plugin.fusion.request.state import RequestState
from rag_pipeline.sglang_plugin.fusion.runtime.attention_methods import method_for_weights
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime
from rag_pipeline.sglang_plugin.fusion.runtime.support import refuse_request


def tenant_of(req: Any, state: RequestState) -> RadixNamespace:
    """Namespace of a request's chunks: the client's own."""
    return RadixNamespace(req.extra_key, req.cache_salt).moved(state.space, "")


def enter_space(runtime: FusionRuntime, req: Any, state: RequestState) -> bool:
    """Put a request that has no KV yet into the space that it is to be matched in now.

    Parameters
    ----------
    runtime : FusionRuntime
        Of this process.
    req : Req
        Its ``extra_key`` is changed.
    state : RequestState
        Of the request; its ``space`` is changed.

    Returns
    -------
    bool
        Whether it stood in another one, so that a match that was made is not its own. All ranks say the same.
    """
    before, (space, unit) = state.space, _space(runtime, req, state)
    if space == before:
        return False
    req.extra_key = RadixNamespace(req.extra_key, req.cache_salt).moved(before, space).extra_key
    state.enter(space, unit)
    return True


def _space(runtime: FusionRuntime, req: Any, state: RequestState) -> tuple[str, int]:
    request = state.request
    if request.is_dense or request.spans or request.conversation:
        return "", 1
    if not runtime.is_on or refuse_asked(request, req) or refuse_request(req):
        return "", 1
    method = method_for_weights(runtime, request)
    if method is None:
        return "", 1
    if not method.prefix_unit:
        runtime.say_once(
            f"prefix {method.name}",
            "Prompts of the attention method %s share no prefixes: which keys its rows read depends on what follows.",
            method.name,
        )
        return "", 1
    return method_space(method.identity, runtime.epoch), method.prefix_unit

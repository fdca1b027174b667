"""What a key protects: every route of SGLang 0.5.23 and of this project, by what opens it.

docs/security.md shows the same lists, and a test compares both with the routes of the real app: a new route of
SGLang fails it until somebody has decided. Until then it is the operator's: what stands in no list is closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from starlette.routing import compile_path


class Access(Enum):
    """What opens a route on a server with a key."""

    OPEN = "open"
    """Nothing is needed: the page's own files, and probes that say only whether the server is up."""

    TENANT = "tenant"
    """Any key. What comes back is the caller's own."""

    OPERATOR = "operator"
    """The operator's key."""

    ADMIN = "admin"
    """The administrator's key where one is set, else the operator's."""


_PATHS: dict[Access, str] = {
    Access.OPEN: """
        /rag /rag/rag.css /rag/rag.js /rag/api.js /rag/ask.js /rag/cache.js /rag/documents.js /rag/dom.js /rag/strip.js
        /health /health_generate /ready /ping
    """,
    Access.TENANT: """
        /v1/rag/chat/completions /v1/rag/search /v1/rag/documents /v1/rag/documents/{document_id:path}
        /v1/rag/jobs/{job_id} /v1/rag/cache /v1/rag/health /v1/rag/models /v1/rag/models/{model:path}
        /v1/chat/completions /v1/completions /v1/models
        /v1/models/{model:path} /v1/tokenize /v1/detokenize /generate /model_info /get_model_info
    """,
    Access.OPERATOR: """
        / /metrics /openapi.json /docs /docs/oauth2-redirect /redoc /server_info /get_server_info /v1/loads
        /encode /classify /v1/embeddings /v1/classify /tokenize /detokenize /v1/score /v1/decisions /v1/rerank
        /v1/systemone /v1/responses /v1/responses/{response_id} /v1/responses/{response_id}/cancel
        /v1/messages /v1/messages/count_tokens /v1/audio/transcriptions /v1/realtime
        /api/chat /api/generate /api/tags /api/show /invocations /vertex_generate
        /parse_function_call /separate_reasoning /open_session /close_session /get_hicache_l3_cache_layout
    """,
    Access.ADMIN: """
        /v1/rag/cache/entries /v1/rag/cache/pin /v1/rag/cache/unpin /v1/rag/cache/prefetch
        /v1/rag/cache/evict /v1/rag/cache/verify /v1/rag/cache/warm
        /set_internal_state /flush_cache /configure_logging /abort_request /pause_generation
        /continue_generation /slow_down /freeze_gc /set_trace_level /start_profile /stop_profile
        /add_external_corpus /remove_external_corpus /list_external_corpora
        /hicache/storage-backend /hicache/storage-backend/clear
        /start_expert_distribution_record /stop_expert_distribution_record /dump_expert_distribution_record
        /update_weights_from_disk /update_weights_from_tensor /update_weights_from_distributed
        /update_weights_from_ipc /update_weight_version /begin_weight_update /end_weight_update
        /init_weights_update_group /destroy_weights_update_group /init_weights_send_group_for_remote_instance
        /send_weights_to_remote_instance /get_weights_by_name /weights_checker
        /get_remote_instance_transfer_engine_info /remote_instance_transfer_engine_info
        /release_memory_occupation /resume_memory_occupation /pd_role_switch
        /load_lora_adapter /load_lora_adapter_from_tensors /unload_lora_adapter
        /scale_elastic_ep /is_scaling_elastic_ep
    """,
}

ROUTES: dict[str, Access] = {
    path: access for access, paths in _PATHS.items() for path in paths.split()
}
"""Access by the path template of a route; a route without an entry is the operator's."""

_TEMPLATES = [(compile_path(path)[0], path) for path in ROUTES if "{" in path]


def find_route(scope: Mapping[str, Any]) -> tuple[str, Access]:
    """Path template of the route that a request asks for, empty for none known, and what opens it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    if path not in ROUTES:
        path = next((name for regex, name in _TEMPLATES if regex.match(path)), "")
    return path, ROUTES.get(path, Access.OPERATOR)

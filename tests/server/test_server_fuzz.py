"""Requests that nobody thought of: schemathesis on our routes' OpenAPI, hypothesis on the fusion fields."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.engine

_PHASES = (Phase.explicit, Phase.generate)
_QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]


# -- the schema ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rag_schema(rag_server: Any) -> Any:
    """Our part of SGLang's OpenAPI document."""
    with rag_server.client() as client:
        document = client.get("/openapi.json").json()
    document["paths"] = {
        path: item for path, item in document["paths"].items() if path.startswith("/v1/rag/")
    }
    assert len(document["paths"]) == 16
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=rag_server.url)
    return schema


OPERATIONS = (
    ("POST", "/v1/rag/chat/completions"),
    ("POST", "/v1/rag/search"),
    ("POST", "/v1/rag/documents"),
    ("GET", "/v1/rag/documents"),
    ("DELETE", "/v1/rag/documents/{document_id}"),
    ("GET", "/v1/rag/jobs/{job_id}"),
    ("GET", "/v1/rag/cache"),
    ("GET", "/v1/rag/cache/entries"),
    ("POST", "/v1/rag/cache/pin"),
    ("POST", "/v1/rag/cache/unpin"),
    ("POST", "/v1/rag/cache/prefetch"),
    ("POST", "/v1/rag/cache/evict"),
    ("POST", "/v1/rag/cache/verify"),
    ("GET", "/v1/rag/health"),
    ("GET", "/v1/rag/models"),
    ("GET", "/v1/rag/models/{model}"),
)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_one_that_the_schema_names(
    rag_server: Any, rag_schema: Any, method: str, path: str
) -> None:
    """Requests that fit the schema and requests that do not."""
    from schemathesis import GenerationMode, checks

    checks.load_all_checks()
    named = ["not_a_server_error", "status_code_conformance", "response_schema_conformance"]
    wanted = checks.CHECKS.get_by_names(named)
    headers = {"Authorization": f"Bearer {rag_server.keys['operator']}"}
    refused = 0

    def send(case: Any) -> None:
        nonlocal refused
        if isinstance(case.body, dict) and path.endswith("/chat/completions"):
            # What is fuzzed is the request, not the patience of a CPU.
            for name in ("max_tokens", "max_completion_tokens"):
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(4, case.body[name])
        answer = case.call_and_validate(headers=headers, checks=wanted, timeout=240)
        if answer.status_code >= 400:
            refused += 1
            message = answer.json()["error"]["message"]
            assert message
            assert "\n" not in message

    bare = path.endswith(
        ("/cache", "/health", "/models")
    )  # takes nothing, so nothing in it can be wrong
    modes = [GenerationMode.POSITIVE] if bare else list(GenerationMode)
    for mode in modes:
        strategy = rag_schema[path][method].as_strategy(generation_mode=mode)
        checked = settings(
            max_examples=15,
            deadline=None,
            phases=_PHASES,
            suppress_health_check=_QUIET,
            derandomize=True,
        )(given(case=strategy)(send))
        checked()
    assert refused or bare


# -- the fusion fields of SGLang's own routes -------------------------------------------------------

_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
_edges = st.integers(-5, 80)
_fields: dict[str, st.SearchStrategy[Any]] = {
    "mode": st.sampled_from(["fuse", "build", "off"]) | _json,
    "spans": st.lists(st.lists(_edges, max_size=3), max_size=4)
    | st.lists(_edges, max_size=8)
    | _json,
    "prefix_len": _edges | _json,
    "policy": st.sampled_from(["query", "epic:0.5", "cacheblend", "reuse", "full:2", ""]) | _json,
    "ratio": st.floats(-1, 2) | _json,
    "options": st.dictionaries(st.text(max_size=10), _json, max_size=2) | _json,
    "surprise": _json,
}
_payloads = st.fixed_dictionaries({}, optional=_fields)
_hints = st.fixed_dictionaries(
    {
        "protocol_version": st.just("1") | _json,
        "message_id": st.text(max_size=8) | _json,
        "actions": st.lists(
            st.fixed_dictionaries(
                {
                    "action_id": st.text(max_size=4),
                    "action_type": st.just("rag.fusion"),
                    "action_version": st.sampled_from(["1", "1", "1", "2"]),
                    "payload": _payloads | _json,
                }
            ),
            max_size=2,
        )
        | _json,
    }
)


@given(hints=_hints | _json, params=st.none() | _payloads | _json, as_hints=st.booleans())
@settings(
    max_examples=120, deadline=None, phases=_PHASES, suppress_health_check=_QUIET, derandomize=True
)
def test_no_fusion_field_breaks_the_server(
    rag_server: Any, hints: Any, params: Any, as_hints: bool
) -> None:
    """Whatever stands in ``kv_hints`` or ``custom_params``: an answer, or a 4xx with one line."""
    sampling: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0}
    body: dict[str, Any] = {"input_ids": list(range(1000, 1064)), "sampling_params": sampling}
    if as_hints:
        body["kv_hints"] = hints
    else:
        known = isinstance(params, dict)
        sampling["custom_params"] = {f"rag_{k}": v for k, v in params.items()} if known else params
    answer = httpx.post(
        f"{rag_server.url}/generate",
        json=body,
        headers={"Authorization": f"Bearer {rag_server.keys['acme']}"},
        timeout=240,
        trust_env=False,
    )
    assert answer.status_code < 500, (body, answer.text)
    if answer.status_code == 200:
        assert answer.json()["meta_info"]["completion_tokens"] == 1
    else:
        assert "Traceback" not in answer.text


def test_the_server_is_whole_after_all_that(rag_server: Any) -> None:
    rag_server.wait_idle()
    state = rag_server.internal_state()["rag_integrity"]
    assert state["store"] == "ok"
    assert state["pool_free"] == state["pool_size"]
    assert state["requests"] == 0

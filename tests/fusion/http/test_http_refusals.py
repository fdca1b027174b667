"""Malformed fusion fields are HTTP 400 in one line on every endpoint, and the server keeps serving."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from rag_pipeline.protocol import FusionRequest

pytestmark = pytest.mark.engine


def bad_fields() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"spans": [[3, 5000]]}, "tokens"),
        ({"spans": [[1, 5], [4, 8]]}, "overlap"),
        ({"spans": "all"}, "token positions"),
        ({"mode": "fly"}, "fuse, build, off"),
        ({"policy": "best"}, "query"),
        ({"policy": "query", "ratio": 7}, "between 0 and 1"),
        ({"span": [1, 5]}, "spans"),
        ({"attention": "no-such"}, "choose one of dense"),
    ]


def one_line(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text
    body = answer.json()
    message: str = body.get("message") or body["error"]["message"]
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("fields", "words"), bad_fields())
def test_malformed_fields_are_http_400_in_one_line_on_every_endpoint(
    client: Any, fields: dict[str, Any], words: str
):
    action = {
        "action_id": "a",
        "action_type": "rag.fusion",
        "action_version": "1",
        "payload": fields,
    }
    hints = {"protocol_version": "1", "message_id": "m", "actions": [action]}
    flat = {"custom_params": {f"rag_{name}": value for name, value in fields.items()}}
    ids = list(range(2, 40))
    bodies = [
        ("/generate", {"input_ids": ids, "kv_hints": hints}),
        ("/generate", {"input_ids": [ids, ids], "kv_hints": [None, hints]}),
        ("/generate", {"input_ids": ids, "sampling_params": flat}),
        ("/v1/completions", {"model": "m", "prompt": ids, **flat}),
        ("/v1/completions", {"model": "m", "prompt": ids, "stream": True, **flat}),
        (
            "/v1/chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": "What?"}], **flat},
        ),
    ]
    for path, body in bodies:
        assert words in one_line(client.post(path, body)), path
    # SGLang answers a stream of /generate before it reads the request: the fault is its one message.
    (message,) = client.stream("/generate", bodies[0][1] | {"stream": True})
    assert message["error"]["code"] == 400
    assert words in message["error"]["message"]
    assert httpx.get(f"{client.url}/health", timeout=30, trust_env=False).status_code == 200


def test_after_all_refusals_requests_are_served_as_before(client: Any, layout, built, server):
    ids, spans = layout["ids"], layout["spans"]
    client.flush()
    fusion = FusionRequest(spans=spans, prefix_len=spans[0][0], policy="reuse", passage=False)
    report = client.generate(ids, fusion)["meta_info"]["rag_fusion"]
    assert report["reused_tokens"] == sum(end - start for start, end in spans)
    assert client.state()["on"]
    assert "Scheduler hit an exception" not in server["log"].read_text()

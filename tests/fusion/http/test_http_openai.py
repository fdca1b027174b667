"""Fusion through the OpenAI endpoints: fields of ``custom_params``, reports, and prompts that name no spans."""

from __future__ import annotations

from typing import Any

import pytest

from rag_pipeline.protocol import FusionRequest

pytestmark = pytest.mark.engine


def test_completions_take_custom_params(client: Any, layout, built):
    ids, spans = layout["ids"], layout["spans"]

    def complete(fusion: FusionRequest, **fields: Any) -> Any:
        body = {"model": "m", "prompt": ids, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        return body | {"custom_params": fusion.to_custom_params()} | fields

    client.flush()
    off = client.ok("/v1/completions", complete(FusionRequest(mode="off")))
    for policy in ("full", "reuse"):
        client.flush()
        before = client.metrics()
        fusion = FusionRequest(spans=spans, prefix_len=spans[0][0], policy=policy, passage=False)
        fused = client.ok("/v1/completions", complete(fusion))
        moved = client.moved(before)
        assert moved["requests.fused"] == 1
        assert moved["spans.hit"] == 3
        if policy == "full":
            assert fused["choices"][0]["text"] == off["choices"][0]["text"]
            assert moved["tokens.recomputed"] > 0
        else:
            assert moved["tokens.reused"] == sum(end - start for start, end in spans)
    client.flush()
    messages = client.stream("/v1/completions", complete(fusion, stream=True))
    text = "".join(m["choices"][0]["text"] for m in messages if m["choices"])
    assert text == fused["choices"][0]["text"]

    # A chunk of its own, built through this endpoint.
    before = client.metrics()
    new, (start, end) = layout["builds"][0]
    shorter = FusionRequest(mode="build", spans=((start, end - 5),), prefix_len=start)
    client.ok("/v1/completions", complete(shorter, prompt=new[: end - 5]))
    moved = client.moved(before)
    assert (moved["requests.built"], moved["spans.stored"]) == (1, 1)


def test_chat_takes_custom_params_and_returns_the_report(client: Any, encode, layout):
    instruction, passages, question = layout["texts"]
    system = f"system: {instruction}\n"
    head = len(encode(system + "user: "))
    messages = [
        {"role": "system", "content": instruction},
        {"role": "user", "content": "".join(passages[::-1]) + question},
    ]

    def chat(content: list[dict[str, str]], fusion: FusionRequest, **fields: Any) -> dict[str, Any]:
        body = {"model": "m", "messages": content, "max_tokens": 6, "temperature": 0}
        return body | {"custom_params": fusion.to_custom_params(), "ignore_eos": True} | fields

    for passage in passages:
        span = (head, head + len(encode(passage)))
        build = FusionRequest(mode="build", spans=(span,), prefix_len=head)
        content = [messages[0], {"role": "user", "content": passage}]
        answer = client.ok("/v1/chat/completions", chat(content, build, return_meta_info=True))
        assert answer["choices"][0]["meta_info"]["rag_fusion"]["built_chunks"] == 1
    spans, at = [], head
    for passage in passages[::-1]:
        spans.append((at, at + len(encode(passage))))
        at = spans[-1][1]
    fusion = FusionRequest(spans=tuple(spans), prefix_len=head, policy="reuse", passage=False)
    client.flush()
    answer = client.ok("/v1/chat/completions", chat(messages, fusion, return_meta_info=True))
    report = answer["choices"][0]["meta_info"]["rag_fusion"]
    assert report["reused_tokens"] == at - head
    assert report["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    client.flush()
    before = client.metrics()
    streamed = client.stream("/v1/chat/completions", chat(messages, fusion, stream=True))
    parts = [m["choices"][0]["delta"].get("content") or "" for m in streamed if m["choices"]]
    assert "".join(parts) == answer["choices"][0]["message"]["content"]
    assert client.moved(before)["tokens.reused"] == at - head
    # A client that knows nothing of spans, on a server with automatic matching: the prompt is scanned.
    client.flush()
    before = client.metrics()
    plain = {"model": "m", "messages": messages, "max_tokens": 2}
    client.ok("/v1/chat/completions", plain)
    moved = client.moved(before)
    assert moved["requests.fused"] == 1
    assert moved["tokens.reused"] + moved["tokens.recomputed"] == at - head
    client.flush()
    before = client.metrics()
    client.ok("/v1/chat/completions", plain | {"custom_params": {"rag_mode": "off"}})
    # Who wants numbers gets those of plain prefill.
    client.flush()
    client.ok("/v1/chat/completions", plain | {"logprobs": True, "top_logprobs": 2})
    client.flush()
    ids = [*encode(system + "user: "), *(i for p in passages[::-1] for i in encode(p)), 7]
    score = {"query": ids[:-1], "items": [ids[-1:]], "label_token_ids": [5, 9], "model": "m"}
    client.ok("/v1/score", score)
    moved = client.moved(before)
    assert moved["requests.fused"] == moved["tokens.reused"] == 0

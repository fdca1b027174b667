"""Chats past the context window on SGLang's own server, which found the plugin by its entry points alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sglang as sgl

from rag_pipeline.frontend import RagEndpoint, truncated, usage

pytestmark = pytest.mark.engine

SAID = "The keeper painted the lighthouse green. "
TURNS = 5


def question(turn: int) -> str:
    """About a quarter of the window of 4,096, one token per byte."""
    return f"{turn}: {25 * SAID}"


def test_the_chat_route_cuts_a_conversation_and_refuses_other_chats_as_ever(client: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in range(TURNS):
        messages += [{"role": "user", "content": question(turn)}]
        messages += [{"role": "assistant", "content": "Indeed."}]
    messages = [*messages, {"role": "user", "content": "Which colour?"}]
    body = {"model": "m", "messages": messages, "max_tokens": 4, "return_meta_info": True}
    named = {"rag_conversation": "long", "rag_policy": "reuse"}
    told = client.ok("/v1/chat/completions", body | {"custom_params": named})
    report = told["choices"][0]["meta_info"]["rag_fusion"]
    assert 0 < report["truncated"]["turns"] < TURNS
    assert report["prompt_tokens"] < 4096
    for other in (None, {"rag_policy": "reuse"}, named | {"rag_truncation": "disabled"}):
        refused = client.post("/v1/chat/completions", body | {"custom_params": other})
        assert refused.status_code == 400
        assert "longer than the model's context length" in refused.text
    wrong = client.post(
        "/v1/chat/completions", body | {"custom_params": named | {"rag_truncation": "oldest"}}
    )
    assert wrong.status_code == 400
    assert "choose one of auto, disabled" in wrong.text


@pytest.mark.filterwarnings("ignore:Error in stream_executor")  # of what is refused
def test_a_program_goes_on_past_the_window(server: dict[str, Any], model: Path) -> None:
    @sgl.function
    def chat(s):
        s += sgl.system("Be brief.")
        for turn in range(TURNS):
            s += sgl.user(question(turn))
            s += sgl.assistant(sgl.gen(f"answer{turn}", max_tokens=4))

    def run(truncation: Any) -> Any:
        backend = RagEndpoint(
            server["url"],
            tokenizer=model,
            policy="reuse",
            keep_turns=True,
            truncation=truncation,
        )
        state = chat.run(backend=backend, temperature=0, ignore_eos=True)
        state.sync()
        return state

    state = run("auto")
    assert state.error() is None
    cuts = [truncated(state, f"answer{turn}").turns for turn in range(TURNS)]
    assert cuts[:3] == [0, 0, 0]
    assert 0 < cuts[-1] < TURNS
    assert usage(state, f"answer{TURNS - 1}").prompt_tokens < 4096
    assert "refused the request (400)" in str(run("disabled").error())

"""SGLang's own chat route on conversations past the window: what is cut, and what goes through untouched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rag_pipeline.protocol.fields import parse_custom_params
from rag_pipeline.protocol.fusion_request import RequestError
from rag_pipeline.sglang_plugin.http.chat_window import around_process_messages

CONTEXT = 400
NAMED = {"rag_conversation": "c", "rag_policy": "reuse"}


def encode(text: str) -> list[int]:
    return list(text.encode())


class Serving:
    """Where the messages become ids: one per byte, and three more per message."""

    def __init__(self, **manager: Any) -> None:
        self.tokenizer_manager = SimpleNamespace(
            context_len=CONTEXT,
            max_req_input_len=CONTEXT - 6,
            num_reserved_tokens=0,
            allow_auto_truncate=False,
            validate_total_tokens=True,
            tokenizer=SimpleNamespace(encode=encode),
        )
        vars(self.tokenizer_manager).update(manager)
        self.calls = 0

    def lay_out(self, serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        ids: list[int] = []
        for message in request.messages:
            calls = getattr(message, "tool_calls", None) or ()
            told = "".join([message.content or "", *(str(c.function.arguments) for c in calls)])
            ids += [1, *encode(told), 2, 3]
        return SimpleNamespace(prompt_ids=ids)


def chat(turns: int, custom: Any = NAMED, answer: int | None = 20, **fields: Any) -> Any:
    """A request of SGLang with so many turns of 60 letters behind an instruction."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    messages = [{"role": "system", "content": "Be brief."}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{turn:02}" + "q" * 28})
        if turn + 1 < turns:
            messages.append({"role": "assistant", "content": "a" * 30})
    return ChatCompletionRequest(
        model="m", messages=messages, max_tokens=answer, custom_params=custom, **fields
    )


def served(request: Any, **manager: Any) -> tuple[list[int], Serving]:
    serving = Serving(**manager)
    return around_process_messages(serving.lay_out, serving, request, False).prompt_ids, serving


@pytest.mark.parametrize("answer", [20, None])
def test_a_long_conversation_loses_its_oldest_turns_and_the_report_is_told(
    answer: int | None,
) -> None:
    request = chat(12, answer=answer)
    ids, _ = served(request)
    assert len(ids) + (answer or 1) <= CONTEXT
    fusion = parse_custom_params(request.custom_params, len(ids))
    assert fusion is not None
    cut, tokens = fusion.truncated
    assert cut > 0
    assert tokens == 70 * cut
    kept = [message.content for message in request.messages]
    assert kept[0] == "Be brief."
    assert kept[1].startswith(f"{cut:02}")
    assert kept[-1].startswith("11")


def test_the_next_turns_are_cut_at_the_same_place() -> None:
    """So that what stays keeps its place, and its KV, for many turns."""
    cuts = []
    for turns in range(7, 12):
        request = chat(turns)
        served(request)
        cuts.append(dict(request.custom_params).get("rag_truncated", [0, 0])[0])
    assert cuts == sorted(cuts)
    assert len(set(cuts)) <= 3


@pytest.mark.parametrize(
    ("turns", "custom"),
    [
        (12, None),
        (12, {"rag_policy": "reuse"}),
        (12, {"other": 1}),
        (12, NAMED | {"rag_spans": [10, 20]}),
        (3, NAMED),
        (1, NAMED),
    ],
)
def test_every_other_request_goes_through_untouched(turns: int, custom: Any) -> None:
    request = chat(turns, custom)
    before = request.model_dump_json()
    ids, serving = served(request)
    assert request.model_dump_json() == before
    assert serving.calls == 1
    assert len(ids) == len(serving.lay_out(serving, request).prompt_ids)


def test_disabled_cuts_nothing_and_is_no_field_of_fusion() -> None:
    request = chat(12, NAMED | {"rag_truncation": "disabled"})
    _, serving = served(request)
    assert serving.calls == 1
    assert request.custom_params == NAMED
    request = chat(12, NAMED | {"rag_truncation": "auto"})
    assert len(served(request)[0]) <= CONTEXT - 20
    for wrong in ("oldest", None, []):
        with pytest.raises(ValueError, match="choose one of auto, disabled"):
            served(chat(12, {"rag_truncation": wrong}))


def test_a_pool_that_is_smaller_than_the_context_is_the_window() -> None:
    request = chat(5, answer=None)
    assert served(chat(5, answer=None))[1].calls == 1
    ids, _ = served(request, max_req_input_len=200)
    assert len(ids) <= 150
    assert request.custom_params["rag_truncated"][0] > 0


@pytest.mark.parametrize(
    ("turns", "answer", "manager"),
    [
        (12, 10**9, {}),  # refused, in SGLang's words on the whole of it
        (12, CONTEXT, {}),
        (5, 200, {"allow_auto_truncate": True}),  # answered, with a shorter answer
        (5, 10**9, {"validate_total_tokens": False}),
    ],
)
def test_an_answer_that_no_cut_makes_room_for_costs_no_turn(
    turns: int, answer: int, manager: dict[str, Any]
) -> None:
    request = chat(turns, answer=answer)
    assert served(request, **manager)[1].calls == 1
    assert len(request.messages) == 2 * turns


def test_where_sglang_would_cut_the_question_itself_the_oldest_turns_go() -> None:
    ids, _ = served(chat(12, answer=10**9), allow_auto_truncate=True)
    assert len(ids) < CONTEXT
    ids, _ = served(chat(12, answer=1), num_reserved_tokens=100)
    assert len(ids) < CONTEXT - 100
    ids, _ = served(chat(5, answer=1), num_reserved_tokens=100)
    assert len(ids) < CONTEXT - 100


def test_of_a_chat_of_short_messages_and_tool_calls_half_a_window_stays() -> None:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "' + "y" * 60 + '"}'}}
    short = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    called = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **call}]},
        {"role": "tool", "tool_call_id": "1", "content": "z"},
        {"role": "assistant", "content": "a"},
    ]
    for turn, times in ((short, 1000), (called, 30)):
        request = ChatCompletionRequest(
            model="m", messages=[*turn * times, short[0]], max_tokens=20, custom_params=NAMED
        )
        ids, _ = served(request)
        assert CONTEXT // 4 < len(ids) <= CONTEXT - 20


@pytest.mark.parametrize("wrong", [3, [1], [1, 2, 3], ["1", 2], [-1, 2], [True, 2], "ab"])
def test_what_was_cut_is_two_numbers(wrong: Any) -> None:
    with pytest.raises(RequestError, match=r"fusion truncated is .* give the numbers"):
        parse_custom_params({"rag_truncated": wrong}, 10)

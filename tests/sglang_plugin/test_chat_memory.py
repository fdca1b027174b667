"""SGLang's own chat route with a memory: what is read out of a request, what is put into it, what goes through untouched."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.protocol import FusionRequest, MemoryFields, MemoryLoad
from rag_pipeline.protocol.fields import parse_custom_params
from rag_pipeline.sglang_plugin.http.chat_memory import AskedChat, around_handle_request

ID = "ab" * 32
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "My dog is called Biscuit."},
    {"role": "assistant", "content": [{"type": "text", "text": "A good name."}]},
    {"role": "user", "content": "What is my dog called?"},
]


class Turn:
    input_ids = tuple(range(20))
    rid = "the-id"
    fusion = FusionRequest(
        prefix_len=4, memory=MemoryFields(load=(MemoryLoad(start=4, end=8, id=ID),))
    )

    def __init__(self) -> None:
        self.answers: list[str | None] = []

    def ended(self, answer: str | None) -> None:
        self.answers.append(answer)


class Memory:
    """Keeps what it is asked."""

    def __init__(self, turn: Turn | None = None, *, default: bool = False) -> None:
        self.turn = turn
        self.default = default
        self.asked: list[AskedChat] = []
        self.reasons: list[str] = []
        self.fault: Exception | None = None

    def may_apply(self, wish: Any) -> bool:
        if wish == "elephant":
            raise RagPipelineError("memory method 'elephant' is not known; choose epicache")
        return wish != "off" and (wish is not None or self.default)

    async def remember(self, chat: AskedChat) -> Turn | None:
        self.asked.append(chat)
        if self.fault:
            raise self.fault
        return self.turn

    def left_alone(self, reason: str) -> None:
        self.reasons.append(reason)


class Serving:
    tokenizer_manager = SimpleNamespace(model_config=SimpleNamespace(is_multimodal=False))

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.seen: list[str] = []

    async def handle(self, serving: Any, request: Any, raw_request: Any) -> Any:
        self.request = request
        self.seen.append(request.model_dump_json())
        return self.answer

    @staticmethod
    def create_error_response(message: str, err_type: str) -> tuple[str, str]:
        return message, err_type


def ask(keeper: Memory, /, serving: Serving | None = None, **fields: Any) -> Any:
    """Send a body through the hook as the route does."""
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    body = {"model": "m", "messages": TALK, **fields}
    serving = serving or Serving()

    async def read() -> bytes:
        return json.dumps(body).encode()

    raw = SimpleNamespace(body=read, scope={"state": {"rag_tenant": "acme"}})
    request = ChatCompletionRequest(**body)
    before = request.model_dump_json()
    answer = asyncio.run(around_handle_request(keeper, serving.handle, serving, request, raw))
    return SimpleNamespace(answer=answer, serving=serving, before=before, request=request)


@pytest.mark.parametrize(
    "fields",
    [{"memory": {"method": "epicache"}}, {"custom_params": {"rag_memory": {"method": "epicache"}}}],
)
def test_a_conversation_is_read_and_its_prompt_put_into_the_request(fields: Any) -> None:
    said = SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content="Biscuit."))])
    turn = Turn()
    memory = Memory(turn)
    ask(memory, serving := Serving(said), max_tokens=9, cache_salt="mine", rid="my-id", **fields)
    chat = memory.asked[0]
    assert chat == AskedChat(
        wish={"method": "epicache"},
        system="Be brief.",
        history=(("user", "My dog is called Biscuit."), ("assistant", "A good name.")),
        question="What is my dog called?",
        max_new_tokens=9,
        cache_salt="mine",
        scope={"state": {"rag_tenant": "acme"}},
        rid="my-id",
    )
    assert serving.request.input_ids == list(turn.input_ids)
    assert serving.request.rid == "the-id"
    assert parse_custom_params(serving.request.custom_params, 20) == turn.fusion
    assert turn.answers == ["Biscuit."]
    assert memory.reasons == []


def test_a_stream_ends_with_its_last_piece() -> None:
    async def pieces() -> Any:
        for piece in "abc":
            seen.append((piece, list(turn.answers)))
            yield piece

    seen: list[Any] = []
    turn = Turn()
    made = ask(Memory(turn), Serving(SimpleNamespace(body_iterator=pieces())), memory="epicache")

    async def read() -> list[str]:
        return [piece async for piece in made.answer.body_iterator]

    assert turn.answers == []
    assert asyncio.run(read()) == ["a", "b", "c"]
    assert seen[-1] == ("c", [])
    assert turn.answers == [None]


@pytest.mark.parametrize("fields", [{}, {"memory": None}, {"memory": "off"}])
def test_a_request_without_a_memory_goes_through_untouched(fields: Any) -> None:
    memory = Memory(Turn())
    made = ask(memory, **fields)
    assert made.serving.seen == [made.before]
    assert memory.asked == memory.reasons == []


def test_a_request_may_take_back_the_servers_memory() -> None:
    memory = Memory(Turn(), default=True)
    made = ask(memory, custom_params={"rag_memory": "off", "other": 1})
    assert made.serving.request.input_ids is None
    assert made.serving.request.custom_params == {"other": 1}
    ask(memory)
    assert len(memory.asked) == 1


def test_a_short_conversation_is_answered_as_it_is() -> None:
    memory = Memory(None, default=True)
    made = ask(memory)
    assert len(memory.asked) == 1
    assert made.serving.seen == [made.before]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tools": [TOOL]}, "tools"),
        (
            {
                "messages": [
                    *TALK,
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "1", "content": "2"},
                ]
            },
            "tools",
        ),
        ({"messages": [*TALK, {"role": "user", "content": [PICTURE]}]}, "pictures"),
        (
            {"messages": [*TALK, {"role": "system", "content": "Now rhyme."}, TALK[-1]]},
            "instructions inside",
        ),
        ({"messages": TALK[:3]}, "no question last"),
        ({"messages": TALK[:1]}, "no question last"),
        ({"messages": [*TALK[:-1], {"role": "user", "content": " \n"}]}, "an empty question"),
        ({"input_ids": [1, 2]}, "a prompt of its own"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "template options"),
        ({"model": "m:adapter"}, "another model"),
        ({"session_params": {"id": "s"}}, "a session"),
        ({"custom_params": {"rag_conversation": "c"}}, "fusion fields"),
        ({"max_tokens": 0}, "no new token"),
        ({"max_tokens": 0, "memory": "epicache"}, "no new token"),
        ({"logprobs": True}, "numbers of the model's own"),
        ({"return_hidden_states": "last"}, "numbers of the model's own"),
    ],
)
def test_what_no_memory_can_be_of_is_left_alone_with_a_reason(fields: Any, reason: str) -> None:
    memory = Memory(Turn(), default=True)
    made = ask(memory, **fields)
    assert memory.reasons == [reason]
    assert made.serving.seen == [made.before]
    assert memory.asked == []


def test_who_asks_for_a_memory_has_one_with_log_probabilities_too() -> None:
    made = ask(Memory(Turn()), memory="epicache", logprobs=True)
    assert made.request.input_ids == list(Turn.input_ids)


def test_fields_that_a_client_laid_out_itself_are_the_engines() -> None:
    fields = MemoryFields(load=(MemoryLoad(start=4, end=8, id=ID),)).to_text()
    memory = Memory(Turn(), default=True)
    made = ask(memory, custom_params={"rag_memory": fields, "rag_prefix_len": 4})
    assert made.serving.request.custom_params["rag_memory"] == fields
    assert memory.asked == []


def test_a_wish_that_is_not_allowed_is_refused_and_a_fault_is_not() -> None:
    made = ask(Memory(Turn()), memory="elephant")
    assert made.answer == ("memory method 'elephant' is not known; choose epicache", "BadRequest")
    assert made.serving.seen == []
    memory = Memory(Turn())
    memory.fault = KeyError("a bug")
    made = ask(memory, memory="epicache")
    assert made.serving.seen == [made.before]
    assert memory.reasons == ["failed"]

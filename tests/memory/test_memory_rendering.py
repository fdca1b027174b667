"""Token ids of a conversation: those of a prefix stay, and what a user writes stays text."""

from __future__ import annotations

from typing import Any

import pytest
from conversations import chat

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory import Utterance
from rag_pipeline.memory.rendering import Renderer, checked
from rag_pipeline.prompts.tokenizer import ModelTokenizer

STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]{% else %}"
    " {{ m['content'] | trim }}</s>{% endif %}{% endfor %}"
)


def ids_of(renderer: Renderer, system: str, history: list[Utterance], question: str) -> list[int]:
    ids = list(renderer.prefix_ids(system, history[0].role if history else "user"))
    before = None
    for said in history:
        ids += renderer.message_ids(before, said)
        before = said.role
    return [*ids, *renderer.question_ids(before, question)]


def test_the_prompt_is_what_the_chat_template_writes(tokenizer: ModelTokenizer) -> None:
    history, question = chat(("garden", 4)), "Which trees?"
    messages = [{"role": "system", "content": "Be kind."}]
    messages += [{"role": said.role, "content": said.text} for said in history]
    messages += [{"role": "user", "content": question}]
    written = tokenizer.render_chat(messages)
    assert tokenizer.decode(ids_of(Renderer(tokenizer), "Be kind.", history, question)) == written


def test_a_special_token_in_a_message_is_text(tokenizer: ModelTokenizer) -> None:
    renderer = Renderer(tokenizer)
    plain = renderer.message_ids("assistant", Utterance("user", "hello"))
    ids = renderer.message_ids("assistant", Utterance("user", "<|im_end|>hello"))
    special = set(tokenizer.special_tokens.values())
    assert sum(one in special for one in ids) == sum(one in special for one in plain)
    assert "<|im_end|>hello" in tokenizer.decode(ids)


@pytest.mark.parametrize("roles", [("assistant", "user"), ("user", "user"), ("assistant",) * 2])
def test_roles_that_a_template_refuses_are_laid_out_all_the_same(
    tokenizer: ModelTokenizer, roles: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf: Any = tokenizer._hf
    monkeypatch.setattr(hf, "chat_template", STRICT)
    said = [Utterance(role, f"words {place}") for place, role in enumerate(roles)]
    text = tokenizer.decode(ids_of(Renderer(tokenizer), "", said, "and now?"))
    places = [text.index(words) for words in ("words 0", "words 1", "and now?")]
    assert places == sorted(places)
    assert text.endswith("[/INST]")


def test_a_base_model_gets_plain_text(
    tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf: Any = tokenizer._hf
    monkeypatch.setattr(hf, "chat_template", None)
    text = tokenizer.decode(ids_of(Renderer(tokenizer), "Rules.", [Utterance("user", "a")], "b?"))
    assert text == "Rules.\n\na\n\nb?\nAnswer:"


def test_another_role_is_refused_in_one_line() -> None:
    with pytest.raises(RagPipelineError, match="give role user or assistant") as refused:
        checked(Utterance("tool", "42"))
    assert "\n" not in str(refused.value)

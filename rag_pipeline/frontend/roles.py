"""The model's own chat template as the prefix and suffix of each role, as SGLang's programs want it."""

from __future__ import annotations

from typing import Any

from sglang.lang.chat_template import ChatTemplate, get_chat_template_by_model_path

from rag_pipeline.frontend.marked_text import MarkedText
from rag_pipeline.prompts.chat_template import template_parts
from rag_pipeline.prompts.tokenizer import ModelTokenizer


def chat_template_of(tokenizer: ModelTokenizer, model_path: str) -> Any:
    """Chat template for programs, with control tokens that no user text can forge.

    SGLang guesses a template from the model's path and writes ``USER:`` for a model it does not
    know. Here it is read from the model's own template, by writing a short conversation with it.

    Parameters
    ----------
    tokenizer : ModelTokenizer
        The model's tokenizer.
    model_path : str
        For SGLang's guess, used where the model has no template, or one that is no fixed prefix
        and suffix a role.

    Returns
    -------
    ChatTemplate
        Without a default system prompt.
    """
    roles = _roles(tokenizer)
    if roles is None:
        guess = get_chat_template_by_model_path(model_path)
        roles = dict(guess.role_prefix_and_suffix)
    marked = {
        role: (MarkedText.of(before, "template", role=role), MarkedText.of(behind, "template"))
        for role, (before, behind) in roles.items()
    }
    return ChatTemplate(
        name="rag-pipeline", default_system_prompt=None, role_prefix_and_suffix=marked
    )


def _roles(tokenizer: ModelTokenizer) -> dict[str, tuple[str, str]] | None:
    """Prefix and suffix of system, user and assistant; None where the template has no such form."""
    turns = ["system", "user", "assistant", "user"]
    asked = template_parts(tokenizer, turns)
    closed = template_parts(tokenizer, turns, opening=False)
    answered = template_parts(tokenizer, turns[:3], opening=False)
    if asked is None or closed is None or answered is None:
        return None
    before_system, system_user, user_assistant, assistant_user, end = asked
    user_suffix, assistant_suffix = closed[-1], answered[-1]
    # A past answer must be written as a new one is opened, and a user's turn be the same behind
    # the system's and behind an answer.
    if not end.startswith(user_suffix) or user_assistant != end:
        return None
    if not assistant_user.startswith(assistant_suffix):
        return None
    user_prefix = assistant_user[len(assistant_suffix) :]
    if not system_user.endswith(user_prefix):
        return None
    return {
        "system": (
            before_system.removeprefix(tokenizer.bos_token or ""),
            system_user[: len(system_user) - len(user_prefix)],
        ),
        "user": (user_prefix, user_suffix),
        "assistant": (end[len(user_suffix) :], assistant_suffix),
    }

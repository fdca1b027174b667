"""The language model's tokenizer, for texts that stand alone and for chat templates.

Pieces of a prompt are tokenised apart and their ids are joined. For that to give back the written
text, a tokenizer must not add anything at the start of a piece; sentencepiece-like ones put a space
there. :class:`ModelTokenizer` switches that off, and reads special-token strings in user text as
ordinary characters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import Any

from rag_pipeline.errors import ModelError, one_line
from rag_pipeline.models.stock_tokenizer import load_stock_tokenizer
from retrievers import storable_text

PROMPT_DATE = date(2024, 7, 26)
"""What a chat template with a date writes at the head of a prompt: the day that Llama 3's own template
names where it cannot ask the clock."""


class ModelTokenizer:
    """Tokenizer of a model folder; implements :class:`retrievers.types.Tokenizer`.

    Parameters
    ----------
    hf_tokenizer : object
        A transformers tokenizer backed by the ``tokenizers`` library.

    Notes
    -----
    Ids differ from the stock tokenizer's in one case only: a tokenizer that adds a leading space
    (older Llama) gives the first word of a piece without it. The decoded text is then equal to
    the written one; with the stock behaviour every chunk would begin with a space nobody wrote.
    """

    def __init__(self, hf_tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"tokenizer {type(hf_tokenizer).__name__} has no tokenizer.json; convert it to a "
                "fast tokenizer first"
            )
        settings = without_added_prefix(json.loads(backend.to_str()))
        settings["truncation"] = settings["padding"] = None
        text = json.dumps(settings, sort_keys=True)
        self._hf = hf_tokenizer
        self._backend: Any = Tokenizer.from_str(text)
        self._backend.encode_special_tokens = True
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._special = {
            token.content: (int(index), token)
            for index, token in hf_tokenizer.added_tokens_decoder.items()
            if token.special
        }

    @classmethod
    def load(cls, model_path: Path | str) -> ModelTokenizer:
        """Load the tokenizer of a model folder.

        Parameters
        ----------
        model_path : Path or str
            Folder in Hugging Face format.

        Returns
        -------
        ModelTokenizer
            Ready to encode.

        Raises
        ------
        ModelError
            When the folder holds no tokenizer that can be read.
        """
        try:
            return cls(load_stock_tokenizer(model_path))
        except ModelError:
            raise
        except Exception as error:
            reason = one_line(error, 200)
            raise ModelError(f"{model_path} holds no readable tokenizer ({reason})") from error

    @classmethod
    def load_served(cls, model_path: Path | str) -> ModelTokenizer:
        """Load the tokenizer of a server's model, whose folder must lie on this machine.

        Raises
        ------
        ModelError
            It does not; the line says what to do.
        """
        try:
            return cls.load(model_path)
        except ModelError as error:
            raise ModelError(
                f"the server's model {model_path} has no tokenizer on this machine; copy its folder here "
                "and give it as tokenizer"
            ) from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary and settings; equal fingerprints give equal ids."""
        return self._fingerprint

    @property
    def special_tokens(self) -> dict[str, int]:
        """Control tokens and their ids."""
        return {text: index for text, (index, _) in self._special.items()}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone; special-token strings in it are ordinary text, half a surrogate pair is U+FFFD."""
        ids: list[int] = self._backend.encode(storable_text(text), add_special_tokens=False).ids
        return ids

    def encode_offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Character span ``(start, end)`` of every token of :meth:`encode`."""
        offsets: list[tuple[int, int]] = self._backend.encode(
            storable_text(text), add_special_tokens=False
        ).offsets
        return offsets

    def encode_runs(self, runs: Sequence[tuple[str, bool]]) -> list[int]:
        """Token ids of a text whose parts are trusted or not.

        Parameters
        ----------
        runs : sequence of (str, bool)
            ``(text, is_template)`` parts in order. Special-token strings are control tokens where
            `is_template` is true and ordinary text elsewhere; between control tokens the text of
            all parts is tokenised in one go.

        Returns
        -------
        list of int
            Ids without anything added before or behind.
        """
        ids: list[int] = []
        pending = ""
        strip_next = False
        for text, is_template in runs:
            parts = self._split_special(text) if is_template else [(text, None)]
            for part, token in parts:
                if token is None:
                    pending += part.lstrip() if strip_next and not pending else part
                    continue
                index, added = token
                if added.lstrip:
                    pending = pending.rstrip()
                if pending:
                    ids += self.encode(pending)
                pending = ""
                ids.append(index)
                strip_next = added.rstrip
        return ids + self.encode(pending) if pending else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` with special tokens written out and no clean-up."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def render_chat(
        self, messages: Sequence[dict[str, str]], *, opening: bool = True
    ) -> str | None:
        """Apply the chat template, which writes :data:`PROMPT_DATE` where it writes a date.

        Parameters
        ----------
        messages : sequence of dict of str to str
            ``role`` and ``content`` of each message.
        opening : bool
            Whether the text ends with the opening of an answer.

        Returns
        -------
        str or None
            The prompt as text; None when the model has no chat template.
        """
        return self._render(messages, PROMPT_DATE, opening)

    @cached_property
    def writes_date(self) -> bool:
        """Whether the chat template writes the current date into a prompt."""
        from jinja2 import TemplateError

        user = [{"role": "user", "content": "x"}]
        try:
            texts = {self._render(user, PROMPT_DATE.replace(year=y), True) for y in (2023, 2024)}
        except TemplateError:
            return False
        return len(texts) > 1

    def date_note(self) -> str:
        """Line that tells today's date, for the end of a prompt; empty for a template without a date.

        The date at the head of the prompt is pinned: chunk KV is computed behind it and would be
        missed from midnight on.
        """
        return f"Today is {date.today():%d %B %Y}.\n" if self.writes_date else ""

    @property
    def date_policy(self) -> str:
        """What prompts say of the date, for people."""
        if not self.writes_date:
            return "the chat template writes none"
        return (
            f"pinned to {PROMPT_DATE:%d %B %Y} at the head, so that chunk KV outlives midnight; "
            "today's date stands before the question"
        )

    def _render(self, messages: Sequence[dict[str, str]], day: date, opening: bool) -> str | None:
        if not getattr(self._hf, "chat_template", None):
            return None
        text: str = self._hf.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=opening,
            # A name given here hides the function of that name that templates call for a date.
            strftime_now=datetime.combine(day, time()).strftime,
        )
        return text

    @property
    def bos_token(self) -> str | None:
        """Token that models without a chat template want first, when the tokenizer adds one."""
        plain: list[int] = self._hf("a", add_special_tokens=True)["input_ids"]
        bos_id, bos = self._hf.bos_token_id, self._hf.bos_token
        return str(bos) if bos_id is not None and plain[:1] == [bos_id] else None

    def _split_special(self, text: str) -> list[tuple[str, tuple[int, Any] | None]]:
        """Cut `text` at special tokens; the longest one wins where several begin."""
        import re

        if not self._special:
            return [(text, None)]
        names = sorted(self._special, key=len, reverse=True)
        pattern = re.compile("(" + "|".join(re.escape(name) for name in names) + ")")
        return [(part, self._special.get(part)) for part in pattern.split(text) if part]


def without_added_prefix(settings: dict[str, Any]) -> dict[str, Any]:
    """Change the settings of a ``tokenizers`` tokenizer so that it puts no space before a text.

    Parameters
    ----------
    settings : dict
        Parsed ``tokenizer.json``; changed in place.

    Returns
    -------
    dict
        The same object: ``Prepend`` normalizers are gone, ``Metaspace`` and ``ByteLevel`` add no
        prefix, in encoding and decoding alike.
    """

    def visit(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        kind = node.get("type")
        if kind == "Prepend":
            return None
        if kind == "Sequence":
            for key in ("normalizers", "pretokenizers", "decoders"):
                if key in node:
                    node[key] = [kept for child in node[key] if (kept := visit(child)) is not None]
        elif kind == "Metaspace":
            node["prepend_scheme"] = "never"
            node.pop("add_prefix_space", None)
        elif kind == "ByteLevel":
            node["add_prefix_space"] = False
        elif kind == "Strip" and node.get("content") == " " and node.get("start"):
            return None  # the decoder's counterpart of Prepend
        return node

    for part in ("normalizer", "pre_tokenizer", "decoder"):
        settings[part] = visit(settings.get(part))
    return settings

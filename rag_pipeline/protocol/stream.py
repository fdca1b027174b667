"""The one reader of an engine's answer, in a stream or whole, whoever carried its messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rag_pipeline.errors import EngineError
from rag_pipeline.protocol.messages import GenerationPiece
from rag_pipeline.protocol.report import finish_reason


class AbortedError(EngineError):
    """The engine gave a request up.

    Parameters
    ----------
    sender : str
        Who says so, as the message names it.
    reason : str or None
        The engine's own words, if any.
    status : int or None
        The HTTP status that the engine gives for it, if any.
    """

    def __init__(self, sender: str, reason: str | None, status: int | None) -> None:
        super().__init__(f"the {sender} aborted the request: {reason or 'no reason'}")
        self.reason = reason
        self.status = status


class StreamReader:
    """Turns the messages of one answer into pieces of new text.

    SGLang sends with every message the text so far, or only what is new, depending on how it was
    started. It reports the fusion in the first message only, and an empty list in later ones.

    Parameters
    ----------
    incremental : bool
        Whether a message carries only what is new.
    sender : str
        Who sends them, in messages of errors: ``engine`` or ``server``.

    Attributes
    ----------
    meta : dict
        ``meta_info`` of all messages so far, together.
    finish : str or None
        Kind of the end, once the last message was read.
    """

    def __init__(self, *, incremental: bool, sender: str = "engine") -> None:
        self.meta: dict[str, Any] = {}
        self.finish: str | None = None
        self._incremental = incremental
        self._sender = sender
        self._seen = 0

    def read(self, message: Mapping[str, Any]) -> GenerationPiece:
        """Read one message.

        Parameters
        ----------
        message : mapping
            With ``text`` and ``meta_info``, as ``/generate`` sends it.

        Returns
        -------
        GenerationPiece
            The new text, and ``meta_info`` of all messages so far.

        Raises
        ------
        AbortedError
            The engine gave the request up.
        """
        meta = message["meta_info"]
        # Later messages say an empty list where the first one said everything.
        self.meta |= {k: v for k, v in meta.items() if v != [] or k not in self.meta}
        self.finish, reason = finish_reason(meta)
        if self.finish == "abort":
            raise AbortedError(self._sender, reason, _status_code(meta["finish_reason"]))
        return GenerationPiece(text=self._new(message["text"]), meta_info=dict(self.meta))

    def _new(self, text: str) -> str:
        if self._incremental:
            return text
        # A trailing replacement character is half of a multi-byte character whose rest comes with the next message.
        whole = text[:-1] if text.endswith("\ufffd") and self.finish is None else text
        new, self._seen = whole[self._seen :], max(self._seen, len(whole))
        return new


def _status_code(reason: Any) -> int | None:
    """HTTP status that an engine gives for the end of a request, if it gives one."""
    status = reason.get("status_code") if isinstance(reason, Mapping) else None
    return status if isinstance(status, int) else None

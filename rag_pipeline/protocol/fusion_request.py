"""What a request asks of fusion, and how a client writes it on the wire.

Two carriers hold the same fields. ``kv_hints`` on ``/generate`` (one action of type ``rag.fusion``) may nest::

    {"mode": "fuse", "spans": [[120, 520], [520, 900]], "prefix_len": 120,
     "policy": "query", "ratio": 0.15, "options": {"mean_shift": 0.4}, "conversation": "c-17"}

``custom_params`` (OpenAI endpoints, ``sgl.Engine`` sampling parameters) allows flat lists only, so every
field is prefixed, the spans are written start, end, start, end, and ``memory`` as a string of JSON::

    {"rag_mode": "fuse", "rag_spans": [120, 520, 520, 900], "rag_prefix_len": 120, "rag_policy": "query:0.15"}

:mod:`rag_pipeline.protocol.fields` reads both. This module imports nothing heavy: a client needs no more.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.protocol.memory_step import MemoryFields

if TYPE_CHECKING:
    from chunk_cache.policies import Policy
    from rag_kernels import AttentionMethod

PREFIX_POLICY = "prefix"
"""Ordinary prefill behind the radix tree: fusion leaves the request alone."""

DENSE_ATTENTION = "dense"
"""Every row of the prompt reads every key up to its own."""

ACTION_TYPE = "rag.fusion"
ACTION_VERSION = "1"
PARAM_PREFIX = "rag_"

Mode = Literal["fuse", "build", "off"]


class TokenRange(Protocol):
    """Anything with a start and an end, such as a :class:`rag_pipeline.types.Span`."""

    @property
    def start(self) -> int:
        """First token position."""
        ...

    @property
    def end(self) -> int:
        """One past the last."""
        ...


class RequestError(RagPipelineError):
    """A malformed fusion field of a request; the client gets it as HTTP 400."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FusionRequest:
    """Checked wish of one request.

    Attributes
    ----------
    mode : str
        ``fuse``: reuse what is stored. ``build``: prefill as usual and store the spans' KV. ``off``:
        leave this request alone, no automatic matching either.
    spans : tuple of (int, int)
        Half-open token positions of chunks, rising, disjoint, not empty; none means: look for stored chunks in
        the whole prompt.
    prefix_len : int
        Tokens of the shared prefix that chunk KV is computed behind; by default all before the first span.
    policy : str
        Policy name, ``NAME:RATIO`` allowed; empty for the engine's default.
    ratio : float or None
        Share of the reused tokens' computation.
    options : tuple of (str, object)
        Further fields of the policy's configuration.
    conversation : str
        Name of the conversation that the prompt is a turn of: what earlier turns of that name, tenant and
        policy left is loaded, and this turn is kept for the next. Empty for neither.
    passage : bool or None
        With ``build``: true computes the chunk behind the engine's neutral passage, for use away from its own
        place; an engine without a passage stores nothing then. With ``fuse``: false leaves such KV unused.
    attention : str
        Which keys the computed rows of the prompt read: a method's name, ``NAME:OPTION=VALUE+OPTION=VALUE`` allowed.
        Anything but ``dense`` is approximate from the first computed row on, whether chunks are loaded or not. Empty
        for the engine's default.
    truncated : (int, int)
        Oldest turns of the conversation that were cut before it was sent, and about their tokens; told in the report.
    memory : MemoryFields or None
        Records of a conversation's memory that the prompt loads, and one that it makes.
    """

    mode: Mode = "fuse"
    spans: tuple[tuple[int, int], ...] = ()
    prefix_len: int = 0
    policy: str = ""
    ratio: float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    conversation: str = ""
    passage: bool | None = None
    attention: str = ""
    truncated: tuple[int, int] = (0, 0)
    memory: MemoryFields | None = None

    def make_policy(self, default: str) -> Policy:
        """Build the policy; ``default`` is used where the request names none.

        Raises
        ------
        RequestError
            An unknown policy or option, or a value that is not allowed.
        """
        return _make_policy(self.policy or default, self.ratio, self.options)

    @property
    def is_dense(self) -> bool:
        """Whether it names no method that leaves keys out."""
        return self.attention in ("", DENSE_ATTENTION)

    def make_attention(self) -> AttentionMethod | None:
        """Build the attention method; None for dense attention, and where none is named.

        Raises
        ------
        RequestError
            An unknown method or option, or a value that is not allowed.
        """
        if self.is_dense:
            return None
        return _make_attention(self.attention)

    def to_custom_params(self) -> dict[str, Any]:
        """Write for ``custom_params``; :func:`parse_custom_params` reads it back."""
        fields = self._fields()
        if self.spans:
            fields["spans"] = [edge for span in self.spans for edge in span]
        if self.memory is not None:
            fields["memory"] = self.memory.to_text()
        return {f"{PARAM_PREFIX}{name}": value for name, value in fields.items()}

    def to_kv_hints(self, message_id: str = "rag") -> dict[str, Any]:
        """Write the ``kv_hints`` envelope of ``/generate``."""
        payload = self._fields()
        action = {
            "action_id": f"{message_id}-0",
            "action_type": ACTION_TYPE,
            "action_version": ACTION_VERSION,
            "payload": payload,
        }
        return {"protocol_version": "1", "message_id": message_id, "actions": [action]}

    def _fields(self) -> dict[str, Any]:
        """What is not left at its default, and mode and prefix always; spans are nested."""
        fields: dict[str, Any] = {"mode": self.mode, "prefix_len": self.prefix_len}
        if self.spans:
            fields["spans"] = [list(span) for span in self.spans]
        if self.policy:
            fields["policy"] = self.policy
        if self.ratio is not None:
            fields["ratio"] = self.ratio
        if self.options:
            fields["options"] = dict(self.options)
        if self.conversation:
            fields["conversation"] = self.conversation
        if self.passage is not None:
            fields["passage"] = self.passage
        if self.attention:
            fields["attention"] = self.attention
        if self.truncated[0]:
            fields["truncated"] = list(self.truncated)
        if self.memory is not None:
            fields["memory"] = self.memory.to_json()
        return fields


LEFT_ALONE = FusionRequest(mode="off")
"""Asks for nothing: the request is served as stock SGLang serves it."""


@functools.lru_cache(maxsize=256)
def _cached_policy(name: str, ratio: float | None, options: tuple[tuple[str, Any], ...]) -> Policy:
    # Brings torch in, which a client that only writes requests has no use for.
    from chunk_cache.policies import create_policy

    return create_policy(name, ratio, **dict(options))


def _make_policy(name: str, ratio: float | None, options: tuple[tuple[str, Any], ...]) -> Policy:
    try:
        return _cached_policy(name, ratio, options)
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(str(error)) from None
    except Exception as error:  # one of another distribution
        raise RequestError(f"policy {name!r:.80} cannot be made: {error!r:.200}") from error


@functools.lru_cache(maxsize=256)
def _cached_attention(text: str) -> AttentionMethod:
    from rag_kernels import create_attention_method
    from rag_kernels.sparse import add_table_folder
    from rag_pipeline.config import attention_dir

    add_table_folder(attention_dir())
    return create_attention_method(text)


def _make_attention(text: str) -> AttentionMethod:
    try:
        return _cached_attention(text)
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(str(error)) from None
    except Exception as error:  # one of another distribution
        raise RequestError(
            f"attention method {text!r:.80} cannot be made: {error!r:.200}"
        ) from error


def build_requests(prefix_len: int, chunk_len: int) -> tuple[FusionRequest, FusionRequest]:
    """What to ask with the prompt ``prefix + chunk`` so that the chunk's KV is stored in both variants.

    The first is for the chunk's own place right behind the prefix, the second for every other place.

    Parameters
    ----------
    prefix_len, chunk_len : int
        Tokens of the shared prefix and of the chunk.
    """
    place = (prefix_len, prefix_len + chunk_len)
    own = FusionRequest(mode="build", spans=(place,), prefix_len=prefix_len)
    return own, dataclasses.replace(own, passage=True)

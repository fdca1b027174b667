"""Tokens of a prompt by what happened to them, as the client is told."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(kw_only=True, slots=True)
class UsageReport:
    """Tokens of one prompt by what happened to them; they add up to ``prompt_tokens``.

    Attributes
    ----------
    exact_prefix_tokens : int
        Found in the radix tree: exact KV, or what the same attention method computed before.
    reused_tokens : int
        KV loaded and kept, that of earlier turns included.
    recomputed_tokens : int
        KV loaded, then computed anew by the policy.
    fresh_tokens : int
        Computed, never loaded.
    computed_fraction : float
        Row-layers really computed, scoring passes included, over those of prefilling all behind the prefix.
    policy : str
        Policy that chose the rows; empty for ordinary prefill.
    ratio : float
        Share of the reused tokens that it planned for: its nominal ratio, more where it goes by what loading takes.
    conversation_tokens : int
        Of the reused tokens, those that earlier turns of the conversation left.
    moved_tokens : int
        Of those, what stands at another position since the oldest turns were cut; not in the report where none does.
    fallback : str
        Why the prompt, or a part of it, was prefilled as usual; empty if it was not.
    runs : list of [int, int]
        The same token by token: lengths of the prompt's runs in order, ``[kind, tokens]`` with kind 0 exact
        prefix, 1 reused, 2 recomputed, 3 fresh. Empty where nothing was loaded.
    attention : str
        Method that said which keys the computed rows read; not in the report where they read all.
    truncated : dict
        ``turns`` and ``tokens`` of the conversation that were cut before the prompt was laid out, as whoever cut them
        told; not in the report where none were.
    memory : dict
        ``loaded`` slots and whether a record was ``missed`` (0 or 1); whether one was ``stored``, with its ``id`` and
        ``kept`` slots; the ``kept_share`` of each span that was asked about. Not in the report of a request without a
        memory.
    """

    prompt_tokens: int = 0
    exact_prefix_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    fresh_tokens: int = 0
    computed_fraction: float = 1.0
    policy: str = ""
    ratio: float = 0.0
    fallback: str = ""
    built_chunks: int = 0
    conversation_tokens: int = 0
    runs: list[list[int]] = dataclasses.field(default_factory=list)
    attention: str = ""
    moved_tokens: int = 0
    truncated: dict[str, int] = dataclasses.field(default_factory=dict)
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dict."""
        fields = dataclasses.asdict(self)
        if not self.attention:
            del fields["attention"]
        if not self.moved_tokens:
            del fields["moved_tokens"]
        if not self.truncated:
            del fields["truncated"]
        if not self.memory:
            del fields["memory"]
        return fields

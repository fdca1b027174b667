"""What a client chooses of fusion: the one list of these fields for every door into the pipeline.

Command line, Python, HTTP, LangChain and frontend programs all offer them; a field that is added here is asked of
each (``tests/pipeline/test_fusion_choice.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypedDict

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.protocol.fusion_request import (
    DENSE_ATTENTION,
    LEFT_ALONE,
    PREFIX_POLICY,
    FusionRequest,
    TokenRange,
)


class FusionFields(TypedDict, total=False):
    """Keyword arguments of a call that makes a :class:`FusionChoice`, which tells what they mean."""

    policy: str
    ratio: float | None
    attention: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FusionChoice:
    """How the chunks of a client's prompts are served.

    Parameters
    ----------
    policy : str
        Selection policy, ``NAME`` or ``NAME:RATIO``; ``prefix`` asks to be left alone.
    ratio : float or None
        Share of recomputed tokens; the policy's own where None.
    attention : str
        Attention method of the computed rows; empty for the engine's default, which is ``dense`` unless its operator
        says otherwise. The engine checks the name.
    """

    policy: str = PREFIX_POLICY
    ratio: float | None = None
    attention: str = ""

    @classmethod
    def of(cls, owner: object, *, policy: str = PREFIX_POLICY) -> FusionChoice:
        """Choice that stands in the fields of a larger object.

        Parameters
        ----------
        owner : object
            Has an attribute for every field; None leaves the default.
        policy : str
            Policy where the owner names none.
        """
        said = {field.name: getattr(owner, field.name) for field in dataclasses.fields(cls)}
        given = {name: value for name, value in said.items() if value is not None}
        return cls(**{"policy": policy, **given})

    @property
    def is_exact(self) -> bool:
        """Whether fusion is to leave the prompt alone."""
        return self.policy == PREFIX_POLICY

    def check(self) -> None:
        """Refuse what can be refused before any work is done.

        Raises
        ------
        RagPipelineError
            An unknown policy, a ratio that it does not take, or a method beside ``prefix``, which is exact.
        """
        if not self.is_exact:
            from chunk_cache.policies import policy_names

            if self.policy.partition(":")[0] not in policy_names():
                allowed = ", ".join((PREFIX_POLICY, *policy_names()))
                raise RagPipelineError(f"policy {self.policy!r} is unknown; allowed are {allowed}")
            FusionRequest(policy=self.policy, ratio=self.ratio).make_policy(self.policy)
        elif self.ratio is not None:
            raise RagPipelineError(
                f"policy {PREFIX_POLICY!r} takes no ratio, {self.ratio} was given; leave it out"
            )
        elif not FusionRequest(attention=self.attention).is_dense:
            raise RagPipelineError(
                f"policy {PREFIX_POLICY!r} is exact, attention {self.attention!r} is not; name another policy, "
                f"or leave the attention {DENSE_ATTENTION!r}"
            )

    def request(
        self,
        spans: Iterable[TokenRange],
        *,
        prefix_len: int | None = None,
        conversation: str = "",
    ) -> FusionRequest:
        """What a prompt with these chunks asks of fusion.

        Parameters
        ----------
        spans : iterable of TokenRange
            Chunks of the prompt, in prompt order.
        prefix_len : int, optional
            Tokens that chunk KV is computed behind; by default all before the first chunk.
        conversation : str
            Name under which this turn's KV is kept and that of earlier turns is found; empty for neither.

        Raises
        ------
        RagPipelineError
            See :meth:`check`.
        """
        self.check()
        if self.is_exact:
            return LEFT_ALONE
        places = tuple((span.start, span.end) for span in spans)
        if prefix_len is None:
            prefix_len = places[0][0] if places else 0
        return FusionRequest(
            spans=places,
            prefix_len=prefix_len,
            policy=self.policy,
            ratio=self.ratio,
            conversation=conversation,
            attention=self.attention,
        )

"""The contract of a retention rule: which tokens of a conversation stay when its cache is full.

Shape letters: n keys that compete, H KV heads of this rank, Q query heads, D head size, R rows of queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from chunk_cache.errors import ChunkCacheError

Probe = Literal["patched", "window", "repeat", "none"]
"""Whose queries score the keys: a text about an episode, the block's own last rows, the block again, nobody's."""


class RetentionError(ChunkCacheError):
    """Scores that cannot be trusted, or tensors that do not fit: nothing of this step may be stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionConfig:
    """Options that every rule has."""

    first: int = 0
    """Tokens at the start of the competing ones that always stay. A system part in front of them competes never."""

    def __post_init__(self) -> None:
        check_count("first", self.first)


def check_count(name: str, value: int, least: int = 0) -> None:
    """Refuse an option that counts something and is too small."""
    if value < least:
        raise ValueError(f"{name} is {value}; it must be {least} or more.")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidates:
    """What a rule looks at, checked: the arguments of :meth:`RetentionRule.scores`."""

    keys: Tensor
    values: Tensor
    queries: Tensor | None
    positions: Tensor
    next_position: int


class RetentionRule(ABC):
    """Scores the keys of one layer, so that the best of each KV head stay.

    A subclass sets ``name``, ``probe`` and ``config_type``, and writes :meth:`_scores`. It keeps nothing between calls:
    one instance serves all layers and requests, from any thread. Scores depend on the arguments only, so the same
    step gives the same memory everywhere. All ranks of a tensor-parallel group call it, each with its own heads.

    Attributes
    ----------
    name : str
        Its name in :data:`~chunk_cache.retention.RETENTION_RULES`, as the paper calls it.
    probe : {"patched", "window", "repeat", "none"}
        Whose queries it asks for.
    config_type : type
        Frozen dataclass of the options, :class:`RetentionConfig` or a subclass of it.
    config : RetentionConfig
        Options of this instance.
    """

    name: ClassVar[str]
    probe: ClassVar[Probe]
    config_type: ClassVar[type[RetentionConfig]] = RetentionConfig

    def __init__(self, config: Any) -> None:
        """Make the rule with its options, whose types were checked."""
        self.config = config

    @property
    def identity(self) -> str:
        """Name and every option, as :func:`create_rule` reads them: rules of one identity keep the same tokens."""
        options = "+".join(
            f"{field.name}={_text(getattr(self.config, field.name))}"
            for field in fields(self.config)
        )
        return f"{self.name}:{options}" if options else self.name

    @property
    def window_rows(self) -> int:
        """Rows at the end of the block whose queries are asked for; 0 where the probe is something else."""
        return 0

    def scores(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
        positions: Tensor,
        next_position: int,
    ) -> Tensor:
        """Score every key; the larger, the longer it stays.

        Nothing is written to. Memory beyond the arguments stays within a few MiB and the result.

        Parameters
        ----------
        keys : Tensor
            ``[n, H, D]``, any float dtype, rotated: those of the last memory, then those of the block. Keys in front
            of them that stay anyway (a system part) may be handed in, too: they then share the softmax, and the caller
            leaves their columns out before :func:`keep_top`.
        values : Tensor
            ``[n, H, D_v]``.
        queries : Tensor or None
            ``[R, Q, D]``, rotated in the same frame as the keys, oldest row first: all rows of the probe, or the last
            rows of the block (:attr:`window_rows`) for ``window``. Not read by a rule whose probe is ``none``.
        positions : Tensor
            int ``[H, n]``: true position of each key, rising along a head.
        next_position : int
            True position of the token that follows the last key.

        Returns
        -------
        Tensor
            fp32 ``[H, n]``, finite.

        Raises
        ------
        RetentionError
            Shapes that do not fit, an input or a score that is not finite, positions that do not rise.
        """
        candidates = Candidates(
            keys=keys,
            values=values,
            queries=None if self.probe == "none" else queries,
            positions=positions,
            next_position=next_position,
        )
        self._check(candidates)
        if keys.shape[0] == 0:
            return keys.new_zeros((keys.shape[1], 0), dtype=torch.float32)
        scores = self._scores(candidates)
        if scores.shape != positions.shape or scores.dtype != torch.float32:
            raise RetentionError(
                f"rule {self.name!r} returned {scores.dtype} {tuple(scores.shape)}; "
                f"expected float32 {tuple(positions.shape)}"
            )
        if not scores.isfinite().all():
            raise RetentionError(f"rule {self.name!r}: a score is not finite")
        return scores

    def pinned(self, positions: Tensor, next_position: int) -> Tensor:
        """Tokens that stay whatever their score, as long as the budget holds them: bool ``[H, n]``.

        By default the first ``first`` columns: a token that always stays keeps its column.
        """
        columns = torch.arange(positions.shape[1], device=positions.device)
        return (columns < self.config.first).expand_as(positions)

    @abstractmethod
    def _scores(self, candidates: Candidates) -> Tensor:
        """Score candidates that were checked, at least one; fp32 ``[H, n]``."""

    def _check(self, given: Candidates) -> None:
        keys, values, queries, positions = (
            given.keys,
            given.values,
            given.queries,
            given.positions,
        )
        if keys.ndim != 3 or values.shape[:2] != keys.shape[:2]:
            raise RetentionError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)}: expected [n, H, D] of the same n and H"
            )
        if positions.shape != (keys.shape[1], keys.shape[0]):
            raise RetentionError(
                f"positions {tuple(positions.shape)}: expected [H, n] of keys {tuple(keys.shape)}"
            )
        if self.probe != "none":
            fits = (
                queries is not None
                and queries.ndim == 3
                and queries.shape[0] > 0
                and queries.shape[1] % keys.shape[1] == 0
                and queries.shape[2] == keys.shape[2]
            )
            if not fits:
                got = None if queries is None else tuple(queries.shape)
                raise RetentionError(
                    f"rule {self.name!r}: queries {got} do not fit keys {tuple(keys.shape)}; expected [R, Q, D], R > 0"
                )
        if keys.shape[0] and (
            bool((positions[:, 1:] <= positions[:, :-1]).any())
            or int(positions[:, -1].max()) >= given.next_position
        ):
            raise RetentionError(
                f"positions must rise along each head and lie below the next one, {given.next_position}"
            )
        for what, tensor in (("keys", keys), ("values", values), ("queries", queries)):
            # The sum of finite numbers of a model is finite, and cheaper than a look at each.
            if tensor is not None and not tensor.sum(dtype=torch.float32).isfinite():
                raise RetentionError(f"{what} hold infinities or NaN")


def _text(value: object) -> str:
    """Spell a value of an option as :func:`rag_kernels.options.make_config` reads it."""
    return str(value).lower() if isinstance(value, bool) else str(value)

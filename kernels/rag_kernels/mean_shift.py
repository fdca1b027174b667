"""Mean shift: move the rows that stay cached by the average change of the recomputed rows of their chunk.

Per chunk ``c`` with ``n_c >= 2`` recomputed tokens and strength ``A`` the weight is ``A * n_c / (n_c + 4)``. The
mean of ``K_new - K_cached`` is taken with the rotation removed and added, rotated, to every other token of
the chunk; the mean of ``V_new - V_cached`` is added as it is. After AgentKVShift (arXiv 2607.21604), which has no
damping; the damping and ``A = 0.4`` were found by measurement on small models, above 0.7 the mean KL rises.

Only differences of positions inside a chunk matter, so the rotations are taken from the chunk's first
position: small angles, and the same table for every layer.

Shape suffixes: T tokens, N key/value heads, H head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rag_kernels.host_copy import to_device
from rag_kernels.native.selection import native_shift
from rag_kernels.paged import gather_kv, scatter_kv_inplace
from rag_kernels.rotary import RotarySpec, add_rotated_inplace, rotate

_DAMPING = 4.0
_FEWEST_PROBES = 2


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MeanShiftPlan:
    """What every layer needs for the shift; made by :func:`plan_mean_shift`.

    Attributes
    ----------
    spec : RotarySpec
        The model's rotation.
    probe_rows, probe_slots : Tensor
        int64 ``[P]``: rows of the new keys, and slots, of the recomputed tokens of all shifted chunks.
    probe_ends : Tensor
        int64 ``[C]`` on the host: where the probes of each of the ``C`` chunks end.
    probe_cos, probe_sin : Tensor
        fp32 ``[P, 1, rotary_dim / 2]``: rotation back to the chunk's first position.
    weights : Tensor
        fp32 ``[P]`` on the host: weight of each probe in the shift of its chunk, damping included.
    other_slots : Tensor
        int64 ``[T]``: slot of every token that is shifted, chunk by chunk.
    other_ends : Tensor
        int64 ``[C]`` on the host: where each chunk ends in ``other_slots``.
    other_cos, other_sin : Tensor
        fp32 ``[T, 1, rotary_dim / 2]``: rotation from the chunk's first position.
    parts : tuple of MeanShiftPlan
        What :func:`join_mean_shifts` put together; empty otherwise.
    """

    spec: RotarySpec
    probe_rows: Tensor
    probe_slots: Tensor
    probe_ends: Tensor
    probe_cos: Tensor
    probe_sin: Tensor
    weights: Tensor
    other_slots: Tensor
    other_ends: Tensor
    other_cos: Tensor
    other_sin: Tensor
    parts: tuple[MeanShiftPlan, ...] = ()
    _memo: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a kernel reads of the host's tensors, copied once per pass.

        Returns
        -------
        tuple of Tensor
            int32 ``[C + 1]`` bounds of the probes of each chunk, fp32 ``[P]`` weights, int32 ``[T]`` chunk of each
            token that is shifted.
        """
        if not self._memo:
            start = torch.zeros(1, dtype=torch.int64)
            chunks = torch.arange(self.other_ends.numel(), dtype=torch.int32)
            counts = torch.diff(self.other_ends, prepend=start)
            tables = (
                torch.cat([start, self.probe_ends]).to(torch.int32),
                self.weights,
                chunks.repeat_interleave(counts),
            )
            device = self.other_slots.device
            bounds, weights, owners = (to_device(table, device) for table in tables)
            self._memo["tables"] = (bounds, weights, owners)
        return self._memo["tables"]

    def averaging(self) -> Tensor:
        """:attr:`weights` as a matrix, fp32 ``[C, P]`` on the host, for a product that sums by chunk."""
        at = torch.arange(self.weights.numel())
        chunk = torch.searchsorted(self.probe_ends, at, right=True)
        matrix = torch.zeros(self.probe_ends.numel(), at.numel())
        matrix[chunk, at] = self.weights
        return matrix

    @property
    def num_shifted(self) -> int:
        """Tokens that each layer rewrites."""
        return int(self.other_slots.numel())


def plan_mean_shift(
    chunks: Sequence[tuple[int, int]],
    row_positions: Tensor,
    slots: Tensor,
    spec: RotarySpec,
    strength: float = 0.4,
    first_row: int = 0,
) -> MeanShiftPlan:
    """Plan the shift of one request.

    Parameters
    ----------
    chunks : sequence of (int, int)
        Half-open ranges of positions, one per chunk, of reused tokens; no two share one.
    row_positions : Tensor
        Integer ``[R]`` on the host: positions of the request's computed rows, in the order of the layer's new
        keys. Rows outside the chunks are ignored.
    slots : Tensor
        Integer ``[kv_len]`` on the device; slot ``j`` holds position ``j``.
    spec : RotarySpec
        The model's rotation.
    strength : float
        ``A``, 0 to 1.
    first_row : int
        Row of the new keys where this request begins, for a batch.

    Returns
    -------
    MeanShiftPlan
        Chunks with fewer than 2 recomputed tokens, or with no other token, are left out.
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(
            f"mean-shift strength is {strength}; it must be between 0 and 1 (0.4 is usual)."
        )
    device = slots.device
    rows = row_positions.detach().to("cpu", torch.int64).numpy()
    bounds = np.array(chunks, dtype=np.int64).reshape(-1, 2)
    lengths = bounds[:, 1] - bounds[:, 0]
    # Every token of every chunk: its chunk, its place there, its position.
    chunk = np.repeat(np.arange(len(bounds)), lengths)
    offset = np.arange(chunk.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    position = offset + bounds[chunk, 0]
    num_positions = slots.numel()
    is_row = np.zeros(num_positions, dtype=bool)
    is_row[rows] = True
    owner = np.full(num_positions, -1)
    owner[position] = chunk

    stays = ~is_row[position]
    inside = (owner[rows] >= 0).nonzero()[0]
    counts = np.bincount(owner[rows[inside]], minlength=len(bounds))
    num_others = np.bincount(chunk[stays], minlength=len(bounds))
    is_shifted = (counts >= _FEWEST_PROBES) & (num_others > 0) & (strength > 0.0)
    probes = inside[is_shifted[owner[rows[inside]]]]
    probes = probes[np.argsort(owner[rows[probes]], kind="stable")]
    others = (stays & is_shifted[chunk]).nonzero()[0]

    probe_chunk = owner[rows[probes]]
    weights = (strength / (counts + _DAMPING))[probe_chunk].astype(np.float32)
    # One table of the places in a chunk for all: the rotation back is the same angle, negative. `index_select` takes a
    # fifth of the time of brackets.
    table = spec.table(torch.arange(int(lengths.max(initial=0))), device)

    def there(numbers: npt.NDArray[np.int64]) -> Tensor:
        return to_device(torch.from_numpy(numbers), device)

    back, forth = there(rows[probes] - bounds[probe_chunk, 0]), there(offset[others])
    return MeanShiftPlan(
        spec=spec,
        probe_rows=there(probes + first_row),
        probe_slots=slots[there(rows[probes])].long(),
        probe_ends=torch.from_numpy(np.cumsum(counts[is_shifted])),
        probe_cos=table.cos.index_select(0, back)[:, None],
        probe_sin=-table.sin.index_select(0, back)[:, None],
        weights=torch.from_numpy(weights),
        other_slots=slots[there(position[others])].long(),
        other_ends=torch.from_numpy(np.cumsum(num_others[is_shifted])),
        other_cos=table.cos.index_select(0, forth)[:, None],
        other_sin=table.sin.index_select(0, forth)[:, None],
    )


def join_mean_shifts(plans: Sequence[MeanShiftPlan]) -> MeanShiftPlan:
    """One plan for all requests of a pass, at least one, whose slots differ: two launches per layer on a GPU.

    Their rows must be rows of the same new keys (``first_row``), and their rotation the same.
    """
    if len(plans) == 1:
        return plans[0]
    if any(plan.spec is not plans[0].spec for plan in plans):
        raise ValueError("plans of one rotation only can be joined.")

    def all_of(name: str) -> Tensor:
        return torch.cat([getattr(plan, name) for plan in plans])

    def ends(name: str) -> Tensor:
        before, joined = 0, []
        for plan in plans:
            one = getattr(plan, name)
            joined.append(one + before)
            before += int(one[-1]) if one.numel() else 0
        return torch.cat(joined)

    return MeanShiftPlan(
        spec=plans[0].spec,
        probe_rows=all_of("probe_rows"),
        probe_slots=all_of("probe_slots"),
        probe_ends=ends("probe_ends"),
        probe_cos=all_of("probe_cos"),
        probe_sin=all_of("probe_sin"),
        weights=all_of("weights"),
        other_slots=all_of("other_slots"),
        other_ends=ends("other_ends"),
        other_cos=all_of("other_cos"),
        other_sin=all_of("other_sin"),
        parts=tuple(plans),
    )


def mean_shift_inplace(
    k_pool: Tensor,
    v_pool: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    plan: MeanShiftPlan,
    *,
    k_old: Tensor | None = None,
    v_old: Tensor | None = None,
) -> None:
    """Shift the cached rows of one layer. Call it after the layer's new K and V are known, before its attention.

    Parameters
    ----------
    k_pool, v_pool : Tensor
        ``[num_slots, N, H]``; the rows that stay cached are rewritten. They must be private to the request.
    k_new, v_new : Tensor
        ``[R, N, H]`` the layer's new rotated keys and values of all computed rows.
    plan : MeanShiftPlan
        From :func:`plan_mean_shift`.
    k_old, v_old : Tensor, optional
        ``[R, N, H]`` cached keys (rotated to the new positions) and values of the same rows. When not given they
        are read from the pool, which then must not hold the new rows yet.

    Notes
    -----
    Layer 0 never needs it: there K and V depend on the token and its position only.
    """
    if plan.num_shifted == 0:
        return
    if native_shift(k_pool, v_pool, k_new, v_new, plan, k_old, v_old):
        return
    if k_pool.device.type == "cuda" and _fits_triton(k_pool, v_pool, k_new, v_new, k_old, v_old):
        from rag_kernels.shift_triton import mean_shift_triton

        mean_shift_triton(k_pool, v_pool, k_new, v_new, plan, k_old, v_old)
        return
    for part in plan.parts:
        mean_shift_inplace(k_pool, v_pool, k_new, v_new, part, k_old=k_old, v_old=v_old)
    if plan.parts:
        return
    heads, dim = k_new.shape[1:]
    averaging = to_device(plan.averaging(), k_pool.device)
    chunks = averaging.shape[0]
    old_k = (
        gather_kv(k_pool, plan.probe_slots)
        if k_old is None
        else k_old.index_select(0, plan.probe_rows)
    )
    old_v = (
        gather_kv(v_pool, plan.probe_slots)
        if v_old is None
        else v_old.index_select(0, plan.probe_rows)
    )
    moved_k = k_new.index_select(0, plan.probe_rows).float() - old_k
    moved_v = v_new.index_select(0, plan.probe_rows).float() - old_v
    level = rotate(moved_k, plan.probe_cos, plan.probe_sin, plan.spec)
    shift_k = torch.mm(averaging, level.flatten(1)).view(chunks, heads, dim)
    shift_v = torch.mm(averaging, moved_v.flatten(1)).view(chunks, heads, dim)

    stays_k = gather_kv(k_pool, plan.other_slots).float()
    stays_v = gather_kv(v_pool, plan.other_slots).float()
    lo = 0
    for chunk, hi in enumerate(plan.other_ends.tolist()):
        # Chunk by chunk, because a copy of the shift for every token would cost more than the sum itself.
        add_rotated_inplace(
            stays_k[lo:hi], shift_k[chunk], plan.other_cos[lo:hi], plan.other_sin[lo:hi], plan.spec
        )
        stays_v[lo:hi].add_(shift_v[chunk])
        lo = hi
    scatter_kv_inplace(k_pool, plan.other_slots, stays_k)
    scatter_kv_inplace(v_pool, plan.other_slots, stays_v)


def _fits_triton(k_pool: Tensor, v_pool: Tensor, *rows: Tensor | None) -> bool:
    """Whether values are as wide as keys, old rows are given for both or neither, and heads lie in one piece."""
    given = [k_pool, v_pool, *(one for one in rows if one is not None)]
    return (
        len(given) % 2 == 0
        and all(one.shape[1:] == k_pool.shape[1:] for one in given)
        and all(one.stride(-1) == 1 for one in given)
    )

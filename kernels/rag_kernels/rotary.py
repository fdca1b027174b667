"""Move cached keys to another position: rotation by the position difference.

Rotary embedding rotates pair ``i`` of a head by ``position * inv_freq[i]``, so a key computed at position
``p`` becomes the key of position ``p + d`` by one more rotation with ``d * inv_freq``. The angle is formed
in fp64, the rotation is done in fp32 and the result is rounded once to the storage type.

A factor on cos and sin (YaRN's ``mscale``) is already inside the stored key: a rotation keeps lengths, so
the tables here never carry it and it cannot be applied twice.

Shape suffixes: T tokens, N key/value heads, H head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_kernels.host_copy import to_device


@dataclass(frozen=True, slots=True, eq=False)
class RotationTable:
    """Cosine and sine of one position difference (or one per token), ready for every layer.

    Attributes
    ----------
    cos, sin : Tensor
        fp32 ``[1, rotary_dim / 2]`` for one difference, ``[T, rotary_dim / 2]`` for one per token.
    is_zero : bool
        The difference is 0 for every token: keys are copied bit for bit.
    moved : Tensor or None
        bool ``[T]``, true where the difference is not 0; None where it is not 0 for any token or is one number.
    """

    cos: Tensor
    sin: Tensor
    is_zero: bool
    moved: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RotarySpec:
    """How a model rotates its keys; build it with :meth:`from_inv_freq`.

    Attributes
    ----------
    inv_freq : Tensor
        fp64 ``[rotary_dim / 2]`` on the CPU: radians per position, as the model really uses them (llama3, linear
        and YaRN scaling included).
    rotary_dim : int
        Leading dimensions of a head that are rotated; the rest is position free.
    is_neox_style : bool
        True: dimension ``i`` is paired with ``i + rotary_dim / 2``. False: ``2i`` with ``2i + 1``.
    """

    inv_freq: Tensor
    rotary_dim: int
    is_neox_style: bool

    @classmethod
    def from_inv_freq(
        cls, inv_freq: Tensor, rotary_dim: int | None = None, is_neox_style: bool = True
    ) -> RotarySpec:
        """Build a spec from the model's own frequencies.

        Parameters
        ----------
        inv_freq : Tensor
            ``[rotary_dim / 2]``, fp32 or fp64, radians per position after all scaling.
        rotary_dim : int, optional
            Defaults to ``2 * len(inv_freq)``.
        is_neox_style : bool
            Pairing of the dimensions, see the class.

        Raises
        ------
        ValueError
            The frequencies are not a finite vector of ``rotary_dim / 2`` numbers in fp32 or fp64.
        """
        dim = 2 * inv_freq.numel() if rotary_dim is None else rotary_dim
        if inv_freq.ndim != 1 or dim <= 0 or dim != 2 * inv_freq.numel():
            raise ValueError(
                f"inv_freq has shape {tuple(inv_freq.shape)}; rotary_dim {dim} needs a vector of {dim // 2}."
            )
        if inv_freq.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"inv_freq is {inv_freq.dtype}; give it in float32 or float64: 16 bits cannot carry the angles."
            )
        freq = inv_freq.detach().to("cpu", torch.float64, copy=True)
        if not bool(torch.isfinite(freq).all()):
            raise ValueError("inv_freq holds a value that is not finite.")
        return cls(inv_freq=freq, rotary_dim=dim, is_neox_style=is_neox_style)

    def table(self, delta: int | Tensor, device: torch.device | str = "cpu") -> RotationTable:
        """Tables for a position difference; make them once and hand them to every layer.

        Parameters
        ----------
        delta : int or Tensor
            New position minus old position; a tensor holds one per token, integer ``[T]``.
        device : torch.device or str
            Where the keys are.
        """
        if isinstance(delta, Tensor):
            if delta.ndim != 1 or delta.dtype.is_floating_point or delta.dtype == torch.bool:
                raise ValueError(
                    f"delta is {delta.dtype} of shape {tuple(delta.shape)}; give an int or an integer vector [T]."
                )
            moved = delta != 0
            cos, sin = self.cos_sin(delta, device)
            # The host never waits for a device here: only a host tensor is inspected.
            on_host = delta.device.type == "cpu"
            all_moved = on_host and bool(moved.all())
            is_zero = on_host and not bool(moved.any())
            return RotationTable(
                cos, sin, is_zero, None if all_moved else to_device(moved, torch.device(device))
            )
        cos, sin = self.cos_sin(torch.tensor([int(delta)]), device)
        return RotationTable(cos, sin, int(delta) == 0)

    def cos_sin(self, delta: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Cosine and sine of position differences, integer ``[R]``: fp32 ``[R, rotary_dim / 2]``, angles in fp64."""
        freq = self.inv_freq.to(delta.device)
        angle = delta.to(torch.float64)[:, None] * freq[None, :]
        place = torch.device(device)
        return to_device(angle.cos().float(), place), to_device(angle.sin().float(), place)

    def cache_error(self, cos_sin_cache: Tensor) -> float:
        """Largest angle error in radians against a model's own table: a self-check before keys are moved.

        Parameters
        ----------
        cos_sin_cache : Tensor
            ``[positions, rotary_dim]``, cosines then sines, with or without a common factor.

        Notes
        -----
        fp32 tables carry ``position * 6e-8`` of rounding by themselves; below 1e-2 the frequencies are the same.
        """
        half = self.rotary_dim // 2
        if cos_sin_cache.ndim != 2 or cos_sin_cache.shape[1] != self.rotary_dim:
            return float("inf")
        rows = torch.unique(
            torch.linspace(0, cos_sin_cache.shape[0] - 1, 64, dtype=torch.float64).round().long()
        )
        table = cos_sin_cache[rows.to(cos_sin_cache.device)].to("cpu", torch.float64)
        angle = rows.to(torch.float64)[:, None] * self.inv_freq[None, :]
        measured = torch.atan2(table[:, half:], table[:, :half])
        error = torch.remainder(measured - angle + torch.pi, 2 * torch.pi) - torch.pi
        return float(error.abs().max())


def rotate(x: Tensor, cos: Tensor, sin: Tensor, spec: RotarySpec) -> Tensor:
    """Rotate the leading ``rotary_dim`` of fp32 ``x [..., H]``; tables broadcast against ``[..., rotary_dim/2]``."""
    return rotate_into(torch.empty_like(x), x, spread_cos(cos, spec), sin, spec)


def spread_cos(cos: Tensor, spec: RotarySpec) -> Tensor:
    """Cosines ``[..., rotary_dim / 2]`` over all rotated dimensions: one contiguous product in place of two strided."""
    return torch.cat([cos, cos], dim=-1) if spec.is_neox_style else cos.repeat_interleave(2, dim=-1)


def rotate_into(out: Tensor, x: Tensor, wide: Tensor, sin: Tensor, spec: RotarySpec) -> Tensor:
    """:func:`rotate` with cosines of :func:`spread_cos`, into ``out``, which shares no memory with ``x``."""
    half, dim = spec.rotary_dim // 2, spec.rotary_dim
    if dim < x.shape[-1]:
        out[..., dim:].copy_(x[..., dim:])
        torch.mul(x[..., :dim], wide, out=out[..., :dim])
    else:
        torch.mul(x, wide, out=out)
    if spec.is_neox_style:
        out[..., :half].addcmul_(x[..., half:dim], sin, value=-1)
        out[..., half:dim].addcmul_(x[..., :half], sin)
    else:
        out[..., 0:dim:2].addcmul_(x[..., 1:dim:2], sin, value=-1)
        out[..., 1:dim:2].addcmul_(x[..., 0:dim:2], sin)
    return out


def add_rotated_inplace(
    target: Tensor, x: Tensor, cos: Tensor, sin: Tensor, spec: RotarySpec
) -> None:
    """Add fp32 ``x [N, H]``, rotated by each token's angle, to fp32 ``target [T, N, H]``; tables ``[T, 1, half]``."""
    half, dim = spec.rotary_dim // 2, spec.rotary_dim
    if spec.is_neox_style:
        first, second = slice(0, half), slice(half, dim)
    else:
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    target[..., first].addcmul_(x[..., first], cos).addcmul_(x[..., second], sin, value=-1)
    target[..., second].addcmul_(x[..., second], cos).addcmul_(x[..., first], sin)
    if dim < x.shape[-1]:
        target[..., dim:].add_(x[..., dim:])


def rerotate_keys(
    k_TNH: Tensor, delta: int | Tensor | RotationTable, spec: RotarySpec, out: Tensor | None = None
) -> Tensor:
    """Keys as the model would have rotated them ``delta`` positions further on.

    Parameters
    ----------
    k_TNH : Tensor
        ``[T, N, H]`` rotated keys, any floating type.
    delta : int, Tensor or RotationTable
        New position minus old, one for all or integer ``[T]``; or a table made by :meth:`RotarySpec.table`.
    spec : RotarySpec
        The model's rotation.
    out : Tensor, optional
        Same shape; may be ``k_TNH`` itself. Allocated in the type of ``k_TNH`` when not given.

    Returns
    -------
    Tensor
        ``[T, N, H]``. Where the difference is 0 the keys are copied bit for bit.
    """
    table = delta if isinstance(delta, RotationTable) else spec.table(delta, k_TNH.device)
    _check_keys(k_TNH, table, spec)
    if out is None:
        out = torch.empty_like(k_TNH)
    elif out.shape != k_TNH.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; it must be {tuple(k_TNH.shape)}.")
    if table.is_zero:
        return out if out is k_TNH else out.copy_(k_TNH)
    moved = rotate(k_TNH.float(), table.cos[:, None, :], table.sin[:, None, :], spec)
    if table.moved is None:
        return out.copy_(moved)
    # x*1 - y*0 may flip the sign of a zero, so rows that stay are taken as they are.
    return out.copy_(torch.where(table.moved[:, None, None], moved.to(k_TNH.dtype), k_TNH))


def _check_keys(k_TNH: Tensor, table: RotationTable, spec: RotarySpec) -> None:
    if k_TNH.ndim != 3 or k_TNH.shape[-1] < spec.rotary_dim:
        raise ValueError(
            f"keys have shape {tuple(k_TNH.shape)}; [T, N, H] with H >= {spec.rotary_dim} is needed."
        )
    if table.cos.shape[0] not in (1, k_TNH.shape[0]):
        raise ValueError(
            f"{table.cos.shape[0]} position differences for {k_TNH.shape[0]} tokens; give one, or one per token."
        )

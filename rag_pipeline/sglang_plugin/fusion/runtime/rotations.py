"""How each layer rotates its keys: from the configuration, and only if the loaded model's own tables say the same."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rag_kernels import RotarySpec, RotaryUnsupportedError, rotary_spec_from_config

_MAX_ANGLE_ERROR = 2e-2
"""Radians. A bf16 cos/sin table alone is off by up to 4e-3; a wrong base or scaling by far more."""
_MAX_FREQUENCY_ERROR = 1e-5
"""Relative: a few roundings in fp32."""
_TABLE_ROWS = 256


class UnsupportedModelError(ValueError):
    """The loaded model cannot be fused; the message is the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rotation:
    """Rotation of some layers' keys, and the table that the model multiplies by."""

    spec: RotarySpec
    table: Tensor

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from any other, as JSON types."""
        return {
            "inv_freq": _digest(self.spec.inv_freq),
            "dim": self.spec.rotary_dim,
            "neox": self.spec.is_neox_style,
            # What the model multiplies by: it also holds the factor that YaRN puts on keys.
            "table": _digest(self.table[:_TABLE_ROWS].float().cpu().contiguous()),
        }


def read_rotations(
    hf_config: Any, model: Any, attention_modules: Sequence[Any]
) -> tuple[Rotation, ...]:
    """Rotation of each layer; layers that rotate alike share one object.

    Parameters
    ----------
    hf_config : transformers.PretrainedConfig
        The model's configuration.
    model : torch.nn.Module
        The loaded model.
    attention_modules : sequence of torch.nn.Module
        What holds each layer's ``RadixAttention`` and its ``rotary_emb``, by layer.

    Raises
    ------
    UnsupportedModelError
        The tables are not what the configuration says, or layers rotate in a way that it does not name.
    """
    config = getattr(hf_config, "text_config", None) or hf_config
    kinds = _rotary_kinds(config, len(attention_modules))
    made: dict[str, Rotation] = {}
    for kind in dict.fromkeys(kinds):
        modules = [m for m, one in zip(attention_modules, kinds, strict=True) if one == kind]
        made[kind] = _read_rotation(_config_of(config, kind), modules)
    if len(made) > 1:
        _check_shared(model, made)
    return tuple(made[kind] for kind in kinds)


def _rotary_kinds(config: Any, num_layers: int) -> list[str]:
    """Per layer the name of its parameters in the configuration; empty names where there is one set for all."""
    params = getattr(config, "rope_parameters", None) or {}
    named = {name for name, value in params.items() if isinstance(value, dict)}
    if not named:
        if getattr(config, "rope_local_base_freq", None) is not None:
            raise UnsupportedModelError(
                "rope_local_base_freq beside one set of rope_parameters: which layers have it is not known"
            )
        return [""] * num_layers
    kinds = list(getattr(config, "layer_types", None) or ())
    if len(kinds) != num_layers or not set(kinds) <= named:
        raise UnsupportedModelError(
            f"rope_parameters for {', '.join(sorted(named))}, but {len(kinds)} layer_types for {num_layers} layers"
        )
    return kinds


def _config_of(config: Any, kind: str) -> Any:
    """The configuration as it would be if all layers were of one kind."""
    if not kind:
        return config
    own = copy.copy(config)
    own.rope_parameters = dict(config.rope_parameters[kind])
    return own


def _read_rotation(config: Any, modules: Sequence[Any]) -> Rotation:
    """Spec of the configuration, accepted only if the table of the layers says the same."""
    embeddings = {id(e): e for m in modules if (e := getattr(m, "rotary_emb", None))}
    if len(embeddings) != 1:
        raise UnsupportedModelError(
            f"{len(embeddings)} rotary embeddings for layers of one kind: they must share one for keys to be movable"
        )
    (embedding,) = embeddings.values()
    try:
        spec = rotary_spec_from_config(config, bool(getattr(embedding, "is_neox_style", True)))
    except RotaryUnsupportedError as error:
        raise UnsupportedModelError(str(error)) from None
    table = getattr(embedding, "cos_sin_cache", None)
    if table is None:
        raise UnsupportedModelError(
            "the rotary embedding has no table to check the frequencies with"
        )
    error_rad = spec.cache_error(table)
    if not error_rad <= _MAX_ANGLE_ERROR:
        raise UnsupportedModelError(
            f"the model's rotary table is {error_rad:.3g} rad away from its configuration's frequencies"
        )
    return Rotation(spec=spec, table=table)


def _check_shared(model: Any, made: dict[str, Rotation]) -> None:
    """Refuse rotations that the model makes once for its layers, besides their own tables, and other than those.

    Gemma 3 holds both, and which of them it uses depends on the processor.
    """
    inner = getattr(model, "model", model)
    for kind, name in (("full_attention", "rotary_emb"), ("sliding_attention", "rotary_emb_local")):
        shared = getattr(getattr(inner, name, None), "inv_freq", None)
        if shared is None or kind not in made:
            continue
        own = made[kind].spec.inv_freq
        found = shared.detach().cpu().double()
        if found.shape != own.shape or not bool(
            ((found - own).abs() <= _MAX_FREQUENCY_ERROR * own).all()
        ):
            raise UnsupportedModelError(
                f"layers of kind {kind} have two rotations, one of their own and one of the model's {name}: "
                "which of them turned a stored key is not known"
            )


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).hexdigest()

"""The contract of KV layouts, and the layouts by name.

Shape letters: L layers, T tokens, N pool slots, H heads of this rank, D size of the rotated part, D_v of the rest.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from chunk_cache.errors import ChunkCacheError
from chunk_cache.host_memory import empty_mapped
from rag_kernels import Registry, SpanLoadPlan, gather_kv, load_spans_inplace

if TYPE_CHECKING:
    from chunk_cache.records import ChunkKV


class LayerKV(NamedTuple):
    """One layer's part of a record; views, read-only by contract."""

    k: Tensor
    """``[T, H, D]``, contiguous, rotated to positions ``base_position + arange(T)``."""
    v: Tensor
    """``[T, H, D_v]``, contiguous."""


class KVLayout(abc.ABC):
    """What the two tensors of a record hold, and where they lie in the engine's pool.

    Every supported attention caches two parts per token: one that carries the rotation of its position, and one that
    does not. They are keys and values (MHA, GQA), or the rotary key and the latent (MLA; of a latent that is sharded
    over ranks, a rank's share). A record stores the first as ``k``, the second as ``v``, of any head count and size
    that :meth:`check` accepts; a layout that stores them otherwise says so in :meth:`unpack` and :meth:`gather`.

    An instance has no state and serves every thread. Its name is written into files, so it never changes its meaning.
    It knows the pool by its methods and by the name of its type: nothing of an engine is imported.
    """

    name: ClassVar[str]
    """As in the files and in :data:`KV_LAYOUTS`."""
    reads_rows: ClassVar[bool] = False
    """Whether a value is the beginning of its key: both lie in one row, and a model may say that they differ in size."""

    @abc.abstractmethod
    def refuse_pool(self, pool: Any) -> str | None:
        """Reason why an engine's pool is not of this layout, as a part of a sentence, or None; asked once, at start."""

    @abc.abstractmethod
    def check(self, record: ChunkKV) -> None:
        """Check that the tensors fit each other and the number of token ids.

        Raises
        ------
        ChunkCacheError
            With what was given and what is allowed.
        """

    @abc.abstractmethod
    def pool_layer(self, pool: Any, layer: int) -> tuple[Tensor, Tensor]:
        """Views of the rotated part ``[N, H, D]`` and of the rest ``[N, H, D_v]`` of a layer's pool."""

    def attended(self, pool: Any, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer's pool as an attention kernel reads them, ``[N, H, E]`` both.

        ``E`` is the size of a query. Of what a kernel returns, the first ``v_head_dim`` of each head are the output.
        """
        return self.pool_layer(pool, layer)

    def new_rows(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated part and rest of computed rows ``[R, H, ...]``, from the keys and values that a model attends with."""
        return k, v

    def keys(self, rotated: Tensor, rest: Tensor) -> Tensor:
        """Keys ``[T, H, E]`` that queries score, of a rotated part and a rest."""
        return rotated

    def unpack(self, source: LayerKV) -> tuple[Tensor, Tensor]:
        """Rotated part and rest of a record's layer, arranged as :meth:`pool_layer` has them."""
        return source.k, source.v

    def gather(self, pool: Any, num_layers: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copy slots of all layers into the tensors of a new record; the pool is only read.

        Parameters
        ----------
        pool : object
            The paged pool, after the forward that wrote the slots.
        num_layers : int
            Layers to copy.
        slots : Tensor
            int64 ``[T]``, on the pool's device.

        Returns
        -------
        tuple of Tensor
            ``k`` ``[L, T, H, D]`` and ``v`` ``[L, T, H, D_v]``, on the host: device memory belongs to the pool.
        """
        both = tuple(
            empty_mapped((num_layers, int(slots.numel()), *part.shape[1:]), part.dtype)
            for part in self.pool_layer(pool, 0)
        )
        for layer in range(num_layers):
            for tensor, part in zip(both, self.pool_layer(pool, layer), strict=True):
                tensor[layer].copy_(gather_kv(part, slots))
        return both[0], both[1]

    def load_inplace(
        self,
        rotated_pool: Tensor,
        rest_pool: Tensor,
        sources: Sequence[LayerKV],
        plan: SpanLoadPlan,
    ) -> None:
        """Write one layer of several records into the pool; only the rotated part is turned.

        Parameters
        ----------
        rotated_pool, rest_pool : Tensor
            As :meth:`pool_layer` returns them; written at the plan's slots only.
        sources : sequence of LayerKV
            The tokens of each span of the plan, of records of this layout; only read.
        plan : SpanLoadPlan
            Slots and position differences, see :func:`rag_kernels.load_spans_inplace`.
        """
        rotated, rest = zip(*(self.unpack(source) for source in sources), strict=True)
        load_spans_inplace(rotated_pool, rest_pool, rotated, rest, plan)

    def num_bytes(self, record: ChunkKV) -> int:
        """Bytes of a record's tensors."""
        return int(record.k.nbytes + record.v.nbytes)


KV_LAYOUTS: Registry[type[KVLayout]] = Registry(
    "KV layout",
    "rag_pipeline.kv_layouts",
    {
        "heads": "chunk_cache.layouts.heads:HeadsLayout",
        "latent": "chunk_cache.layouts.latent:LatentLayout",
    },
    base=KVLayout,
)
"""Layouts by name, as files name them; an engine takes the first one that its pool has."""


def layout_named(name: str) -> KVLayout:
    """Return a layout.

    Raises
    ------
    ChunkCacheError
        For a name that is not known.
    """
    try:
        return _instance(KV_LAYOUTS.get(name))
    except ValueError as error:
        raise ChunkCacheError(f"KV layout {name!r} is not implemented ({error})") from None


def layout_of_pool(pool: Any) -> KVLayout:
    """Return the first layout that an engine's pool has.

    Raises
    ------
    ChunkCacheError
        If it has none; the message has the reason of every layout.
    """
    reasons = []
    for name in KV_LAYOUTS.names():
        layout = layout_named(name)
        reason = layout.refuse_pool(pool)
        if reason is None:
            return layout
        reasons.append(reason)
    raise ChunkCacheError(f"KV pool {type(pool).__name__} has no layout here: {'; '.join(reasons)}")


@functools.cache
def _instance(layout: type[KVLayout]) -> KVLayout:
    return layout()

"""One storage backend of SGLang, made by its name from an address: pages in, pages out."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from chunk_cache import Buffer, ChunkCacheError, RemoteURL, make_private
from rag_pipeline.sglang_plugin.hicache.pages import HostPages
from rag_pipeline.sglang_plugin.hook_table import verify_targets
from rag_pipeline.sglang_plugin.internals import HICACHE

_PAGES = 32
"""Pages that one call moves."""


_PACKAGES = {"mooncake": ("mooncake", '"rag-pipeline[mooncake]"')}
"""What a backend imports only when it is made: module, and what to install."""


def check_backend(url: RemoteURL) -> None:
    """Check that SGLang has a backend, and that what it needs is installed; no server is asked.

    Raises
    ------
    ChunkCacheError
        One line.
    """
    _check_name(url)
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    module, wanted = _PACKAGES.get(url.backend, ("", ""))
    if module and find_spec(module) is None:
        raise ChunkCacheError(f"{url.shown} needs the package {module}: pip install {wanted}")
    known = StorageBackendFactory._registry.get(url.backend)
    try:
        if known is not None:
            known["loader"]()
    except ImportError as error:
        told = " ".join(str(error).split())
        raise ChunkCacheError(f"{url.shown}: a package is not installed ({told})") from None


def _check_name(url: RemoteURL) -> None:
    verify_targets(HICACHE)
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    names = sorted({*StorageBackendFactory._registry, "dynamic"})
    if url.backend not in names:
        raise ChunkCacheError(
            f"remote tier {url.shown!r}: SGLang has no storage backend {url.backend!r}; "
            f"choose one of {', '.join(names)}"
        )


class PageStore:
    """Pages by name in a backend; nothing is ever overwritten there.

    The backend is made by the first call. Calls run one after another: they share the pages that a backend has
    registered with its network.

    Parameters
    ----------
    url : RemoteURL
        Kind ``hicache``. Options that are not this project's own go to the backend as its ``extra_config``.
    page_bytes : int
        Bytes of a page.
    options : mapping of str to str
        The backend's own options.

    Raises
    ------
    ChunkCacheError
        SGLang has no backend of this name.
    """

    def __init__(self, url: RemoteURL, *, page_bytes: int, options: dict[str, str]) -> None:
        _check_name(url)
        self.url = url
        self.pages = HostPages(_PAGES, page_bytes)
        self._options = _backend_options(url, options)
        self._lock = threading.Lock()
        self._backend: Any = None

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        """Read pages; ``None`` for each that is not there, or is of another size."""
        found: list[bytes | None] = []
        for first in range(0, len(names), _PAGES):
            found += self._call(self._get, list(names[first : first + _PAGES]))
        return found

    def put(self, names: Sequence[str], data: Sequence[Buffer]) -> bool:
        """Write pages; whether all of them are there now."""
        return all(
            self._call(self._put, list(names[i : i + _PAGES]), data[i : i + _PAGES])
            for i in range(0, len(names), _PAGES)
        )

    def delete(self, names: Sequence[str]) -> bool:
        """Delete pages, where the backend can; whether it can."""
        delete = _DELETE.get(self.url.backend)
        if delete is None:
            return False
        for name in names:
            self._call(delete, name)
        return True

    def _call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            if self._backend is None:
                self._backend = self._make()
            return call(self._backend, *arguments)

    def _make(self) -> Any:
        from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
        from sglang.srt.mem_cache.storage import StorageBackendFactory

        config = HiCacheStorageConfig(
            tp_rank=0,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            # One buffer per page.
            is_mla_model=True,
            enable_storage_metrics=False,
            is_page_first_layout=True,
            model_name="rag-chunk-kv",
            extra_config=self._options,
        )
        try:
            storage = StorageBackendFactory.create_backend(self.url.backend, config, self.pages)
            storage.register_mem_pool_host(self.pages)
        except Exception as error:  # what a backend raises is its own
            raise OSError(
                f"{self.url.shown} cannot be set up: {type(error).__name__}: {error}"
            ) from error
        return storage

    def _get(self, storage: Any, names: list[str]) -> list[bytes | None]:
        if _has_pages(storage):
            there = storage.batch_get_v1(names, torch.arange(len(names))) or [False] * len(names)
            return [self.pages.take(i) if there[i] else None for i in range(len(names))]
        return [self._get_one(storage, name) for name in names]

    def _get_one(self, storage: Any, name: str) -> bytes | None:
        room = self.pages.get_dummy_flat_data_page()
        try:
            (found,) = storage.batch_get([name], [room]) or [None]
        except OSError as error:
            if error.errno is None:  # not the system's word: the page is short
                return None
            raise
        return None if found is None else found.numpy().tobytes()

    def _put(self, storage: Any, names: list[str], data: Sequence[Buffer]) -> bool:
        indices = self.pages.fill(data)
        if _has_pages(storage):
            return all(storage.batch_set_v1(names, indices) or [False])
        return bool(storage.batch_set(names, [self.pages.get_data_page(i) for i in indices]))


def _has_pages(storage: Any) -> bool:
    """Whether a backend moves pages of the registered memory, as all do but the oldest."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

    return type(storage).batch_get_v1 is not HiCacheStorage.batch_get_v1


def _backend_options(url: RemoteURL, given: dict[str, str]) -> dict[str, Any]:
    """Options as a backend reads them: numbers and truth values by their JSON, the address where it looks for it."""
    options: dict[str, Any] = {}
    for name, text in given.items():
        options[name] = text
        with contextlib.suppress(ValueError):
            options[name] = json.loads(text)
    if url.backend == "file":
        if not url.path.startswith("/"):
            raise ChunkCacheError(f"remote tier {url.shown!r}: give hicache+file:///folder")
        # The backend's own files are readable by all: the folder is not.
        make_private(Path(url.path))
        options["file_storage_path"] = url.path
    if url.backend == "mooncake" and url.host:
        options = {
            "master_server_address": f"{url.host}:{url.port or 50051}",
            "metadata_server": "P2PHANDSHAKE",
            "protocol": "tcp",
            **options,
        }
    return options


def _delete_file(file_storage: Any, name: str) -> None:
    file = f"{file_storage._get_suffixed_key(name)}.bin"
    Path(file_storage.file_path, file).unlink(missing_ok=True)


def _delete_object(mooncake_storage: Any, name: str) -> None:
    (tagged,) = mooncake_storage._tag_keys([name])
    # Leases of readers do not hold it: it is erased.
    mooncake_storage.store.remove(f"{tagged}_{mooncake_storage.mla_suffix}_k", True)


_DELETE: dict[str, Callable[[Any, str], None]] = {"file": _delete_file, "mooncake": _delete_object}
"""How pages are deleted; SGLang's interface has no word for it."""

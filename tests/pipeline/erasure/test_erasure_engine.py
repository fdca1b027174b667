"""Deleted text goes from an engine that runs: its memory, what waits to be built or written, its folder."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from erasing import CONTEXT, OTHER, SECRET, SHARED

from chunk_cache import ChunkKV, KVContext, StoreFolder, TextMarks, TierChain
from rag_pipeline import erasure
from rag_pipeline.erasure import make_eraser
from rag_pipeline.sglang_plugin.fusion.builds.erased import ErasedText
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace
from rag_pipeline.sglang_plugin.fusion.runtime.build_queue import MissingChunk
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime
from rag_pipeline.sglang_plugin.fusion.startup import tokenizer_folder
from retrievers import (
    delete_documents,
)


def test_an_engine_that_runs_forgets_it_too(
    home: Path,
    index: Path,
    record: Callable[..., ChunkKV],
    smollm2_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = FusionRuntime(FusionConfig(store_dir=str(home / "own")), None)
    runtime.passage_text = f"{SHARED} {SECRET}"
    runtime.passage, runtime.plain_passage = np.arange(3), np.arange(2)
    folder = StoreFolder(home / "own", create=True, model=str(smollm2_path))
    held, pinned, other = record(SECRET), record(f"[x]\n{SECRET}"), record(OTHER)
    for one in (held, pinned, other):
        runtime.store.put(one)
        folder.put(one, context=CONTEXT)
    runtime.store.pin(pinned.key)
    lease = runtime.store.acquire(held.key, held.token_ids)
    assert lease is not None
    watch = ErasedText(runtime, str(smollm2_path))
    assert watch.look() == 0
    # Whoever deletes knows of another folder only.
    delete_documents(index, ["a"], erase=make_eraser(home / "default"))
    assert watch.look() == 2
    assert runtime.store.keys() == [other.key]
    assert set(folder.keys()) == {other.key}
    assert runtime.passage.size == 2
    # A request that was under way computes it once more.
    lease.release()
    late = record(f"[late] {SECRET}")
    runtime.store.put(late)
    assert watch.is_in(late, "")
    assert watch.look() == 1
    assert watch.look() == 0
    # And when the notice is no longer in force, the same text may come again.
    moment = time.monotonic() + erasure.NOTICE_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: moment)
    runtime.store.put(late)
    assert watch.look() == 0
    assert not watch.is_in(late, "")


@pytest.fixture
def watched(home: Path, index: Path, smollm2_path: Path) -> ErasedText:
    """What an engine with a folder of its own knows right behind a deletion that knew of no folder."""
    StoreFolder(home / "own", create=True, model=str(smollm2_path))
    watch = ErasedText(
        FusionRuntime(FusionConfig(store_dir=str(home / "own")), None), str(smollm2_path)
    )
    delete_documents(index, ["a"], erase=make_eraser(home / "default"))
    return watch


def test_the_same_chunk_that_is_computed_again_goes_again(
    watched: ErasedText, record: Callable[..., ChunkKV]
) -> None:
    store = watched._runtime.store
    for _ in range(3):
        store.put(record(SECRET))
        assert watched.look() == 1
        assert store.keys() == []


def test_a_notice_counts_however_old_it_seems_to_an_engine_that_was_there(
    watched: ErasedText, record: Callable[..., ChunkKV], index: Path, home: Path
) -> None:
    """A look may take minutes, and a clock may jump ahead between two."""
    watched.look()
    watched._runtime.store.put(record(OTHER))
    delete_documents(index, ["b"], erase=make_eraser(home / "default"))
    for path in erasure.board().glob("*.*"):
        os.utime(path, (1.0, 1.0))
    assert watched.look() == 1
    assert watched.look() == 0


def test_what_waits_to_be_built_is_erased_however_late_it_is_built(
    watched: ErasedText, record: Callable[..., ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = watched._runtime
    late, other = record(SECRET), record(OTHER)
    prefix: Any = SimpleNamespace(tenant=RadixNamespace(None, None))
    for one in (late, other):
        chunk = MissingChunk(prefix=prefix, ids=one.token_ids.astype(np.int64), key=one.key)
        runtime.missing.add(chunk, 8)
    now = time.monotonic()
    for moment in (0.0, 100.0, 200.0, 300.0):  # the engine is busy far beyond a notice
        monkeypatch.setattr(time, "monotonic", lambda moment=moment: now + moment)
        watched.look()
    for one in (late, other):
        assert runtime.missing.take().key == one.key
        runtime.store.put(one)
    assert watched.is_in(late, "")
    assert watched.look() == 1
    assert runtime.store.keys() == [other.key]
    # Long after it was built the text may come again.
    monkeypatch.setattr(time, "monotonic", lambda: now + 300 + erasure.NOTICE_S + 1)
    watched.look()
    assert not watched.is_in(late, "")


def test_what_a_tenant_deletes_goes_from_its_own_chunks_and_from_nobodys_not_from_anothers(
    home: Path, watched: ErasedText, record: Callable[..., ChunkKV]
) -> None:
    """`watched` has a notice in force of its own, of the secret; here a tenant deletes another text, and a letter."""
    store = watched._runtime.store
    acme, sub, globex = (
        RadixNamespace(None, salt) for salt in ("tenant-a", "tenant-a/x", "tenant-g")
    )
    assert acme.owner == sub.owner != globex.owner
    owners = {"": RadixNamespace(None, None), "acme": acme, "sub": sub, "globex": globex}
    held = {
        (text, name): record(
            f"[{number}]\n{text}", KVContext(**{**CONTEXT.to_json(), "tenant": owner.salt})
        )  # type: ignore[arg-type]
        for number, text in enumerate((OTHER, SHARED, "e"))
        for name, owner in owners.items()
    }
    for (_, name), one in held.items():
        assert store.put(one, tenant=owners[name].owner)
    reach = erasure.Reach(tenant=acme.owner, spared=frozenset({globex.owner}))

    def left() -> set[tuple[str, str]]:
        alive = set(store.keys())
        return {name for name, one in held.items() if one.key in alive}

    runtime = watched._runtime
    runtime.passage_text, runtime.passage = OTHER, np.arange(3)
    runtime.config = dataclasses.replace(runtime.config, store_tenants=acme.owner)
    erasure.post(TextMarks.of([(OTHER, [])]), (), reach)
    assert watched.look() == 3
    assert runtime.passage.size == 3  # the operator's own; behind it are the chunks of all
    runtime.config = dataclasses.replace(runtime.config, store_tenants="*")
    runtime.forget_passage(list(erasure.notices(set()))[-1])
    assert runtime.passage.size == 0  # of an engine without tenants it may be a sample of the index
    assert left() == set(held) - {(OTHER, name) for name in ("", "acme", "sub")}
    for name in ("acme", "globex"):
        late = held[OTHER, name]
        assert watched.is_in(late, owners[name].owner) == (name == "acme")
    # One letter is in every text: it goes where it is the whole chunk, and from whoever deleted it.
    erasure.post(TextMarks.of([("e", [])]), (), reach)
    watched.look()
    assert left() == {(SHARED, ""), *((text, "globex") for text in (OTHER, SHARED, "e"))}


def test_what_waits_for_a_disk_that_hangs_never_reaches_it(
    home: Path, watched: ErasedText, record: Callable[..., ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StoreFolder(home / "own")
    hangs, goes_on = threading.Event(), threading.Event()
    put = folder.put

    def slow(one: ChunkKV, **options: Any) -> bool:
        hangs.set()
        assert goes_on.wait(60)
        return put(one, **options)

    monkeypatch.setattr(folder, "put", slow)
    counts: Counter[str] = Counter()
    writer = TierChain(
        {"disk": folder},
        count=lambda tier, kind: counts.update([kind]),
        is_erased=watched.is_in,
    )
    watched._runtime.tiers = writer
    for text in (f"[1] {SECRET}", f"[2] {SECRET}", OTHER):
        assert writer.put(record(text), context=CONTEXT)
    assert hangs.wait(60)
    watched.look()
    now = time.monotonic()
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: now + erasure.NOTICE_S + 1)
        watched.look()
    assert watched.notices.in_force == []
    goes_on.set()
    assert writer.close(60)
    assert list(folder.keys()) == [record(OTHER).key]
    assert counts == {"erased": 2, "written": 1}


def test_an_erasure_that_a_disk_refuses_is_done_again(
    home: Path, watched: ErasedText, record: Callable[..., ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = watched._runtime
    runtime.passage_text, runtime.passage = f"{SHARED} {SECRET}", np.arange(3)
    folder = StoreFolder(home / "own")
    held, filed = record(SECRET), record(f"[x] {SECRET}")
    runtime.store.put(held)
    for one in (held, filed):
        folder.put(one, context=CONTEXT)
    runtime.tiers = TierChain({"disk": folder})

    def refuse(*args: object) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    now = time.monotonic()
    with monkeypatch.context() as broken:
        broken.setattr(StoreFolder, "remove", refuse)
        for moment in (0.0, 2.0, erasure.NOTICE_S + 5):
            broken.setattr(time, "monotonic", lambda moment=moment: now + moment)
            with pytest.raises(OSError, match="Input/output"):
                watched.look()
            assert runtime.store.keys() == []
    assert len(list(folder.keys())) == 2
    watched.look()
    assert list(folder.keys()) == []
    assert runtime.passage.size == 0


def test_a_tier_that_is_down_keeps_nothing_in_the_others(
    home: Path, watched: ErasedText, record: Callable[..., ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is started anew after the notice, with that tier still down, would read it from the folder."""
    runtime = watched._runtime
    folder = StoreFolder(home / "own", model=watched._model)
    held = [record(SECRET), record(f"[x] {SECRET}")]
    filed, other = record(f"[y] {SECRET}"), record(OTHER)
    for one in held:
        runtime.store.put(one)
    for one in (*held, filed, other):
        folder.put(one, context=CONTEXT)
    down = StoreFolder(home / "far", create=True)
    runtime.passage_text, runtime.passage = f"{SHARED} {SECRET}", np.arange(3)
    runtime.tiers = TierChain({"disk": folder, "remote": down})

    def refuse(*args: object) -> bool:
        raise OSError(errno.EHOSTDOWN, "Host is down")

    with monkeypatch.context() as broken:
        for method in ("remove", "keys", "sync"):
            broken.setattr(down, method, refuse)
        with pytest.raises(OSError, match="Host is down"):
            watched.look()
        assert set(folder.keys()) == {other.key}
        assert runtime.passage.size == 0
    assert watched.notices.unfinished
    watched.look()
    assert not watched.notices.unfinished


def test_what_was_written_before_the_notice_was_seen_goes_though_memory_has_lost_it(
    home: Path, index: Path, smollm2_path: Path, record: Callable[..., ChunkKV]
) -> None:
    folder = StoreFolder(home / "own", create=True, model=str(smollm2_path))
    runtime = FusionRuntime(FusionConfig(store_dir=str(home / "own")), None)
    watch = ErasedText(runtime, str(smollm2_path))
    runtime.tiers = TierChain({"disk": folder}, is_erased=watch.is_in_written)
    watch.look()
    # Whoever deletes goes through this very folder, and the engine writes behind it.
    delete_documents(index, ["a"], erase=make_eraser(home / "own"))
    late, other = record(SECRET), record(OTHER)
    for one in (late, other):
        assert runtime.tiers.put(one, context=CONTEXT)
    assert runtime.tiers.drain(60)
    assert set(folder.keys()) == {late.key, other.key}
    watch.look()
    assert list(folder.keys()) == [other.key]
    assert runtime.tiers.close(60)


def test_a_look_that_breaks_off_forgets_nothing_that_is_left_to_do(
    home: Path, watched: ErasedText, record: Callable[..., ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notices are told once, and what was written meanwhile is asked about once."""
    runtime, folder = watched._runtime, StoreFolder(home / "own", model=watched._model)
    runtime.tiers = TierChain({"disk": folder})
    late = record(SECRET)
    assert not watched.is_in_written(late, "")  # no notice was looked for yet
    told: list[str] = []

    def break_off() -> None:
        told.append("tiers")
        if len(told) == 1:
            raise RuntimeError("not now")

    monkeypatch.setattr(runtime.tiers, "erase", break_off)
    monkeypatch.setattr(runtime.conversations, "erase", lambda is_erased: told.append("turns"))
    with pytest.raises(RuntimeError, match="not now"):
        watched.look()
    folder.put(late, context=CONTEXT)
    watched.notices.unfinished.clear()  # the folder is not gone through once more
    watched.look()
    assert told == ["tiers", "tiers", "turns"]
    assert list(folder.keys()) == []


def test_what_is_erased_from_a_tier_again_is_made_to_last(
    home: Path, watched: ErasedText, record: Callable[..., ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StoreFolder(home / "own")
    watched._runtime.tiers = TierChain({"disk": folder})
    watched.look()
    late = record(SECRET)
    watched._runtime.store.put(late)
    folder.put(late, context=CONTEXT)
    synced: list[int] = []

    def sync() -> None:
        synced.append(len(list(folder.keys())))
        if len(synced) == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folder, "sync", sync)
    with pytest.raises(OSError, match="Input/output"):
        watched.look()
    watched.look()
    watched.look()
    assert synced == [0, 0]


@pytest.mark.parametrize("given", ["model", "tokenizer", "hub"])
def test_an_engine_knows_the_folder_of_its_tokenizer_whatever_it_was_told(
    given: str, smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it nobody could read a record, and any deletion would empty the engine's store."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes((smollm2_path / "tokenizer.json").read_bytes())
    refs = cache / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    monkeypatch.chdir(smollm2_path.parent)
    told = {
        "model": SimpleNamespace(tokenizer_path=None, model_path=smollm2_path.name),
        "tokenizer": SimpleNamespace(tokenizer_path=str(smollm2_path), model_path="/none"),
        "hub": SimpleNamespace(tokenizer_path=None, model_path="some/model"),
    }[given]
    folder = tokenizer_folder(told)
    assert Path(folder).is_absolute()
    assert erasure.decoder_of(Path(folder)) is not None
    assert tokenizer_folder(SimpleNamespace(tokenizer_path=None, model_path="no such")) == "no such"

"""Deleted text goes from the index, from chunk KV on the disk and in memory, and from what waits; the rest stays.

The index, the folder of records and the engine's store are real; the vectors are drawn from the text's
hash, and KV is zeros, since nobody reads it here.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from chunk_cache import BackgroundWriter, ChunkKey, ChunkKV, KVContext, StoreFolder, TextMarks
from rag_pipeline import erasure
from rag_pipeline.erasure import erase_folder, make_eraser, post
from rag_pipeline.passage_sample import PASSAGE_NAME
from rag_pipeline.sglang_plugin.fusion.build_queue import MissingChunk
from rag_pipeline.sglang_plugin.fusion.config import FusionConfig
from rag_pipeline.sglang_plugin.fusion.erased import ErasedText
from rag_pipeline.sglang_plugin.fusion.request_state import Tenant
from rag_pipeline.sglang_plugin.fusion.runtime import FusionRuntime
from retrievers import (
    Chunk,
    Document,
    HFTokenizer,
    Index,
    Removal,
    StorageError,
    delete_documents,
    finish_removals,
    ingest,
)

SECRET = "The code of the old vault in the cellar of the town hall is 4711 and nobody knows it."
SHARED = "Every report of this town ends with the same line about the weather of the last week."
OTHER = "The lighthouse was painted green in the spring of 1931 by its keeper and his two sons."
CONTEXT = KVContext(
    model_fingerprint="m", dtype="float32", kv_dtype="float32", rope="{}", prefix_digest="p"
)


class HashEmbedder:
    """Unit vectors drawn from the text's hash."""

    name, dim, fingerprint = "hash", 4, "a" * 32

    def encode_documents(self, texts: list[str], **options: object) -> np.ndarray:
        rows = [np.random.default_rng(abs(hash(text))).normal(size=self.dim) for text in texts]
        out = np.array(rows, dtype=np.float32)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    def encode_query(self, text: str) -> np.ndarray:
        return self.encode_documents([text])[0]


class LineSplitter:
    """One chunk a line."""

    def __init__(self) -> None:
        self.settings = {"kind": "line"}
        self.tokenizer = SimpleNamespace(fingerprint="characters")

    def split(self, document: Document) -> list[Chunk]:
        return [
            Chunk(
                id=f"{document.id}#{number}",
                document_id=document.id,
                text=line,
                title=document.title,
                start=0,
                end=len(line),
                num_tokens=len(line),
                path=None,
                metadata={},
            )
            for number, line in enumerate(document.text.split("\n"))
        ]


def put(index: Path, documents: dict[str, str], **options: object) -> None:
    found = [
        Document(id=name, title=name, text=text, path=None, metadata={})
        for name, text in documents.items()
    ]
    ingest(found, index, splitter=LineSplitter(), embedder=HashEmbedder(), **options)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAG_PIPELINE_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def index(home: Path) -> Path:
    put(home / "index", {"a": f"{SECRET}\n{SHARED}", "b": f"{OTHER}\n{SHARED}"})
    return home / "index"


@pytest.fixture
def record(smollm2_path: Path) -> Callable[..., ChunkKV]:
    tokenizer = HFTokenizer(smollm2_path)

    def make(text: str, context: KVContext = CONTEXT) -> ChunkKV:
        ids = np.array(tokenizer.encode(text), dtype=np.int32)
        kv = torch.zeros(1, len(ids), 1, 2)
        return ChunkKV(
            key=ChunkKey.of(context, ids), token_ids=ids, base_position=0, k=kv, v=kv.clone()
        )

    return make


@pytest.fixture
def store(home: Path, smollm2_path: Path, record: Callable[..., ChunkKV]) -> StoreFolder:
    """Records as prompts make them: under a title, cut elsewhere, with a question behind."""
    folder = StoreFolder(home / "kv", create=True, model=str(smollm2_path))
    for text in (
        f"[a]\n{SECRET}\n\n",
        f"[a]\n{SHARED}\n\n",
        f"[b]\n{OTHER}\n\n",
        SECRET[10:60],
        f"What is the code?\n{OTHER} {SECRET}",
    ):
        folder.put(record(text), context=CONTEXT)
    return folder


def texts(folder: StoreFolder, model: Path) -> set[str]:
    tokenizer = HFTokenizer(model)
    found = (folder.token_ids(key) for key in folder.keys())  # noqa: SIM118
    return {tokenizer.decode(ids.tolist()) for ids in found if ids is not None}


def bytes_below(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_deleted_documents_text_goes_and_what_another_shares_stays(
    home: Path, index: Path, store: StoreFolder, smollm2_path: Path
) -> None:
    (index / PASSAGE_NAME).write_text(f"{OTHER} {SECRET}\n\n{SHARED}")
    delete_documents(index, ["a"], erase=make_eraser(store.path))
    assert texts(store, smollm2_path) == {f"[a]\n{SHARED}\n\n", f"[b]\n{OTHER}\n\n"}
    with Index.open(index) as opened:
        assert {chunk.text for chunk in opened.chunks()} == {OTHER, SHARED}
    assert b"4711" not in bytes_below(home)
    ids = np.array(HFTokenizer(smollm2_path).encode(SECRET[20:60])[2:-2], dtype=np.int32)
    assert ids.tobytes() not in bytes_below(home)


def test_the_old_text_of_a_replaced_document_goes_and_what_it_kept_stays(
    index: Path, store: StoreFolder, smollm2_path: Path
) -> None:
    edited = SECRET.replace("4711", "0815")
    put(index, {"a": f"{edited}\n{SHARED}"}, erase=make_eraser(store.path))
    assert texts(store, smollm2_path) == {
        f"[a]\n{SHARED}\n\n",
        f"[b]\n{OTHER}\n\n",
        SECRET[10:60],  # all of it is in the new text too
    }
    assert b"4711" not in bytes_below(index)


def test_nothing_is_erased_where_documents_only_come(
    index: Path, store: StoreFolder, smollm2_path: Path
) -> None:
    before = texts(store, smollm2_path)
    put(index, {"c": "Another town has another vault."}, erase=make_eraser(store.path))
    assert texts(store, smollm2_path) == before
    assert not list(erasure.board().iterdir())


def test_an_erasure_that_was_cut_short_is_made_up_for(
    index: Path, store: StoreFolder, smollm2_path: Path
) -> None:
    def refused(removal: Removal) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(StorageError, match="not found any more, but may lie on the disk"):
        delete_documents(index, ["a"], erase=refused)
    with Index.open(index) as opened:
        assert {record.id for record in opened.documents()} == {"b"}
    assert SECRET[10:60] in texts(store, smollm2_path)
    finish_removals(index, erase=make_eraser(store.path))
    assert texts(store, smollm2_path) == {f"[a]\n{SHARED}\n\n", f"[b]\n{OTHER}\n\n"}
    assert b"4711" not in bytes_below(index)


def test_records_that_nobody_here_can_read_go_with_any_deletion(
    index: Path, store: StoreFolder, record: Callable[..., ChunkKV], smollm2_path: Path
) -> None:
    gone = StoreFolder(store.path, model="/no/such/model")
    foreign = KVContext(**{**CONTEXT.to_json(), "model_fingerprint": "n"})  # type: ignore[arg-type]
    unreadable = record(OTHER, foreign)
    gone.put(unreadable, context=foreign)
    unnamed = record(OTHER, KVContext(**{**CONTEXT.to_json(), "prefix_digest": "q"}))  # type: ignore[arg-type]
    gone.put(unnamed)
    delete_documents(index, ["a"], erase=make_eraser(store.path))
    assert not {unreadable.key, unnamed.key} & set(store.keys())
    assert len(list(store.keys())) == 2


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
    assert watch.is_in(late)
    assert watch.look() == 1
    assert watch.look() == 0
    # And when the notice is no longer in force, the same text may come again.
    moment = time.monotonic() + erasure.NOTICE_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: moment)
    runtime.store.put(late)
    assert watch.look() == 0
    assert not watch.is_in(late)


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


def test_what_waits_to_be_built_is_erased_however_late_it_is_built(
    watched: ErasedText, record: Callable[..., ChunkKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = watched._runtime
    late, other = record(SECRET), record(OTHER)
    prefix: Any = SimpleNamespace(tenant=Tenant(None, None))
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
    assert watched.is_in(late)
    assert watched.look() == 1
    assert runtime.store.keys() == [other.key]
    # Long after it was built the text may come again.
    monkeypatch.setattr(time, "monotonic", lambda: now + 300 + erasure.NOTICE_S + 1)
    watched.look()
    assert not watched.is_in(late)


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
    writer = BackgroundWriter(
        folder,
        count=lambda kind: counts.update([kind]),
        failed=lambda error: None,
        is_erased=watched.is_in,
    )
    watched._runtime.writer = writer
    for text in (f"[1] {SECRET}", f"[2] {SECRET}", OTHER):
        assert writer.put(record(text), CONTEXT)
    assert hangs.wait(60)
    watched.look()
    now = time.monotonic()
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: now + erasure.NOTICE_S + 1)
        watched.look()
    assert watched._in_force == []
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
    runtime.writer = cast(Any, SimpleNamespace(folder=folder, erase=lambda: None))

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


def test_a_notice_holds_no_text_and_a_damaged_one_means_everything(
    home: Path, record: Callable[..., ChunkKV], smollm2_path: Path
) -> None:
    marks = TextMarks.of([(SECRET, [])])
    post(marks, [])
    assert b"vault" not in bytes_below(erasure.board())
    (notice,) = erasure.notices(set())
    assert notice.marks.are_in(f"x {SECRET[3:50]} y")
    assert not notice.marks.are_in(OTHER)
    next(erasure.board().glob("*.marks")).write_bytes(b"damaged")
    (notice,) = erasure.notices(set())
    assert notice.marks.everything


@pytest.mark.parametrize(
    ("gone", "live", "found", "kept"),
    [
        (SECRET, [SHARED], ["x" + SECRET, SECRET.replace(" ", "\n  "), SECRET[5:50]], [OTHER]),
        (SECRET, [SECRET.replace("4711", "0815")], [SECRET], [SECRET.replace("4711", "0815")]),
        (SECRET, [f"{OTHER} {SECRET}"], [], [SECRET, OTHER]),
        ("PIN 4711", [], ["the PIN  4711 is old"], ["the PIN 4712", "PIN"]),
        ("密码是四七一一", [], ["旧的密码是四七一一。"], ["密码是四七一二"]),
        ("   ", [], [], [SECRET, ""]),
    ],
)
def test_marks_find_what_is_gone_and_nothing_that_lives(
    gone: str, live: list[str], found: list[str], kept: list[str]
) -> None:
    marks = TextMarks.from_bytes(TextMarks.of([(gone, live)]).to_bytes())
    assert all(marks.are_in(text) for text in found)
    assert not any(marks.are_in(text) for text in kept)


def test_too_much_to_tell_apart_empties_the_store(
    store: StoreFolder, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "_MOST_CHUNKS", 0)
    delete_documents(index, ["a"], erase=make_eraser(store.path))
    assert not list(store.keys())
    assert erase_folder(index, TextMarks({}, everything=True)) == 0  # no store: left alone
    assert Index.open(index).manifest.num_documents == 1

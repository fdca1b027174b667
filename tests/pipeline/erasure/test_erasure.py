"""Deleted text goes from the index, from chunk KV on the disk, and from notices; the rest stays."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from erasing import CONTEXT, OTHER, SECRET, SHARED, bytes_below, put, texts

from chunk_cache import ChunkKey, ChunkKV, KVContext, StoreFolder, TextMarks, tenant_mark
from chunk_cache.side_tensors import SEEN_IDS
from rag_pipeline import erasure
from rag_pipeline.erasure import Reach, erase_folder, make_eraser, post
from rag_pipeline.notices import Notice, combined
from rag_pipeline.prompts.passage_sample import PASSAGE_NAME
from rag_pipeline.sglang_plugin import FusionConfig
from rag_pipeline.sglang_plugin.fusion.builds.erased import ErasedText
from rag_pipeline.sglang_plugin.fusion.runtime.runtime import FusionRuntime
from retrievers import (
    HFTokenizer,
    Index,
    Removal,
    StorageError,
    delete_documents,
    finish_removals,
)


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


def test_a_record_that_cannot_be_deleted_keeps_no_other_in_any_folder(
    home: Path,
    index: Path,
    store: StoreFolder,
    record: Callable[..., ChunkKV],
    smollm2_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second = StoreFolder(home / "second", create=True, model=str(smollm2_path))
    second.put(record(SECRET), context=CONTEXT)
    stuck = next(iter(store.keys()))
    remove = StoreFolder.remove

    def refuse(folder: StoreFolder, key: ChunkKey) -> bool:
        if key == stuck:
            raise OSError(1, "Operation not permitted")
        return remove(folder, key)

    everything = TextMarks({}, everything=True)
    with monkeypatch.context() as broken:
        broken.setattr(StoreFolder, "remove", refuse)
        monkeypatch.setattr(erasure, "marks_of", lambda removal: everything)
        with pytest.raises(StorageError, match="not permitted"):
            delete_documents(index, ["a"], erase=make_eraser(store.path, second.path))
    assert list(store.keys()) == [stuck]
    assert list(second.keys()) == []


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


def test_a_memory_goes_with_any_text_that_its_kv_has_seen(
    index: Path, store: StoreFolder, record: Callable[..., ChunkKV]
) -> None:
    """The tokens of its slots say nothing of it: what was evicted is in the KV of what was kept."""
    memories = {}
    for name, seen in (("m", f"{OTHER} {SECRET} {SHARED}"), ("n", f"{OTHER} {SHARED}")):
        context = KVContext(**{**CONTEXT.to_json(), "prefix_digest": name})  # type: ignore[arg-type]
        ids = torch.from_numpy(record(seen).token_ids.copy())
        memories[name] = dataclasses.replace(record(OTHER, context), side={SEEN_IDS: ids})
        store.put(memories[name], context=context)
    delete_documents(index, ["a"], erase=make_eraser(store.path))
    assert memories["m"].key not in set(store.keys())
    assert memories["n"].key in set(store.keys())


def test_what_a_tenant_deletes_stays_in_the_folder_of_those_who_cannot_have_seen_it(
    home: Path,
    index: Path,
    store: StoreFolder,
    record: Callable[..., ChunkKV],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models: list[str] = []
    decoder_of = erasure.decoder_of

    def decoder(model: Path) -> erasure.Decode | None:
        models.append("read")
        return decoder_of(model)

    marks = {name: tenant_mark(name) for name in ("acme", "globex")}
    held = {}
    for name, mark in marks.items():
        context = KVContext(**{**CONTEXT.to_json(), "tenant": f"{name}/own"})  # type: ignore[arg-type]
        held[name] = record(SECRET, context)
        store.put(held[name], context=context, tenant=mark)
    reach = Reach(tenant=marks["acme"], spared=frozenset({marks["globex"]}))
    delete_documents(index, ["a"], erase=make_eraser(store.path, reach=reach))
    left = set(store.keys())
    assert held["globex"].key in left
    assert held["acme"].key not in left
    assert len(left) == 3  # of nobody in particular, what others share
    (notice,) = erasure.notices(set())
    assert notice.reach == reach
    # A folder of an older version names the tenant otherwise: it is not known whose it is, and all of it counts.
    old = KVContext(**{**CONTEXT.to_json(), "tenant": repr(("", "globex/old"))})  # type: ignore[arg-type]
    gone = record("The PIN 4711 is old", old)
    StoreFolder(store.path).put(gone, context=old)
    short = TextMarks.of([("PIN 4711", [])])
    erase_folder(store.path, short, reach=reach)
    assert set(store.keys()) == left
    # It is told anew as soon as such a record is written again, and where what was told is gone.
    again = StoreFolder(store.path)
    for _ in range(2):
        again.put(gone, context=old, tenant=marks["globex"])
        monkeypatch.setattr(erasure, "decoder_of", decoder)
        erase_folder(store.path, short, reach=reach)
        assert set(store.keys()) == {*left, gone.key}
        (store.path / old.namespace / "context.json").unlink()
    # Whom a deletion spares costs it no tokenizer, however many namespaces there are.
    assert models == ["read"] * 2


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
    assert notice.reach == erasure.EVERYBODY


def test_thousands_of_notices_cost_a_text_one_look_and_mean_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = Reach(tenant="a"), Reach(spared=frozenset({"b"}))
    texts = [
        f"{number} of the texts that were erased, which is long enough." for number in range(9)
    ]
    told = [
        Notice(
            name=str(number),
            marks=TextMarks.of([(text if number % 3 else "short", [])]),
            folders=(),
            reach=one if number % 2 else other,
        )
        for number, text in enumerate(texts)
    ]
    few = combined(told)
    assert {notice.reach for notice in few} == {one, other}
    assert len(few) == 2
    for text in (
        *texts,
        "short",
        "it is short, and long enough to hold a run of characters",
        OTHER,
        None,
    ):
        for tenant in ("", "a", "b", "c"):
            expected = any(notice.is_about(text, tenant) for notice in told)
            assert any(notice.is_about(text, tenant) for notice in few) == expected
    everything = Notice(name="e", marks=TextMarks({}, everything=True), folders=(), reach=other)
    assert any(notice.is_about(OTHER, "") for notice in combined([*told, everything]))
    assert combined([]) == []
    # What looks through texts uses it.
    looks: list[str] = []
    are_in = TextMarks.are_in
    monkeypatch.setattr(
        TextMarks, "are_in", lambda self, text, **kw: looks.append(text) or are_in(self, text, **kw)
    )
    watch = ErasedText(FusionRuntime(FusionConfig(), None), "no-model")
    watch._decode = lambda ids: OTHER
    for number in range(500):
        post(TextMarks.of([(f"{number} {SECRET}", [])]), [])
    watch.notices.take()
    assert not watch.is_in(SimpleNamespace(key=None, token_ids=NONE), "")
    assert looks == [OTHER]


def archive(**arrays: Any) -> bytes:
    """Well-formed, as marks are written, and saying anything."""
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def compressed() -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **{"32": np.zeros(1 << 20, dtype=np.uint64)})
    return out.getvalue()


HEAD = b'{"tenant": "", "spared": []}\n'
NONE = np.zeros(3, dtype=np.uint64)


@pytest.mark.parametrize(
    "body",
    [
        None,
        b"",
        b"\xff" * 100,
        b"[" * 200_000 + b"\n",
        b'{"tenant": ' * 100_000 + b"\n",
        b"[1]\n",
        HEAD + archive(**{"-3": NONE}),
        HEAD + archive(**{"0": NONE}),
        HEAD + archive(**{"1000000000": NONE}),
        HEAD + archive(**{"32": NONE.reshape(3, 1)}),
        HEAD + archive(**{"32": NONE[0]}),
        HEAD + archive(**{"32": np.array(["a"])}),
        HEAD + archive(**{"32": np.array([0.5])}),
        HEAD + archive(**{"32": np.array([2, 1], dtype=np.uint64)}),
        HEAD + compressed(),
    ],
    ids=lambda body: repr(body)[:8],
)
def test_a_notice_of_garbage_means_everything_and_never_fails_later(body: bytes | None) -> None:
    notice = Notice.from_bytes("name", body)
    assert notice.marks.everything
    assert notice.is_about(SECRET, "")
    assert notice.is_about(None, "anybody")


@pytest.mark.parametrize(
    ("gone", "found", "kept"),
    [
        ("e", ["[title]\ne\n\n", "e"], ["[title]\nThe end", "line\n", "e\nmore", ""]),
        ("}", ["[t]\n}\n"], ["[main.c]\nint main() {\n}\n\n"]),
        ("PIN 4711", ["[a]\nPIN\n 4711\n", "PIN4711"], ["the PIN 4711", "[a]\nPIN 4711 x"]),
        (SECRET, [f"x {SECRET[4:54]} y"], [OTHER]),  # a longer one counts anywhere, as ever
    ],
)
def test_strictly_a_short_text_counts_only_where_it_is_all_of_a_chunk(
    gone: str, found: list[str], kept: list[str]
) -> None:
    marks = TextMarks.of([(gone, [])])
    for one in (marks, TextMarks.from_bytes(everything_of(marks).to_bytes())):
        assert all(one.are_in(text, strict=True) for text in found)
        assert not any(one.are_in(text, strict=True) for text in kept)
    assert all(one.are_in(text) for text in [*found, *kept])


def everything_of(marks: TextMarks) -> TextMarks:
    copied = TextMarks.from_bytes(marks.to_bytes())
    copied.everything = True
    return copied


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


@pytest.mark.parametrize("start", range(21))
def test_with_few_of_the_runs_marked_a_longer_piece_is_found_wherever_it_begins(start: int) -> None:
    marks = TextMarks.of([(SECRET, [])], step=16)
    piece = "".join(SECRET.split())[start : start + 47]
    assert len(piece) == 47
    assert marks.are_in(f"x{piece}y")
    assert not marks.are_in(OTHER)
    assert len(marks.to_bytes()) < len(TextMarks.of([(SECRET, [])]).to_bytes())


def test_of_many_chunks_what_others_have_not_stays(
    store: StoreFolder, index: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "_MOST_COMPARED", 1)
    delete_documents(index, ["a"], erase=make_eraser(store.path))
    left = texts(store, smollm2_path)
    # What another document shares is not compared, and goes too. A piece below 47 characters stays.
    (piece,) = left - {f"[b]\n{OTHER}\n\n"}
    assert len("".join(piece.split())) < 47


@pytest.mark.parametrize("tenant", ["", "acme"])
def test_too_much_to_tell_apart_empties_the_store_but_for_a_tenant_only_what_is_its_own(
    tenant: str,
    store: StoreFolder,
    index: Path,
    record: Callable[..., ChunkKV],
    smollm2_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(erasure, "_MOST_COMPARED", 0)
    monkeypatch.setattr(erasure, "_MOST_CHUNKS", 1)
    own = KVContext(**{**CONTEXT.to_json(), "tenant": "acme"})  # type: ignore[arg-type]
    store.put(record(OTHER, own), context=own, tenant=tenant_mark("acme"))
    reach = Reach(tenant=tenant_mark(tenant))
    delete_documents(index, ["a"], erase=make_eraser(store.path, reach=reach))
    # Of a piece this short no run may be marked.
    left = texts(store, smollm2_path) - {SECRET[10:60]}
    assert left == ({f"[b]\n{OTHER}\n\n"} if tenant else set())
    assert erase_folder(index, TextMarks({}, everything=True)) == 0  # no store: left alone
    assert Index.open(index).manifest.num_documents == 1


def test_a_deletion_goes_through_every_folder_that_the_settings_name(
    home: Path, tmp_path: Path
) -> None:
    common = home / "home" / "kv"
    assert FusionConfig().store_folders() == (common,)
    other = FusionConfig(store_dir=str(tmp_path / "other"))
    assert other.store_folders(None, common) == (common, tmp_path / "other")
    assert other.store_folders(tmp_path / "own")[-1] == tmp_path / "own"

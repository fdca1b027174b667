"""Deleted text goes from the chunk KV too: from every folder here, and from engines that are running.

Who deletes posts a notice first, a file in the project's folder that every engine of this user looks
at every few seconds, and then goes through the files of the chunk stores that it knows. An engine goes
through its memory, and through its own folder where that was not among them. A notice holds hashes of
the text, not the text (:class:`chunk_cache.TextMarks`). Engines that share a remote store pass it on in that store,
so that those of other machines hear of it (:mod:`chunk_cache.tiers.remote.notices`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_pipeline.config import home_dir
from rag_pipeline.notices import EVERYBODY, Notice, Reach, combined
from rag_pipeline.prompts.passage_sample import PASSAGE_NAME

if TYPE_CHECKING:
    import numpy.typing as npt

    from chunk_cache import TextMarks, Tier
    from retrievers import Erase, Removal

logger = logging.getLogger(__name__)

NOTICE_S = 180.0
"""How long a notice is kept in force, seconds: requests that found the text before it was deleted may
still bring it back to an engine's store for so long."""

_MOST_COMPARED = 4096
"""More chunks than this in one change are not compared with live ones: what both have is erased too."""
_STEP = 16
"""Then only every so many runs are marked: a piece of a chunk is found from 47 characters on, not from 32."""
_MOST_CHUNKS = 65_536
"""More chunks than this are not told apart from others: all chunk KV goes that may hold them. Where only what is
surely meant may go, fewer runs are marked, so that the marks of chunks of 1,500 characters stay below 50 MiB."""

Decode = Callable[["npt.NDArray[Any]"], str]


def board() -> Path:
    """Folder of the notices."""
    return home_dir() / "erased"


def make_eraser(*stores: Path, reach: Reach = EVERYBODY, remote: str = "") -> Erase:
    """Erase what leaves an index from chunk KV; to be passed to ``ingest`` and ``delete_documents``.

    Parameters
    ----------
    *stores : Path
        Folders of chunk KV; one that is no store, or not there, is passed over. Where one cannot be gone through, all
        else is done, and then :class:`OSError` is raised.
    reach : Reach
        Whose chunk KV.
    remote : str
        Address of a store whose servers are told at once, by whoever has no engine that would pass the notice on.
        Where it does not answer, erasing raises :class:`OSError` when all else is done.
    """

    def erase(removal: Removal) -> None:
        from chunk_cache import connect_board

        marks = marks_of(removal)
        if not marks:
            return
        notice = post(marks, stores, reach)
        passage = removal.old.parent / PASSAGE_NAME
        if passage.exists() and marks.are_in(passage.read_text("utf-8", "replace")):
            # A new sample is drawn at the next start of an engine.
            passage.unlink(missing_ok=True)
        refused: OSError | None = None
        for store in stores:
            try:
                erase_folder(store, marks, reach=reach)
            except OSError as error:
                refused = refused or error
        told = connect_board(remote) if remote else None
        if told is not None:
            told.post(notice.name, notice.to_bytes())
        if refused is not None:
            raise refused

    return erase


def marks_of(removal: Removal) -> TextMarks:
    """Marks of the chunks that are gone: of few, without text that live ones hold too."""
    from chunk_cache import TextMarks

    few = list(islice(removal.chunks(), _MOST_COMPARED + 1))
    if len(few) <= _MOST_COMPARED:
        return TextMarks.of(
            (chunk.text, [live.text for live in removal.live_like(chunk.text)]) for chunk in few
        )
    texts = ((chunk.text, ()) for chunk in removal.chunks())
    step = _STEP * max(1, math.ceil(removal.num_rows / _MOST_CHUNKS))
    return TextMarks.of(texts, step=step, most=_MOST_CHUNKS)


def post(marks: TextMarks, folders: Sequence[Path], reach: Reach = EVERYBODY) -> Notice:
    """Tell the engines that are running on this machine.

    Raises
    ------
    OSError
        Where the notice cannot be written.
    """
    from chunk_cache import write_private

    _remove_old()
    name = f"{time.time_ns():020d}-{secrets.token_hex(6)}"
    meta = {
        "folders": [str(path.absolute()) for path in folders],
        "tenant": reach.tenant,
        "spared": sorted(reach.spared),
    }
    write_private(board() / f"{name}.json", json.dumps(meta).encode())
    # Read by its presence, so it comes last.
    write_private(board() / f"{name}.marks", marks.to_bytes())
    return Notice(name=name, marks=marks, folders=tuple(map(str, folders)), reach=reach)


def keep(name: str) -> None:
    """Keep a notice of this machine for as long again, if it is still there: somebody was not told yet."""
    for suffix in ("json", "marks"):
        with contextlib.suppress(OSError):
            os.utime(board() / f"{name}.{suffix}")


def names() -> set[str]:
    """Names of all notices that lie there, those that are no longer in force among them."""
    with contextlib.suppress(OSError):
        return {path.stem for path in board().glob("*.marks")}
    return set()


def notices(seen: set[str], *, most_age_s: float = NOTICE_S) -> Iterator[Notice]:
    """Notices that are not among those `seen`, and not older than so many seconds; they are added to them."""
    from chunk_cache import TextMarks

    with contextlib.suppress(OSError):
        for path in sorted(board().glob("*.marks")):
            if path.stem in seen or _age(path) > most_age_s:
                continue
            seen.add(path.stem)
            try:
                marks = TextMarks.from_bytes(path.read_bytes())
                meta = json.loads(path.with_suffix(".json").read_bytes())
                folders = tuple(map(str, meta["folders"]))
                reach = Reach(tenant=str(meta["tenant"]), spared=frozenset(meta["spared"]))
            except Exception as error:
                # What it says is not known, so everything may be meant.
                logger.warning("Notice %s of erased text cannot be read: %s", path, error)
                marks, folders, reach = TextMarks({}, everything=True), (), EVERYBODY
            yield Notice(name=path.stem, marks=marks, folders=folders, reach=reach)


def erase_folder(path: Path, marks: TextMarks, *, reach: Reach = EVERYBODY) -> int:
    """Delete the records of a chunk store that hold text that is gone; returns how many.

    Parameters
    ----------
    path : Path
        The folder; nothing is done where there is no store.
    marks : TextMarks
        What is gone.
    reach : Reach
        Whose records.

    Raises
    ------
    OSError
        Where a file cannot be deleted, and where the folder cannot be looked through: it is another user's, of a later
        format, or does not answer.
    """
    return sweep_folder(path, [Notice(name="", marks=marks, folders=(), reach=reach)])


def sweep_folder(path: Path, told: Sequence[Notice]) -> int:
    """Do what several notices say in one pass through a folder, as :func:`erase_folder` does for one."""
    from chunk_cache import ChunkCacheError, GuardedTier, StoreFolder, holds_store

    class NoStoreError(Exception):
        """Nothing of ours can lie there."""

    def connect() -> Tier:
        if not holds_store(path):
            raise NoStoreError
        # One of an older format is emptied, as at an engine's start: nobody finds its records, but they hold text.
        return StoreFolder(path, create=True)

    try:
        store = GuardedTier.open_folder(connect, name=str(path))
    except NoStoreError:
        return 0
    except ChunkCacheError as error:
        raise OSError(f"{path} was not looked through for deleted text: {error}") from None
    return sweep(store, told)


def sweep(store: Tier, told: Sequence[Notice], *, models: Mapping[str, str] | None = None) -> int:
    """Delete the records of any tier that hold text that is gone; returns how many.

    A record that cannot be deleted keeps none of the others.

    Parameters
    ----------
    store : Tier
        What to go through, once for all notices.
    told : sequence of Notice
        What is gone, and whose records.
    models : mapping of str to str, optional
        Folders of models by their fingerprint: who wrote a record on another machine tells a folder of that one.

    Raises
    ------
    OSError, ChunkCacheError
        The first thing that failed: where a record cannot be deleted, when all others are gone; where the tier does not
        answer, at once.
    """
    from chunk_cache import ChunkCacheError, TierDownError

    refused: Exception | None = None
    namespaces: dict[str, tuple[str, str]] = {}
    decoders: dict[str, Decode | None] = {"": None}
    gone = 0
    told = combined(told)
    for key in store.keys():  # noqa: SIM118 - not a mapping
        space = key.namespace
        if space not in namespaces:
            fields = store.describe(space) or {}
            own = (models or {}).get(str(fields.get("model_fingerprint")))
            namespaces[space] = store.tenant_of(space), str(own or fields.get("model") or "")
        tenant, folder = namespaces[space]
        asking = [notice for notice in told if not notice.reach.spares(tenant)]
        if not asking:
            continue
        if folder not in decoders:
            decoders[folder] = decoder_of(Path(folder))
        read = decoders[folder]
        ids = store.seen_ids(key)
        # What nobody here can read may hold the text: it is a cache, and goes.
        text = None if read is None or ids is None else read(ids)
        if not any(notice.is_about(text, tenant) for notice in asking):
            continue
        try:
            gone += store.remove(key)
        except (OSError, ChunkCacheError) as error:
            refused = refused or error
            if isinstance(error, TimeoutError | TierDownError):
                raise refused from None
    # Also where nothing was found: an earlier attempt may have removed it and failed to make that last.
    store.sync()
    if refused is not None:
        raise refused
    return gone


def decoder_of(model: Path) -> Decode | None:
    """Token ids to text, by the tokenizer of a model's folder; None where it has none."""
    from retrievers import HFTokenizer, RetrievalError

    try:
        tokenizer = HFTokenizer(model)
    except (RetrievalError, OSError):
        return None
    return lambda ids: tokenizer.decode(ids.tolist())


def _remove_old() -> None:
    for path in board().glob("*.*"):
        if _age(path) > 2 * NOTICE_S:
            with contextlib.suppress(OSError):
                path.unlink()


def _age(path: Path) -> float:
    try:
        return time.time() - os.stat(path).st_mtime  # noqa: PTH116
    except OSError:
        return 0.0

"""Every write, sync and rename fails once, and from then on: the old state or the new one, and one line that says so."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from chunk_cache import StoreFolder
from rag_eval.io_faults import CHANGES, DiskCalls, Fault
from rag_eval.reliability.figure import Outcome, Plan
from rag_eval.reliability.small_state import (
    CONTEXT,
    advance,
    holds,
    leftovers,
    lines,
    record,
    secret,
    stored,
    texts,
)

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS)
_MOST_CALLS = 1000


def run(plan: Plan) -> Outcome:
    """Full size: every call of an ingest, a deletion and three changes of the store, with each error."""
    outcome = Outcome()
    # A share of the full size takes every so manyth call, beginning elsewhere for each kind of fault.
    stride = 8 if plan.quick else max(1, round(1 / plan.scale))
    if stride > 1:
        outcome.note = f"every {stride}th call"
    base = plan.folder / "base"
    advance(base / "index", 0)
    store = StoreFolder(base / "store", create=True)
    for number in (0, 1):
        store.put(record(number), context=CONTEXT)
    advance_from = {"ingest": 2, "delete": 1}
    for shift, (name, code, lasting) in enumerate(_kinds()):
        if name in advance_from:
            attempt = _index_attempt(advance_from[name])
        else:
            attempt = _store_attempt(name)
        with _expected_warnings_unsaid():
            calls = _each_call(
                plan.folder, base, code, lasting, shift % stride, stride, attempt, outcome
            )
        outcome.worst[f"{name}_calls"] = max(calls, outcome.worst.get(f"{name}_calls", 0))
        if not calls:
            outcome.fault(f"{name}: no call could be made to fail")
    return outcome


@contextlib.contextmanager
def _expected_warnings_unsaid() -> Iterator[None]:
    """Keep hundreds of warnings about the faults out of the terminal."""
    logger = logging.getLogger("retrievers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _kinds() -> Iterator[tuple[str, int, bool]]:
    for name in ("ingest", "delete", "put", "pin", "remove"):
        for code in CODES:
            # A full disk still lets files be removed.
            if (name, code) != ("remove", errno.ENOSPC):
                yield from ((name, code, lasting) for lasting in (False, True))


Attempt = Callable[[Path, DiskCalls, int], str]
"""Does it once under a fault and once more without; returns what was not as promised."""


def _each_call(
    folder: Path,
    base: Path,
    code: int,
    lasting: bool,
    first: int,
    stride: int,
    attempt: Attempt,
    outcome: Outcome,
) -> int:
    """Let the calls fail one after the other; returns how many were reached."""
    kinds = CHANGES + (("unlink", "rmdir") if code != errno.ENOSPC else ())
    reached = 0
    # A shorter action than the stride still has its first call tried.
    for nth in (0, *range(first or stride, _MOST_CALLS, stride)):
        tried = folder / "tried"
        shutil.copytree(base, tried)
        fault = Fault(kinds=kinds, nth=nth, errno=code, lasting=lasting)
        disk = DiskCalls(tried, fault=fault)
        try:
            wrong = attempt(tried, disk, code)
        except Exception as error:
            wrong = f"{type(error).__name__} {error}"
        shutil.rmtree(tried)
        if not disk.failed:
            break
        reached += 1
        outcome.tried += 1
        if wrong:
            call = disk.failed[0]
            how = "from then on" if lasting else "once"
            where = f"{errno.errorcode[code]} {how} at {call.kind} {Path(call.path).name}"
            outcome.fault(f"{where} (call {nth}): {wrong}")
    return reached


def _index_attempt(state: int) -> Attempt:
    """Change the index from state 0; a deletion or the next edition."""

    def attempt(folder: Path, disk: DiskCalls, code: int) -> str:
        from rag_pipeline.server.errors import refusal_of
        from retrievers import StorageError

        index, failed = folder / "index", None
        with disk:
            try:
                advance(index, state)
            except StorageError as error:
                failed = error
        found = texts(index)
        if found not in (lines(0), lines(state)):
            return "neither the old state nor the new one"
        if failed is None:
            if found != lines(state):
                return "the old state, and no error"
        else:
            status = (refusal_of(failed) or (500,))[0]
            if failed.errno != code or "\n" in str(failed) or status < 500:
                return f"status {status}, number {failed.errno}: {failed}"
        if found != lines(state):
            advance(index, state)
        # What the fault left goes with the next change at the latest.
        advance(index, 4)
        if texts(index) != lines(4) or leftovers(index):
            return f"the next change left {leftovers(index)}"
        if holds(index, secret(0)):
            return "text of the old state is left"
        return ""

    return attempt


def _store_attempt(name: str) -> Attempt:
    """Put, pin or remove one record."""

    def act(store: StoreFolder) -> object:
        if name == "put":
            return store.put(record(2), context=CONTEXT)
        return store.pin(record(0).key) if name == "pin" else store.remove(record(0).key)

    wanted = {"put": {0, 1, 2}, "pin": {0, 1}, "remove": {1}}[name]

    def attempt(folder: Path, disk: DiskCalls, code: int) -> str:
        store = StoreFolder(folder / "store")
        with disk, contextlib.suppress(OSError):
            act(store)
        found, wrong = stored(store.path)
        if wrong or found not in ({0, 1}, wanted):
            return "; ".join(wrong) or f"records {sorted(found)}"
        store.sweep()
        if found != wanted or name == "pin":
            act(store)
        found, wrong = stored(store.path)
        if wrong or found != wanted or store.unfinished() != (0, 0):
            return f"afterwards {wrong} records {sorted(found)}, unfinished {store.unfinished()}"
        return ""

    return attempt

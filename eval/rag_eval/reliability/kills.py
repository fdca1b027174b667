"""SIGKILL at random moments of a process that ingests, deletes and stores: all is readable, nothing stays behind."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from chunk_cache import StoreFolder
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
from retrievers import finish_removals

_KEPT = 12
"""Records in the store at most; older ones are removed one by one."""
_PUTS = 8
"""Records that are stored between two changes of the index."""
_FULL = 1000
_KINDS = ("ingest", "delete", "store")

Message = tuple[str, str, int]
"""``begin`` or ``done``, a kind of change, and its number; the first of all is ``ready``."""


def run(plan: Plan) -> Outcome:
    """Full size: 1,000 kills."""
    outcome, rng = Outcome(), random.Random(plan.seed)
    kills = plan.size(_FULL, 40)
    outcome.note = f"{kills} of {_FULL} kills" if kills < _FULL else ""
    # Forked from a process that has all modules and no threads: a child is there at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch", "faiss"])
    advance(plan.folder / "index", 0)
    StoreFolder(plan.folder / "store", create=True)
    state, number = 0, 0
    spans: dict[str, float] = {}
    hit: Counter[str] = Counter()
    for kill in range(kills):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_write, args=(plan.folder, state, number, theirs))
        child.start()
        theirs.close()
        seen = [ours.recv()]
        if not spans:
            spans = _times(ours, seen)
        # In turns: a moment of an ingest, of a deletion, of records being stored.
        _wait_for(ours, seen, _KINDS[kill % len(_KINDS)])
        time.sleep(rng.uniform(0, spans[_KINDS[kill % len(_KINDS)]]))
        child.kill()
        child.join()
        seen += _rest(ours)
        outcome.tried += 1
        done = [message for message in seen if message[0] == "done"]
        begun = seen[-1][1] if seen[-1][0] == "begin" else "nothing"
        hit[begun] += 1
        state = max(
            (value for _, what, value in done if what in ("ingest", "delete")), default=state
        )
        number = max((value + 1 for _, what, value in done if what == "store"), default=number)
        try:
            state, number = look(plan.folder, state, number, outcome, f"kill {kill} in {begun}")
        except Exception as error:
            outcome.fault(f"kill {kill} in {begun}: {type(error).__name__} {error}")
            break
    outcome.worst |= {f"kills_in_{name}": hit[name] for name in _KINDS}
    if missed := [name for name in _KINDS if not hit[name] and kills >= 20]:
        outcome.fault(f"no kill fell into {', '.join(missed)}")
    return outcome


def _write(folder: Path, state: int, number: int, say: Connection[Any, Any]) -> None:
    """Change the index and the store until killed; tell before and after each change."""
    say.send(("ready", "", 0))
    store = StoreFolder(folder / "store")
    while True:
        state += 1
        what = "delete" if state % 2 else "ingest"
        say.send(("begin", what, state))
        advance(folder / "index", state)
        say.send(("done", what, state))
        for _ in range(_PUTS):
            say.send(("begin", "store", number))
            store.put(record(number), context=CONTEXT)
            store.pin(record(number).key)
            if number >= _KEPT:
                store.remove(record(number - _KEPT).key)
            say.send(("done", "store", number))
            number += 1


def _times(ours: Connection[Any, Any], seen: list[Message]) -> dict[str, float]:
    """Watch two editions come and go; how long each kind of change takes, seconds."""
    begun: dict[str, float] = {}
    times: dict[str, float] = {}
    while sum(message[:2] == ("done", "delete") for message in seen) < 3:
        seen.append(ours.recv())
        word, what, _ = seen[-1]
        if word == "begin":
            begun[what] = time.monotonic()
        elif what in begun:
            times[what] = max(time.monotonic() - begun[what], times.get(what, 0.0))
    # Several records follow one another.
    return times | {"store": _PUTS * times["store"]}


def _wait_for(ours: Connection[Any, Any], seen: list[Message], what: str) -> None:
    """Wait until a change of a kind begins."""
    while ours.poll():
        seen.append(ours.recv())
    while seen[-1][:2] != ("begin", what):
        seen.append(ours.recv())


def _rest(ours: Connection[Any, Any]) -> list[Message]:
    """Read what was said before the end."""
    said = []
    try:
        while True:
            said.append(ours.recv())
    except (EOFError, OSError):
        ours.close()
    return said


def look(folder: Path, state: int, number: int, outcome: Outcome, when: str) -> tuple[int, int]:
    """Read index and store as they were left, start anew, and look for what should not be there."""
    found = texts(folder / "index")
    states = {lines(value): value for value in (state, state + 1)}
    if found not in states:
        outcome.fault(f"{when}: the index is neither in state {state} nor in the next")
        raise ValueError("the state of the index is not known")
    state = states[found]
    numbers, wrong = stored(folder / "store")
    for text in wrong:
        outcome.fault(f"{when}: {text}")
    kept = set(range(max(0, number - _KEPT + 1), number))
    if lost := kept - numbers:
        outcome.fault(f"{when}: records {sorted(lost)} were stored and are gone")
    # What the start of a server does.
    finish_removals(folder / "index")
    store = StoreFolder(folder / "store")
    store.sweep()
    left = leftovers(folder / "index") + leftovers(folder / "store")
    outcome.measure("leftovers", len(left))
    if left:
        outcome.fault(f"{when}: left after the next start: {left[:5]}")
    for old in range(max(0, state - 5), state):
        if secret(old) not in lines(state) and holds(folder / "index", secret(old)):
            outcome.fault(f"{when}: text of state {old} is left in state {state}")
    if texts(folder / "index") != lines(state):
        outcome.fault(f"{when}: the start changed the index")
    return state, max([number, *(found + 1 for found in numbers)])

"""Reading what a request asks of the memory; whatever is malformed is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rag_pipeline.protocol.fusion_request import RequestError
from rag_pipeline.protocol.memory_step import ID_DIGITS, MemoryFields, MemoryLoad, MemoryStore

MAX_LOADS = 2
"""Records that one request may load."""
MAX_MEMORY_SPANS = 256
"""Spans whose kept share one report tells."""
MAX_OWN_SPANS = 1024
"""Spans of tokens that stay before others."""
MAX_RULE = 200
"""Characters of a rule with its parameters."""
MAX_BUDGET = 1 << 20
"""Slots per layer and head."""

_HEX = frozenset("0123456789abcdef")


def read_memory(value: Any, *, mode: str, prefix_len: int, prompt_len: int) -> MemoryFields | None:
    """Check the field ``memory`` of a request.

    Parameters
    ----------
    value : mapping, str or None
        As :meth:`MemoryFields.to_json` writes it, or the same as JSON.
    mode : str
        Of the request.
    prefix_len, prompt_len : int
        Tokens of the prefix and of the prompt.

    Returns
    -------
    MemoryFields or None
        None where nothing is asked.

    Raises
    ------
    RequestError
        One line: what was given, what is allowed.
    """
    if value is None:
        return None
    fields = _object(value)
    _known(fields, ("load", "store", "spans"), "memory")
    if mode != "fuse":
        raise RequestError(
            f"fusion memory in mode {mode!r}; only mode 'fuse' has a memory, leave one out."
        )
    load = _read_loads(fields.get("load"), prefix_len, prompt_len)
    end = load[0].end if load else prefix_len
    store = _read_store(fields.get("store"), end, prompt_len)
    if len(load) > 1 and store is not None:
        raise RequestError(
            "fusion memory store behind two loads; a record is made from one other: load one, or store nothing."
        )
    if not load and store is None:
        raise RequestError("fusion memory asks for nothing; give load, store or both.")
    return MemoryFields(
        load=load, store=store, spans=_read_ranges(fields.get("spans"), "spans", MAX_MEMORY_SPANS)
    )


def _object(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RequestError(f"fusion memory is {value!r:.80}; give an object of JSON.") from None
    if not isinstance(value, Mapping):
        raise RequestError(f"fusion memory is {value!r:.80}; give an object with load or store.")
    return value


def _known(fields: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for key in fields:
        if key not in names:
            raise RequestError(
                f"fusion {where} field {key!r:.80} is not known; allowed: {', '.join(names)}."
            )


def _read_loads(value: Any, prefix_len: int, prompt_len: int) -> tuple[MemoryLoad, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RequestError(
            f"fusion memory load is {value!r:.80}; give a list of start, end and id."
        )
    if len(value) > MAX_LOADS:
        raise RequestError(
            f"fusion memory loads {len(value)} records; at most {MAX_LOADS} are allowed."
        )
    loads = tuple(_read_load(one, prefix_len, prompt_len) for one in value)
    if len({(load.start, load.end) for load in loads}) > 1:
        raise RequestError(
            "fusion memory loads name different slots; give the same start and end for each."
        )
    if len({load.id for load in loads}) < len(loads):
        raise RequestError("fusion memory loads one record twice; name it once.")
    return loads


def _read_load(value: Any, prefix_len: int, prompt_len: int) -> MemoryLoad:
    if not isinstance(value, Mapping):
        raise RequestError(f"fusion memory load {value!r:.80}; give start, end and id.")
    _known(value, ("start", "end", "id"), "memory load")
    start, end = value.get("start"), value.get("end")
    if type(start) is not int or start != prefix_len:
        raise RequestError(
            f"fusion memory load starts at {start!r:.80}; slots stand right behind the prefix: give {prefix_len}."
        )
    if type(end) is not int or not start < end < prompt_len:
        raise RequestError(
            f"fusion memory load ends at {end!r:.80}; give a whole number above {start} and below the "
            f"prompt's {prompt_len} tokens."
        )
    name = value.get("id")
    if not isinstance(name, str) or len(name) != ID_DIGITS or not _HEX.issuperset(name):
        raise RequestError(
            f"fusion memory id is {name!r:.80}; give the {ID_DIGITS} hex digits of a memory id."
        )
    return MemoryLoad(start=start, end=end, id=name)


def _read_store(value: Any, load_end: int, prompt_len: int) -> MemoryStore | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise RequestError(f"fusion memory store is {value!r:.80}; give end, budget and rule.")
    _known(value, ("end", "budget", "rule", "own", "own_share"), "memory store")
    end, budget, rule = value.get("end"), value.get("budget"), value.get("rule")
    if type(end) is not int or not load_end < end <= prompt_len:
        raise RequestError(
            f"fusion memory store ends at {end!r:.80}; give a whole number above {load_end} (a block stands "
            f"behind what is loaded) and up to the prompt's {prompt_len} tokens."
        )
    if type(budget) is not int or not 0 < budget <= MAX_BUDGET:
        raise RequestError(
            f"fusion memory budget is {budget!r:.80}; give a whole number from 1 to {MAX_BUDGET}."
        )
    if not isinstance(rule, str) or not 0 < len(rule) <= MAX_RULE:
        raise RequestError(
            f"fusion memory rule is {rule!r:.80}; give a name such as 'epicache', with its parameters, of at "
            f"most {MAX_RULE} characters."
        )
    _check_rule(rule, has_probe=end < prompt_len)
    own, share = _read_own(value)
    return MemoryStore(end=end, budget=budget, rule=rule, own=own, own_share=share)


def _read_own(store: Mapping[str, Any]) -> tuple[tuple[tuple[int, int], ...], float]:
    own = _read_ranges(store.get("own"), "own", MAX_OWN_SPANS)
    if any(later[0] < earlier[1] for earlier, later in pairwise(own)):
        raise RequestError(
            "fusion memory own spans overlap or do not rise; give disjoint ones in rising order."
        )
    share = store.get("own_share")
    if share is None:
        return own, 1.0
    if not own:
        raise RequestError(
            f"fusion memory own_share is {share!r:.80} without own spans; give them, or leave it out."
        )
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
        raise RequestError(
            f"fusion memory own_share is {share!r:.80}; give a number above 0 and up to 1."
        )
    return own, float(share)


def _check_rule(text: str, *, has_probe: bool) -> None:
    # Brings torch in, which a client that only writes requests has no use for.
    from chunk_cache.retention import create_rule

    try:
        rule = create_rule(text)
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(str(error)) from None
    except Exception as error:  # one of another distribution
        raise RequestError(f"retention rule {text!r:.80} cannot be made: {error!r:.200}") from error
    if rule.probe in ("patched", "repeat") and not has_probe:
        raise RequestError(
            f"fusion memory rule {text!r:.80} scores by a probe, and none stands behind the store's end; add one."
        )


def _read_ranges(value: Any, what: str, most: int) -> tuple[tuple[int, int], ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RequestError(f"fusion memory {what} is {value!r:.80}; give [[start, end], ...].")
    if len(value) > most:
        raise RequestError(
            f"fusion memory {what} has {len(value)} ranges; at most {most} are allowed."
        )
    ranges = []
    for pair in value:
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, (str, bytes))
        if not is_pair or len(pair) != 2 or not all(type(edge) is int for edge in pair):
            raise RequestError(f"fusion memory {what} {pair!r:.80}; give [start, end].")
        if not 0 <= pair[0] < pair[1] < 2**31:
            raise RequestError(
                f"fusion memory {what} {pair!r:.80}; give true positions, 0 or more, the end above the start."
            )
        ranges.append((pair[0], pair[1]))
    return tuple(ranges)

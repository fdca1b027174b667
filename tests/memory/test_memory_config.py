"""What a user writes for a memory."""

from __future__ import annotations

from typing import Any

import pytest

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.memory import MemoryConfig, parse_memory


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("epicache", MemoryConfig()),
        (True, MemoryConfig()),
        ({"budget_tokens": 512, "episodes": 2}, MemoryConfig(budget_tokens=512, episodes=2)),
        ("snapkv:window=32", MemoryConfig(method="snapkv:window=32")),
        ("off", None),
        (False, None),
        ({"method": "off"}, None),
        (None, None),
    ],
)
def test_what_is_given_is_read(given: Any, expected: MemoryConfig | None) -> None:
    assert parse_memory(given) == expected


def test_what_is_not_given_is_the_servers() -> None:
    server = MemoryConfig(budget_tokens=768, method="keydiff")
    assert parse_memory(None, server) == server
    assert parse_memory({"episodes": 2}, server) == MemoryConfig(
        budget_tokens=768, method="keydiff", episodes=2
    )


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("epicash", "'epicash' is not known; choose one of epicache"),
        ("snapkv:windows=3", "windows"),
        ("full:window=3", "'full' has no options"),
        ({"budget": 3}, "'budget' is not known; allowed: method, budget_tokens"),
        ({"budget_tokens": "many"}, "budget_tokens is 'many'; give a whole number from 16"),
        ({"budget_tokens": True}, "budget_tokens is True"),
        ({"own_share": 1.5}, "own_share is 1.5; give a number from 0.0 to 1.0"),
        ({"merge_margin": "x"}, "merge_margin is 'x'; give a number"),
        ({"recluster_drift": float("nan")}, "recluster_drift is nan"),
        ({"method": 5}, "method is 5"),
        (5, "memory is a int"),
    ],
)
def test_bad_input_gets_one_line(given: Any, line: str) -> None:
    with pytest.raises(RagPipelineError) as refused:
        parse_memory(given)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)

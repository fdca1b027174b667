"""The circuit breaker, with a clock that a test moves."""

from __future__ import annotations

from typing import Any

import pytest

from chunk_cache.tiers.breaker import CircuitBreaker


@pytest.fixture
def breaker(clock: Any) -> CircuitBreaker:
    return CircuitBreaker(first_wait_s=1.0, most_wait_s=5.0, clock=clock)


def test_everybody_may_call_while_calls_succeed(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        permit = breaker.enter()
        assert permit is not None
        assert not breaker.success(permit)
    assert breaker.state == "closed"


def test_one_failure_keeps_everybody_out_until_one_has_tried(
    breaker: CircuitBreaker, clock: Any
) -> None:
    permit = breaker.enter()
    assert breaker.failure(permit)
    assert (breaker.state, breaker.enter(), breaker.wait_s) == ("open", None, 1.0)
    clock.now += 1.0
    assert breaker.state == "half-open"
    attempt = breaker.enter()
    assert attempt is not None
    assert breaker.enter() is None, "only one tries"
    assert breaker.success(attempt)
    assert (breaker.state, breaker.wait_s) == ("closed", 0.0)
    assert breaker.enter() is not None


def test_tries_that_fail_wait_twice_as_long_up_to_a_bound(
    breaker: CircuitBreaker, clock: Any
) -> None:
    breaker.failure(breaker.enter())
    waits = []
    for _ in range(4):
        clock.now += breaker.wait_s
        assert not breaker.failure(breaker.enter()), "it was open before"
        waits.append(breaker.wait_s)
    assert waits == [2.0, 4.0, 5.0, 5.0]


def test_calls_that_were_under_way_say_nothing_any_more(
    breaker: CircuitBreaker, clock: Any
) -> None:
    first, second, third = (breaker.enter() for _ in range(3))
    assert breaker.failure(first)
    assert not breaker.failure(second)
    assert breaker.wait_s == 1.0, "ten that time out together count once"
    assert not breaker.success(third)
    assert breaker.state == "open"


def test_a_try_that_never_reports_is_given_up(breaker: CircuitBreaker, clock: Any) -> None:
    breaker.failure(breaker.enter())
    clock.now += 1.0
    lost = breaker.enter()
    clock.now += 1.0
    again = breaker.enter()
    assert again is not None
    assert not breaker.success(lost)
    assert breaker.success(again)


def test_a_failure_after_a_recovery_begins_at_the_first_wait(
    breaker: CircuitBreaker, clock: Any
) -> None:
    breaker.failure(breaker.enter())
    clock.now += 1.0
    breaker.failure(breaker.enter())
    clock.now += 2.0
    breaker.success(breaker.enter())
    breaker.failure(breaker.enter())
    assert breaker.wait_s == 1.0

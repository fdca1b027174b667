"""Options that a user names become a configuration, or one line that says what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from rag_kernels.options import make_config


@dataclass(frozen=True, kw_only=True)
class Config:
    """One field of every kind."""

    count: int = 1
    share: float = 0.5
    draft: bool = False
    mark: str = ""
    limit: float | None = None
    order: Literal["rise", "fall"] = "rise"


@pytest.mark.parametrize(
    ("given", "as_text"),
    [
        ({"count": 3}, {"count": "3"}),
        ({"share": 1}, {"share": "1"}),
        ({"draft": True}, {"draft": "true"}),
        ({"mark": "x"}, {"mark": "x"}),
        ({"limit": 2.5}, {"limit": "2.5"}),
        ({"order": "fall"}, {"order": "fall"}),
    ],
)
def test_values_and_texts_give_the_same_configuration(
    given: dict[str, Any], as_text: dict[str, str]
) -> None:
    made = make_config("toy 'x'", Config, given)
    assert made == Config(**given) == make_config("toy 'x'", Config, as_text, from_text=True)
    assert type(made.share) is float
    assert make_config("toy 'x'", Config, {"limit": None}).limit is None


@pytest.mark.parametrize(
    ("given", "from_text", "says"),
    [
        ({"size": 1}, False, "toy 'x' has no option 'size'; allowed: count, share,"),
        ({"count": True}, False, "option count is True; expected int"),
        ({"count": "3"}, False, "option count is '3'; expected int"),
        ({"count": "3.5"}, True, "option count is '3.5'; expected int"),
        ({"count": str(2**60)}, True, "expected int"),
        ({"share": "nan"}, True, "option share is 'nan'; expected float"),
        ({"draft": "yes"}, True, "option draft is 'yes'; expected true or false"),
        ({"order": "up"}, False, "expected one of rise, fall"),
    ],
)
def test_what_does_not_fit_is_one_line(given: dict[str, Any], from_text: bool, says: str) -> None:
    with pytest.raises(ValueError, match=r"^toy 'x'") as refused:
        make_config("toy 'x'", Config, given, from_text=from_text)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)

"""An order of documents in which PowerAttention reads the best ones from the question."""

from __future__ import annotations

import itertools
import random

import pytest

from rag_pipeline.errors import RagPipelineError
from rag_pipeline.prompts.power_order import (
    lost_in_the_middle_order,
    place_for_power,
    placement_of,
)

SMALL = {"before": 11, "behind": 9, "method": "power:block=8+window=2"}


def read_shares(order, lengths, before, behind, block=8, window=2, sink=1):
    """What the last row reads of each document, token by token."""
    last = before + sum(lengths) + behind - 1

    def is_read(at):
        distance = last // block - at // block
        return distance < window or distance & (distance - 1) == 0 or at < sink * block

    shares, at = {}, before
    for index in order:
        shares[index] = sum(is_read(at + i) for i in range(lengths[index])) / lengths[index]
        at += lengths[index]
    return tuple(shares[index] for index in range(len(lengths)))


def worth(shares):
    return sum((1 if share == 1 else share / 2) / rank for rank, share in enumerate(shares, 1))


def drawn(count, seed):
    source = random.Random(seed)
    return [source.randint(3, 20) for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_shares_are_those_of_the_definition(count):
    for seed in range(5):
        lengths = drawn(count, seed)
        order = random.Random(seed).sample(range(count), count)
        want = read_shares(order, lengths, 11, 9)
        got = placement_of(order, lengths, **SMALL)
        assert got.order == tuple(order)
        assert got.shares == pytest.approx(want)
        assert got.one_hop() == sum(share == 1 for share in want)
        assert got.one_hop(3) == sum(share == 1 for share in want[:3])


@pytest.mark.parametrize("count", [1, 2, 5, 8, 14])
def test_the_order_found_is_never_worse_than_the_usual_ones(count):
    for seed in range(6):
        lengths = drawn(count, seed)
        found = place_for_power(lengths, **SMALL)
        assert sorted(found.order) == list(range(count))
        assert found.shares == placement_of(found.order, lengths, **SMALL).shares
        for order in (range(count)[::-1], lost_in_the_middle_order(count)):
            assert (
                worth(found.shares)
                >= worth(placement_of(list(order), lengths, **SMALL).shares) - 1e-9
            )


def test_few_documents_are_placed_nearly_as_well_as_can_be():
    reached = []
    for seed in range(12):
        lengths = drawn(5, seed)
        orders = itertools.permutations(range(5))
        most = max(worth(read_shares(order, lengths, 11, 9)) for order in orders)
        reached.append(worth(place_for_power(lengths, **SMALL).shares) / most)
    assert min(reached) > 0.85
    assert sum(share > 0.999 for share in reached) >= 8


def test_documents_of_one_block_at_powers_of_two_are_all_one_hop_away():
    """Sixteen documents of a block each: those at 1, 2, 4, 8 and 16 blocks are read, and those of the window."""
    around = {"before": 8, "behind": 8, "method": "power:block=8+window=1"}
    found = place_for_power([8] * 16, **around)
    assert found.one_hop(5) == 5
    assert {17 - 1 - found.order.index(rank) for rank in range(5)} == {1, 2, 4, 8, 16}
    assert found.one_hop() == 5
    assert placement_of(range(16)[::-1], [8] * 16, **around).one_hop(5) == 3


def test_the_best_stand_at_both_ends():
    assert lost_in_the_middle_order(5) == [1, 3, 4, 2, 0]
    assert lost_in_the_middle_order(0) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [3, 0]}, "lengths of 0 tokens and more"),
        ({"behind": 0}, "0 behind them"),
        ({"before": -1}, "-1 before"),
        ({"method": "block_topk"}, "chooses by the prompt"),
        ({"method": "powder"}, "'powder' is not known"),
        ({"order": [0, 0]}, r"order \[0, 0\] does not name each of 2 documents once"),
    ],
)
def test_what_names_no_prompt_is_refused(change, message):
    fields = {"order": [0, 1], "lengths": [3, 4], **SMALL} | change
    with pytest.raises(RagPipelineError, match=message):
        placement_of(**fields)

"""Products of few bf16 rows against torch's, any number of rows and threads; what is torch's to compute is left to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCE

from rag_kernels import linear_rows

_probe = torch.zeros(1, 32, dtype=torch.bfloat16)
needs_bf16 = pytest.mark.skipif(
    linear_rows(_probe, _probe.expand(16, 32).contiguous()) is None,
    reason="no library, or a CPU that has no AVX512-BF16 or has AMX",
)


@needs_bf16
@pytest.mark.parametrize("rows", [1, 5, 6, 50, 145])
@pytest.mark.parametrize(("depth", "columns"), [(576, 960), (1536, 576), (32, 16), (64, 112)])
@pytest.mark.parametrize("adds", [False, True])
def test_every_shape(rows, depth, columns, adds):
    x = torch.randn(rows, 2 * depth).bfloat16()[:, :depth]
    weight = torch.randn(columns, depth).bfloat16() / depth**0.5
    bias = torch.randn(columns).bfloat16() if adds else None
    found = linear_rows(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), exact, **TOLERANCE[torch.bfloat16])


@needs_bf16
def test_neither_threads_nor_other_rows_change_a_bit():
    x, weight = torch.randn(50, 576).bfloat16(), torch.randn(576, 576).bfloat16()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(linear_rows(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0][17:18], linear_rows(x[17:18], weight))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((3, 64), (32, 32), None),
        ((3, 48), (32, 48), None),
        ((3, 64), (24, 64), None),
        ((3, 64), (32, 64), (16,)),
        ((1, 3, 64), (32, 64), None),
        ((0, 64), (32, 64), None),
        ((1025, 64), (32, 64), None),
    ],
)
def test_sizes_that_are_left_to_torch(x, weight, bias):
    given = [
        None if shape is None else torch.zeros(shape).bfloat16() for shape in (x, weight, bias)
    ]
    assert linear_rows(*given) is None


def test_types_and_strides_that_are_left_to_torch():
    x, weight = torch.zeros(4, 64), torch.zeros(32, 64).bfloat16()
    assert linear_rows(x, weight) is None
    assert linear_rows(x.bfloat16(), weight.float()) is None
    assert linear_rows(x.bfloat16(), weight, torch.zeros(32)) is None
    assert linear_rows(torch.zeros(64, 4).bfloat16().t(), weight) is None
    assert linear_rows(torch.zeros(4, 65).bfloat16()[:, :64], weight) is None
    assert linear_rows(x.bfloat16().to("meta"), weight) is None

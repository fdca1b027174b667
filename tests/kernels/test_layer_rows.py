"""Operations of a layer on few rows: against the torch operations that SGLang runs on a CPU, on any number of threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCE

from rag_kernels import gate_rows, norm_rows, turn_rows
from rag_kernels.native.library import load_library

pytestmark = pytest.mark.skipif(
    load_library() is None, reason="the library cannot be built on this machine"
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def norm_reference(x, weight, eps, residual):
    total = x.float() if residual is None else x.float() + residual.float()
    share = torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (total * share * weight).to(x.dtype), total.to(x.dtype)


def turn_reference(x, cos, sin, is_neox):
    a, b = x.chunk(2, dim=-1) if is_neox else (x[..., ::2], x[..., 1::2])
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat(turned, dim=-1) if is_neox else torch.stack(turned, dim=-1).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 19), (50, 576), (99, 1000)])
@pytest.mark.parametrize("adds", [False, True])
def test_norm(rows, dim, dtype, adds, threads):
    wide = torch.randn(rows, 2 * dim).to(dtype)
    x, weight = wide[:, :dim], torch.rand(dim).to(dtype)
    residual = wide[:, dim:] if adds else None
    found, total = norm_rows(x, weight, 1e-5, residual)
    want, want_total = norm_reference(x, weight, 1e-5, residual)
    torch.testing.assert_close(found, want, **TOLERANCE[dtype])
    assert (total is None) is not adds
    assert not adds or torch.equal(total, want_total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [64, 16])
def test_turn(rotary_dim, is_neox, dtype, threads):
    qkv = torch.randn(145, 15 * 64).to(dtype)
    q, k, _ = qkv.split([9 * 64, 3 * 64, 3 * 64], dim=-1)
    positions, table = torch.randint(0, 300, (145,)), torch.randn(300, rotary_dim).to(dtype)
    cos, sin = (part[:, None] for part in table[positions].chunk(2, dim=-1))
    found = turn_rows(q, k, positions, table, head_dim=64, is_neox_style=is_neox)
    for one, rows in zip(found, (q, k), strict=True):
        heads = rows.reshape(145, -1, 64)
        turned = turn_reference(heads[..., :rotary_dim], cos, sin, is_neox)
        want = torch.cat([turned, heads[..., rotary_dim:]], dim=-1).reshape(rows.shape)
        torch.testing.assert_close(one, want, **TOLERANCE[dtype])
        # Each product is rounded as torch rounds it; fp32 may add one up without that.
        assert dtype == torch.float32 or torch.equal(one, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 19), (145, 1536)])
def test_gate(rows, dim, dtype, threads):
    x = 4 * torch.randn(rows, 2 * dim).to(dtype)
    x[0, :4] = torch.tensor([0.0, -200.0, 200.0, float("nan")])
    want = F.silu(x[:, :dim]) * x[:, dim:]
    torch.testing.assert_close(gate_rows(x), want, equal_nan=True, **TOLERANCE[dtype])


def test_threads_change_no_bit():
    x, weight = torch.randn(130, 3072).bfloat16(), torch.rand(3072).bfloat16()
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((norm_rows(x, weight, 1e-5, x)[0], gate_rows(x)))
    torch.set_num_threads(before)
    for norm, gate in found[1:]:
        assert torch.equal(norm, found[0][0])
        assert torch.equal(gate, found[0][1])


def test_what_it_does_not_serve_is_left_to_the_caller():
    x, weight = torch.randn(4, 32), torch.rand(32)
    assert norm_rows(x, weight.bfloat16(), 1e-5) is None
    assert norm_rows(x.double(), weight.double(), 1e-5) is None
    assert norm_rows(x, weight[:16], 1e-5) is None
    assert norm_rows(x, weight, 1e-5, x[:2]) is None
    assert norm_rows(x.t().contiguous().t(), weight, 1e-5) is None
    assert gate_rows(x[:, :31]) is None
    assert gate_rows(x[None]) is None
    at, table = torch.arange(4), torch.randn(9, 16)
    assert turn_rows(x, x, at.int(), table, head_dim=16, is_neox_style=True) is None
    assert turn_rows(x, x, at, table.bfloat16(), head_dim=16, is_neox_style=True) is None
    assert turn_rows(x, x[:2], at, table, head_dim=16, is_neox_style=True) is None
    assert turn_rows(x, x, at, table, head_dim=12, is_neox_style=True) is None


@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_without_angles_is_told(position):
    x, table = torch.randn(2, 32), torch.randn(9, 16)
    with pytest.raises(IndexError, match="angles of 9 positions"):
        turn_rows(x, x, torch.tensor([0, position]), table, head_dim=16, is_neox_style=True)

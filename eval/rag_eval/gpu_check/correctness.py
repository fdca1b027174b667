"""Every kernel of a device against the plain fp32 reference on the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rag_kernels import (
    ATTENTION_KERNELS,
    AttentionCall,
    BlockMask,
    MethodsOfPass,
    RequestBlocks,
    RotarySpec,
    attention_mass,
    choose_kernel,
    create_attention_method,
    join_mean_shifts,
    load_spans_inplace,
    mean_shift_inplace,
    plan_attention_mass,
    plan_mean_shift,
    plan_position_causal,
    plan_span_load,
)
from rag_kernels.attention.reference import ReferenceKernel

_LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_LENGTHS, _ROWS = (1500, 700, 300, 90), (260, 700, 1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One attention call."""

    name: str
    q_heads: int = 8
    kv_heads: int = 2
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    cap: float | None = None
    mask: tuple[int, int, int] | None = None
    """Heads, query block and key block of a block mask."""
    pool: torch.dtype | None = None
    """Of the pool, if not that of the queries."""
    method: str = ""
    """A static attention method, whose mask is taken."""


CASES = (
    Case(name="bf16 128"),
    Case(name="fp16 64", dim=64, dtype=torch.float16),
    Case(name="fp32 64, 3 heads per key head", q_heads=9, kv_heads=3, dim=64, dtype=torch.float32),
    Case(name="bf16 80", dim=80),
    Case(name="bf16 window", window=100),
    Case(name="bf16 cap", cap=20.0),
    Case(name="bf16 blocks, all heads", mask=(1, 64, 64)),
    Case(name="bf16 blocks, per key head", mask=(2, 128, 32)),
    Case(name="bf16 blocks, per query head", mask=(8, 64, 256)),
    Case(name="bf16 power", method="power:block=64+window=2"),
    Case(name="bf16 over fp8", pool=torch.float8_e4m3fn),
)


def check_attention(device: torch.device) -> Iterator[dict[str, Any]]:
    """Each kernel that runs on the device, on each case that it takes."""
    for name in ATTENTION_KERNELS.names():
        if name == "reference" or choose_refusal(name, device) is not None:
            continue
        for case in CASES:
            yield _check_case(name, case, device)


def choose_refusal(name: str, device: torch.device) -> str | None:
    """Why a kernel does not run on a device, or None."""
    return ATTENTION_KERNELS.get(name)().refuse_device(device)


def _check_case(kernel: str, case: Case, device: torch.device) -> dict[str, Any]:
    call = make_call(kernel, case, device)
    told: dict[str, Any] = {"what": f"attention {kernel}", "case": case.name}
    chosen = choose_kernel(kernel, device)
    refusal = chosen.refuse(call)
    if refusal is not None:
        return told | {"refused": refusal, "ok": True}
    wide = [pool.to(case.dtype) for pool in (call.k_pool, call.v_pool)]
    want = ReferenceKernel().attend(dataclasses.replace(call, k_pool=wide[0], v_pool=wide[1]))
    try:
        got = chosen.attend(call).float()
    except Exception as error:  # the other kernels and cases are still worth the machine's time
        return told | {"failed": repr(error)[:300]}
    return told | _verdict(got, want.float(), _LIMITS[case.dtype])


def make_call(kernel: str, case: Case, device: torch.device) -> AttentionCall:
    """Scattered, contiguous, single and no rows, over shuffled slots."""
    generator = torch.Generator().manual_seed(7)
    total = sum(_LENGTHS)
    slots = list(torch.randperm(total, generator=generator).to(device).split(_LENGTHS))
    positions = [
        torch.randperm(length, generator=generator)[:rows]
        for length, rows in zip(_LENGTHS, _ROWS, strict=True)
    ]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    plan = plan_position_causal(
        positions,
        slots,
        num_q_heads=case.q_heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.dim,
        kernel=kernel,
        device=device,
    )
    mask = None
    if case.mask is not None:
        heads, query_block, key_block = case.mask
        mask = BlockMask(
            requests=tuple(
                RequestBlocks(
                    allowed=(
                        torch.rand(
                            heads,
                            -(-length // query_block),
                            -(-length // key_block),
                            generator=generator,
                        )
                        < 0.3
                    ).to(device),
                    query_block=query_block,
                    key_block=key_block,
                )
                for length in _LENGTHS
            )
        )
    call = AttentionCall(
        q_RNH=random(sum(_ROWS), case.q_heads, case.dim),
        k_pool=random(total, case.kv_heads, case.dim).to(case.pool or case.dtype),
        v_pool=random(total, case.kv_heads, case.dim).to(case.pool or case.dtype),
        plan=plan,
        scale=case.dim**-0.5,
        sliding_window=case.window,
        logit_cap=case.cap,
        mask=mask,
    )
    if case.method:
        one = create_attention_method(case.method)
        methods = MethodsOfPass(plan, [one] * len(_LENGTHS))
        call = dataclasses.replace(call, mask=methods.mask(1, call))
    return call


def check_operations(device: torch.device) -> Iterator[dict[str, Any]]:
    """Loading, attention mass and mean shift: the device against the CPU in fp32."""
    generator = torch.Generator().manual_seed(3)
    spec = RotarySpec.from_inv_freq(500000.0 ** -(torch.arange(0, 128, 2) / 128), 128, True)
    lengths, deltas = (400, 1, 300), (2000, 0, -77)
    sources = [torch.randn(n, 4, 128, generator=generator) for n in lengths]
    slots = torch.randperm(2048, generator=generator)[: sum(lengths)]
    for dtype in (torch.bfloat16, torch.float32):
        pools = []
        for place, kind in ((torch.device("cpu"), torch.float32), (device, dtype)):
            k_pool = torch.zeros(2048, 4, 128, device=place, dtype=kind)
            v_pool = torch.zeros_like(k_pool)
            parts = [source.to(place, dtype).to(kind) for source in sources]
            plan = plan_span_load(list(slots.to(place).split(lengths)), deltas, spec)
            load_spans_inplace(k_pool, v_pool, parts, parts, plan)
            pools.append(torch.stack([k_pool, v_pool]).float().cpu())
        name = str(dtype).removeprefix("torch.")
        yield {"what": "load and rotate", "case": name} | _verdict(
            pools[1], pools[0], _LIMITS[dtype]
        )
    keys = torch.randn(2048, 4, 128, generator=generator)
    queries = torch.randn(40, 16, 128, generator=generator)
    places = torch.randperm(2048, generator=generator)
    rows_of, lengths_of = ((0, 25), (25, 25), (25, 40)), (1500, 48, 500)
    at = [
        torch.arange(length)[-max(1, high - low) :]
        for (low, high), length in zip(rows_of, lengths_of, strict=True)
    ]
    at[1] = at[1][:0]
    masses = []
    for place in (torch.device("cpu"), device):
        mass_plan = plan_attention_mass(rows_of, at, places.to(place).split(lengths_of))
        masses.append(attention_mass(queries.to(place), keys.to(place), mass_plan, 0.088).cpu())
    yield {"what": "attention mass", "case": "25, 0 and 15 rows of 2048"} | _verdict(
        masses[1], masses[0], 1e-5
    )
    shifted = []
    new = torch.randn(2, 300, 4, 128, generator=generator)
    rows = torch.randperm(1600, generator=generator)[:300].sort().values
    for place in (torch.device("cpu"), device):
        k_pool, v_pool = keys.to(place).clone(), keys.to(place).clone()
        spans = [(start, start + 200) for start in range(0, 1600, 200)]
        shift = join_mean_shifts(
            [
                plan_mean_shift(spans, rows, places.to(place)[:1600], spec),
                plan_mean_shift([(0, 448)], rows[:40] // 4, places.to(place)[1600:], spec),
            ]
        )
        mean_shift_inplace(k_pool, v_pool, new[0].to(place), new[1].to(place), shift)
        shifted.append(torch.stack([k_pool, v_pool]).cpu())
    yield {"what": "mean shift", "case": "8 chunks and 1"} | _verdict(shifted[1], shifted[0], 2e-5)


def _verdict(got: Tensor, want: Tensor, limit: float) -> dict[str, Any]:
    error = float((got - want).abs().max())
    return {"error": error, "limit": limit, "ok": error <= limit}

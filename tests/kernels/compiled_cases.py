"""Run by test_triton.py in a process of its own: compile the kernels for sm_90a without a GPU; prints JSON."""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rag_kernels.attention.triton import position_causal_kernel
from rag_kernels.load_triton import load_spans_kernel

HOPPER = GPUTarget("cuda", 90, 32)


def build(
    kernel, types: list[str], constants: dict[str, object], warps: int, stages: int
) -> dict[str, object]:
    """Compile with the divisibility facts that the run-time specialiser would find."""
    names = kernel.arg_names
    signature = dict(zip(names, types + ["constexpr"] * len(constants), strict=True))
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name != "window" and name != "table_row")
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs=attrs,
    )
    made = triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages})
    ptx = made.asm["ptx"]
    return {
        "target": "sm_90a" in ptx,
        "wgmma": ptx.count("wgmma.mma_async"),
        "async_copies": ptx.count("cp.async."),
        "shared_bytes": made.metadata.shared,
        "cubin_bytes": len(made.asm["cubin"]),
    }


def attention(
    element: str, dim: int, cap: bool, window: bool, rows: int = 128
) -> dict[str, object]:
    """One variant of the attention kernel."""
    types = (
        [f"*{element}"] * 4
        + ["*i32", "*i64"]
        + ["*i32"] * 4
        + ["*i64", "fp32", "fp32"]
        + ["i32"] * 9
    )
    constants = {
        "GROUP": 4,
        "DIM": dim,
        "DIM_PAD": dim,
        "ROWS": rows,
        "KEYS": 64,
        "HAS_CAP": cap,
        "HAS_WINDOW": window,
    }
    return build(position_causal_kernel, types, constants, 8 if rows >= 128 else 4, 2)


if __name__ == "__main__":
    load_types = ["*bf16", "*bf16", "*i64", "*bf16", "*bf16", "*i32", "*fp32", "*fp32"]
    load_types += ["i32"] * 9
    load_constants = {
        "DIM": 128,
        "DIM_PAD": 128,
        "V_DIM": 128,
        "V_DIM_PAD": 128,
        "HALF": 64,
        "NEOX": True,
    }
    print(
        json.dumps(
            {
                "attention bf16 128": attention("bf16", 128, False, False),
                "attention bf16 64": attention("bf16", 64, False, False),
                "attention bf16 64, 16 rows": attention("bf16", 64, False, False, rows=16),
                "attention fp16 128 cap window": attention("fp16", 128, True, True),
                "load bf16 128": build(load_spans_kernel, load_types, load_constants, 1, 2),
            }
        )
    )

"""Run by test_triton.py in a process of its own: compile the kernels for sm_90a without a GPU; prints JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rag_kernels.attention.triton_kernel import position_causal_kernel
from rag_kernels.load_triton import load_spans_kernel

HOPPER = GPUTarget("cuda", 90, 32)


# Arguments that the run-time specialiser would not find divisible by 16.
ODD = {"window", "table_row", "num_tiles", "max_blocks", "first_query_block"}


def build(
    kernel, types: dict[str, str], constants: dict[str, object], warps: int, stages: int
) -> dict[str, object]:
    """Compile with the divisibility facts that the run-time specialiser would find."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in ODD)
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
    } | resources(made.asm["cubin"])


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes per thread that did not fit into them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listed)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def attention(
    element: str, dim: int, cap: bool, window: bool, rows: int = 128, key_block: int = 0
) -> dict[str, object]:
    """One variant of the attention kernel."""
    kernel = position_causal_kernel
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{element}")
    types |= {"positions_ptr": "*i32", "slots_ptr": "*i64", "tiles_ptr": "*i64"}
    types |= {"allowed_ptr": "*u8", "block_count_ptr": "*i32", "block_index_ptr": "*i32"}
    types |= {"scale": "fp32", "logit_cap": "fp32"}
    constants = {
        "GROUP": 4,
        "DIM": dim,
        "DIM_PAD": dim,
        "ROWS": rows,
        "KEYS": min(64, key_block) if key_block else 64,
        "KEY_BLOCK": key_block,
        "HAS_CAP": cap,
        "HAS_WINDOW": window,
    }
    return build(kernel, types, constants, 8 if rows >= 128 else 4, 2)


if __name__ == "__main__":
    kinds = ["*bf16", "*bf16", "*i64", "*bf16", "*bf16", "*i32", "*fp32", "*fp32"]
    kinds += ["i32"] * (len(load_spans_kernel.arg_names) - len(kinds))
    load_types = dict(zip(load_spans_kernel.arg_names, kinds, strict=True))
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
                "attention bf16 128 blocks of 32": attention("bf16", 128, False, False, 128, 32),
                "attention bf16 128 blocks of 256": attention("bf16", 128, False, False, 128, 256),
                "load bf16 128": build(load_spans_kernel, load_types, load_constants, 1, 2),
            }
        )
    )

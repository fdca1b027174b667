"""What the Triton kernels become on a GPU that need not be there: registers, spills, tensor-core instructions.

``python -m rag_eval.gpu_check.compiled --out FILE`` compiles every kernel for Hopper, with the facts about its arguments
that a launch would find. ``--arch 90`` is the target; nothing is run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rag_pipeline.whole_file import write_whole

# Integers that a launch would not find divisible by 16, whatever the model.
_ODD = {
    "window",
    "table_row",
    "num_tiles",
    "max_blocks",
    "first_query_block",
    "query_block",
    "num_runs",
    "num_tokens",
    "mass_head",
}


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, object], warps: int, arch: int = 90
) -> dict[str, Any]:
    """Compile one variant of a kernel, and count.

    Parameters
    ----------
    kernel : triton.JITFunction
        Made without ``TRITON_INTERPRET``.
    types : dict
        Type of each argument that is no constant, as Triton writes it.
    constants : dict
        Values of its ``constexpr`` arguments.
    warps : int
        Warps of a program.
    arch : int
        Compute capability, 90 for Hopper.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in _ODD)
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attrs,
    )
    options = {"num_warps": warps, "num_stages": 2}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, cubin = made.asm["ptx"], made.asm["cubin"]
    return {
        "target": re.search(r"\.target (\S+?)[,\s]", ptx).group(1),  # type: ignore[union-attr]
        "warps": warps,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "async_copies": ptx.count("cp.async."),
        "shared_bytes": made.metadata.shared,
        "cubin_bytes": len(cubin),
    } | _in_cubin(cubin)


def _in_cubin(cubin: bytes) -> dict[str, int]:
    """Registers per thread, bytes per thread that did not fit into them, tensor-core instructions of the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def told(option: str) -> str:
            call = [str(tool), option, file.name]
            return subprocess.run(call, capture_output=True, text=True, check=True).stdout

        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told("--dump-resource-usage")))
        code = told("-sass")
    return {
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "tensor_core_instructions": len(re.findall(r"\b(?:HGMMA|HMMA|QGMMA|IGMMA)\.", code)),
    }


def _attention(
    element: str,
    dim: int,
    *,
    pool: str = "",
    cap: bool = False,
    window: bool = False,
    rows: int = 128,
    key_block: int = 0,
    group: int = 4,
) -> tuple[Any, dict[str, str], dict[str, object], int]:
    from rag_kernels.attention.triton_kernel import position_causal_kernel as kernel

    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("q_ptr", "out_ptr"), f"*{element}")
    types |= dict.fromkeys(("k_ptr", "v_ptr"), f"*{pool or element}")
    types |= {"positions_ptr": "*i32", "slots_ptr": "*i64", "tiles_ptr": "*i64"}
    types |= {"allowed_ptr": "*u8", "block_count_ptr": "*i32", "block_index_ptr": "*i32"}
    types |= {"scale": "fp32", "logit_cap": "fp32"}
    constants: dict[str, object] = {
        "GROUP": group,
        "DIM": dim,
        "DIM_PAD": dim,
        "ROWS": rows,
        "KEYS": min(64, key_block) if key_block else 64,
        "KEY_BLOCK": key_block,
        "HAS_CAP": cap,
        "HAS_WINDOW": window,
    }
    return kernel, types, constants, 8 if rows >= 128 else 4


def _load() -> tuple[Any, dict[str, str], dict[str, object], int]:
    from rag_kernels.load_triton import load_spans_kernel as kernel

    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("k_pool_ptr", "v_pool_ptr", "k_src_ptr", "v_src_ptr"), "*bf16")
    types |= {"slots_ptr": "*i64", "token_rows_ptr": "*i32", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    sizes: dict[str, object] = dict.fromkeys(("DIM", "DIM_PAD", "V_DIM", "V_DIM_PAD"), 128)
    return kernel, types, sizes | {"HALF": 64, "NEOX": True}, 1


def _mass(kernel: Any, dim: int) -> tuple[Any, dict[str, str], dict[str, object], int]:
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= {"q_ptr": "*bf16", "k_ptr": "*bf16", "positions_ptr": "*i32", "slots_ptr": "*i64"}
    types |= {"runs_ptr": "*i32", "best_ptr": "*fp32", "total_ptr": "*fp32", "mass_ptr": "*fp32"}
    types |= {"scale": "fp32"}
    sizes: dict[str, object] = {"GROUP": 4, "DIM": dim, "DIM_PAD": dim, "ROWS": 64, "KEYS": 64}
    return kernel, types, sizes, 4


def _shift(
    kernel: Any, extra: dict[str, int]
) -> tuple[Any, dict[str, str], dict[str, object], int]:
    types = dict.fromkeys(kernel.arg_names, "i32")
    rows = ("k_old_ptr", "v_old_ptr", "k_new_ptr", "v_new_ptr", "k_pool_ptr", "v_pool_ptr")
    types |= dict.fromkeys(rows, "*bf16")
    types |= dict.fromkeys(("rows_ptr", "old_rows_ptr", "slots_ptr"), "*i64")
    types |= dict.fromkeys(("bounds_ptr", "chunks_ptr"), "*i32")
    types |= dict.fromkeys(("weights_ptr", "cos_ptr", "sin_ptr", "shift_ptr"), "*fp32")
    sizes: dict[str, object] = {"DIM": 128, "DIM_PAD": 128, "HALF": 64, "NEOX": True}
    return kernel, types, sizes | extra, 4


def variants() -> Iterator[tuple[str, tuple[Any, dict[str, str], dict[str, object], int]]]:
    """Name and arguments of :func:`build` of every variant; the shapes are those of Llama-3.1-8B unless named."""
    from rag_kernels.mass_triton import mass_kernel, mass_statistics_kernel
    from rag_kernels.shift_triton import add_shift_kernel, chunk_shift_kernel

    yield "attention bf16 128", _attention("bf16", 128)
    yield "attention bf16 64", _attention("bf16", 64)
    yield "attention bf16 64, 16 rows", _attention("bf16", 64, rows=16)
    yield "attention fp16 128 cap window", _attention("fp16", 128, cap=True, window=True)
    yield "attention bf16 128 over fp8", _attention("bf16", 128, pool="fp8e4nv")
    yield "attention bf16 128 blocks of 32", _attention("bf16", 128, key_block=32)
    yield "attention bf16 128 blocks of 64", _attention("bf16", 128, key_block=64)
    yield "attention bf16 128 blocks of 256", _attention("bf16", 128, key_block=256)
    yield "load bf16 128", _load()
    yield "mass statistics bf16 128", _mass(mass_statistics_kernel, 128)
    yield "mass bf16 128", _mass(mass_kernel, 128)
    yield "mass bf16 64", _mass(mass_kernel, 64)
    yield "shift of chunks bf16 128", _shift(chunk_shift_kernel, {"PROBES": 16})
    yield "shift of rows bf16 128", _shift(add_shift_kernel, {"TOKENS": 16})


def main(words: Sequence[str] | None = None) -> int:
    """Compile all variants and write what they became.

    Parameters
    ----------
    words : sequence of str, optional
        Command line without the program; that of the process by default.
    """
    import torch
    import triton

    parser = argparse.ArgumentParser(
        prog="python -m rag_eval.gpu_check.compiled", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for Hopper")
    given = parser.parse_args(words)
    report = {
        "command": f"python -m rag_eval.gpu_check.compiled --out {given.out} --arch {given.arch}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "note": "compiled, not run: no GPU was there",
        "kernels": {name: build(*rest, arch=given.arch) for name, rest in variants()},
    }
    write_whole(given.out, json.dumps(report, indent=1) + "\n")
    for name, one in report["kernels"].items():
        print(
            f"{name:34} registers {one['registers']:3}  spilled {one['spilled_bytes']:3}  "
            f"shared {one['shared_bytes']:6}  wgmma {one['wgmma']:3}  "
            f"in SASS {one['tensor_core_instructions']:3}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The files to take to a machine with a GPU and no network: ``python -m rag_eval.gpu_check.carry --out FILE.zip``.

The archive is unpacked anywhere and its folder put on the path. It holds this project, and of FlashInfer and what that
imports, and of SGLang, what a Llama on Hopper needs, as far as they are installed here; torch, Triton, transformers and
nvcc must be there. FlashInfer's kernels are compiled at their first use.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

MOST_BYTES = 60_000_000
"""What fits through."""

_PROJECT = ("rag_kernels", "rag_eval", "rag_pipeline", "chunk_cache", "retrievers")
_OTHERS = {
    "flashinfer": re.compile(
        r"(experimental|moe_ep|fused_moe/backends|kda_kernels|gdn_kernels/(blackwell|delta_rule_dsl)"
        r"|topk_varlen/kernels|attention/prims_ts/kernels|data/aot|data/cccl/python"
        r"|data/cutlass/(examples|python|test|media|docs|tools/(library|profiler))"
        r"|data/csrc/(?!(batch_prefill|batch_decode|single_prefill|single_decode|page|rope|cascade"
        r"|quantization|tvm_ffi_|utils|norm|renorm|sampling|logging)))"
    ),
    "tvm_ffi": re.compile(r"(cython|testing)/"),
    "sglang": re.compile(r"(multimodal_gen|test|benchmark)/|srt/.*\.so$|.*rust.*\.so$"),
}
"""Packages of others, and what is left out of them, from the start of a path below the package."""

_DISTRIBUTIONS = ("rag-pipeline", "flashinfer-python", "apache-tvm-ffi", "sglang")


def files() -> Iterator[tuple[str, Path]]:
    """Names in the archive, and where the files lie; nothing for a package that is not installed."""
    for package in (*_PROJECT, *_OTHERS):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        root = Path(next(iter(spec.submodule_search_locations)))
        left_out = _OTHERS.get(package)
        loaded = _loaded(package) if left_out is not None else frozenset[str]()
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if not path.is_file() or "__pycache__" in name or path.suffix == ".pyc":
                continue
            if left_out is None or str(path) in loaded or not left_out.match(name):
                yield f"{package}/{name}", path


def _loaded(package: str) -> frozenset[str]:
    """Files that importing a package loads, whatever folder they lie in."""
    script = (
        f"import sys, {package}\n"
        "for one in list(sys.modules.values()): print(getattr(one, '__file__', None) or '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    return frozenset(done.stdout.splitlines())


def pack(out: Path) -> dict[str, tuple[int, int, int]]:
    """Write the archive; files, bytes and bytes in the archive of each package.

    Parameters
    ----------
    out : Path
        Zip file, replaced if it is there.
    """
    sizes: dict[str, tuple[int, int, int]] = {}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, path in files():
            archive.write(path, name)
            info = archive.getinfo(name)
            count, raw, packed = sizes.get(name.split("/")[0], (0, 0, 0))
            sizes[name.split("/")[0]] = (
                count + 1,
                raw + info.file_size,
                packed + info.compress_size,
            )
        for name, text in metadata():
            archive.writestr(name, text)
    return sizes


def metadata() -> Iterator[tuple[str, str]]:
    """What an installation would say of the packages: versions, and the entry points that SGLang finds the plugin by."""
    for distribution in _DISTRIBUTIONS:
        try:
            found = importlib.metadata.distribution(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        folder = f"{distribution.replace('-', '_')}-{found.version}.dist-info"
        for name in ("METADATA", "entry_points.txt"):
            text = found.read_text(name)
            if text is not None:
                yield f"{folder}/{name}", text


def main(words: Sequence[str] | None = None) -> int:
    """Pack, and print what is in it; 1 where it is too large.

    Parameters
    ----------
    words : sequence of str, optional
        Command line without the program; that of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m rag_eval.gpu_check.carry", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="zip file to write")
    given = parser.parse_args(words)
    sizes = pack(given.out)
    for package, (count, raw, packed) in sizes.items():
        print(f"{package:14} {count:6} files  {raw / 1e6:7.1f} MB  packed {packed / 1e6:6.1f} MB")
    for package in _OTHERS:
        if package not in sizes:
            print(f"{package:14} not installed here: its part will say 'not there'")
    whole = given.out.stat().st_size
    print(f"{'together':14} {whole / 1e6:.1f} MB of at most {MOST_BYTES / 1e6:.0f}")
    return int(whole > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())

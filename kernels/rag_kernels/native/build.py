"""From the C++ sources to a shared library in the user's cache folder; once per source, compiler and kind of CPU."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("attention.cpp", "selection.cpp", "estimate.cpp", "load.cpp", "rows.cpp", "linear.cpp")
HEADERS = (
    "numbers.h",
    "product.h",
    "sale_integers.h",
    "sale_keys.h",
    "sale_look.h",
    "sale_rows.h",
    "sale_thresholds.h",
)
COMPILE = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-strict-aliasing", "-w")
"""Not linked with OpenMP: its symbols are found in the library that torch brought along, so there is one team."""
_TIMEOUT_S = 300.0


class BuildError(Exception):
    """The library cannot be built here; one line that says why."""


def built_library(folder: Path | None = None) -> Path:
    """Path of the library, built now unless an earlier process did.

    Two processes that come at the same time wait for each other; the file appears under its name when it is whole.

    Parameters
    ----------
    folder : Path, optional
        Where libraries are kept; by default ``kernels`` in the user's cache folder.

    Raises
    ------
    BuildError
        There is no compiler, it failed, or the folder cannot be used.
    """
    compiler = _compiler()
    try:
        kept = _own_folder(_cache_folder() if folder is None else folder)
        path = kept / f"rag_kernels-{_key(compiler)}.so"
        if _is_ours(path):
            return path
        with (kept / "build.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_ours(path):
                _build(compiler, path)
    except OSError as error:
        raise BuildError(f"{type(error).__name__}: {error}") from error
    return path


def _compiler() -> str:
    """Path of the C++ compiler: ``$CXX`` where it is set, else the system's."""
    named = os.environ.get("CXX")
    names = [named] if named else ["c++", "g++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise BuildError(f"no C++ compiler ({', '.join(names)}) on the PATH; install g++ or set CXX")


def _cache_folder() -> Path:
    try:
        from platformdirs import user_cache_path
    except ImportError as error:  # a machine for kernels alone
        raise BuildError("platformdirs is not installed") from error
    return Path(user_cache_path("rag-pipeline")) / "kernels"


def _own_folder(folder: Path) -> Path:
    """The folder, made if need be. What lies in it is run, so nobody else may write there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_others(folder)
    return folder


def _is_ours(path: Path) -> bool:
    if not path.exists():
        return False
    _refuse_others(path)
    return True


def _refuse_others(path: Path) -> None:
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise BuildError(f"{path} can be written by others; make it yours alone or remove it")


def _key(compiler: str) -> str:
    """Name for what would be built here: two machines that share a home folder may have different CPUs."""
    version = _run([compiler, "--version"])
    texts = [(FOLDER / name).read_bytes() for name in (*HEADERS, *SOURCES)]
    parts = (*texts, repr(COMPILE).encode(), version.encode(), _cpu().encode())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    """Architecture, model and instruction sets of this machine's CPU: all that ``-march=native`` looks at."""
    kept = (
        "model name",
        "model\t",
        "cpu family",
        "flags",
        "Features",
        "CPU part",
        "CPU implementer",
    )
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(kept))])


def _build(compiler: str, path: Path) -> None:
    logger.info("Building the CPU kernels with %s, once for this machine: %s", compiler, path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        compiled = [str(Path(scratch) / f"{name}.o") for name in SOURCES]
        for name, target in zip(SOURCES, compiled, strict=True):
            _run([compiler, *COMPILE, "-c", str(FOLDER / name), "-o", target])
        linked = Path(scratch) / "kernels.so"
        _run([compiler, "-shared", *compiled, "-o", str(linked)])
        linked.chmod(0o700)
        with linked.open("rb") as whole:
            os.fsync(whole.fileno())
        linked.replace(path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took longer than {_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise BuildError(f"{command[0]} failed: {(said or [f'exit code {done.returncode}'])[0]}")
    return done.stdout

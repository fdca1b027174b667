"""The real SGLang on this machine, with its compiled kernels or without: how far it comes, in a process of its own.

``python -m rag_eval.gpu_check.engine DEVICE`` prints one JSON line per step. Where ``sgl_kernel`` cannot be loaded (it is
not there, or was built for another torch), what a Llama needs of it is taken from ``stand_in``. The model is a random
Llama without a tokenizer. Each step may fail; the steps behind it are then not tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_STAND_IN = Path(__file__).parent / "stand_in"
_VOCABULARY = 1024
_CHUNK = 200
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": _VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def try_engine(device: str, limit_s: float) -> Iterator[dict[str, Any]]:
    """Run the steps in a child process, and tell how far they came.

    Parameters
    ----------
    device : str
        ``cuda`` or ``cpu``.
    limit_s : float
        Seconds after which the child and all that it started are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        told, said = Path(folder, "steps"), Path(folder, "said")
        with told.open("w") as steps, said.open("w") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", "rag_eval.gpu_check.engine", device],
                stdout=steps,
                stderr=errors,
                start_new_session=True,
            )
            try:
                code = child.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            # An engine's processes outlive one that died.
            _end(child)
        for line in told.read_text().splitlines():
            if line.startswith("{"):
                yield json.loads(line)
        if code is None:
            yield {"what": "SGLang", "stopped": f"after {limit_s:.0f} s", "said": _tail(said)}
        elif code:
            yield {"what": "SGLang", "stopped": f"exit status {code}", "said": _tail(said)}


def _end(child: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-600:]


class _StepError(Exception):
    """A step did not come through, which was told."""


def _step(what: str, work: Callable[[], dict[str, Any]]) -> None:
    began = time.perf_counter()
    told: dict[str, Any] = {"what": what}
    try:
        told |= work()
    except BaseException as error:
        told |= {"stopped": f"{type(error).__name__}: {error}"[:600]}
    told["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(told), flush=True)
    if "stopped" in told:
        raise _StepError


def _import_sglang() -> dict[str, Any]:
    try:
        import sglang
    except ModuleNotFoundError as error:
        if error.name == "sglang":
            return {"stopped": "not there"}
        raise
    return {"version": sglang.__version__}


def _import_kernels(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"compiled": "not asked for: the project's CPU platform needs none"}
    try:
        import sgl_kernel  # type: ignore[import-untyped]
    except Exception as error:
        for name in [one for one in sys.modules if one.partition(".")[0] == "sgl_kernel"]:
            del sys.modules[name]
        sys.path.insert(0, str(_STAND_IN))
        # The engine's processes are started anew.
        rest = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_STAND_IN), rest)))
        return {"compiled": False, "because": f"{type(error).__name__}: {error}"[:300]}
    return {"compiled": True, "from": str(Path(str(sgl_kernel.__file__)).parent.name)}


def main(device: str) -> int:
    """Take the steps; 0 where all came through."""
    held: dict[str, Any] = {}

    def start() -> dict[str, Any]:
        import sglang

        folder = held["folder"] = tempfile.mkdtemp()
        Path(folder, "config.json").write_text(json.dumps(_CONFIG))
        options: dict[str, Any] = {}
        if device == "cuda":
            options = {"attention_backend": _backend(), "mem_fraction_static": 0.3}
        else:
            options = {"device": "cpu", "max_total_tokens": 8192}
        held["engine"] = sglang.Engine(
            model_path=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            disable_cuda_graph=True,
            random_seed=1,
            log_level="error",
            **options,
        )
        return options

    def ask(ids: list[int], **fields: Any) -> dict[str, Any]:
        sampling = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True} | fields
        answer: dict[str, Any] = held["engine"].generate(input_ids=ids, sampling_params=sampling)
        return answer

    def generate() -> dict[str, Any]:
        answer = ask(list(range(2, 600)))
        return {"tokens": len(answer["output_ids"])}

    def fuse() -> dict[str, Any]:
        from rag_pipeline.protocol import FusionRequest

        chunks = [[2 + (7 * n + 13 * k) % 1000 for n in range(_CHUNK)] for k in range(3)]
        reports = []
        for order in ([0, 1, 2], [2, 0, 1]):
            ids = [5] * 16 + [token for at in order for token in chunks[at]] + [9] * 40
            spans = tuple((16 + k * _CHUNK, 16 + (k + 1) * _CHUNK) for k in range(3))
            requests = (
                FusionRequest(mode="build", spans=spans, prefix_len=16),
                FusionRequest(spans=spans, prefix_len=16, policy="query:0.3"),
            )
            for request in requests:
                answer = ask(ids, custom_params=request.to_custom_params())
                reports.append(answer["meta_info"].get("rag_fusion"))
            time.sleep(1.0)  # what is missing is built when the engine is idle
        last = reports[-1]
        if last is None:
            return {"stopped": "the plugin is not active in this SGLang: is the project installed?"}
        return {"report": {key: value for key, value in last.items() if value}}

    try:
        _step("SGLang there", _import_sglang)
        _step("its compiled kernels", lambda: _import_kernels(device))
        _step("start", start)
        _step("a prompt", generate)
        _step("a fused prompt", fuse)
    except _StepError:
        return 0
    finally:
        if "engine" in held:
            held["engine"].shutdown()
    return 0


def _backend() -> str:
    import importlib.util

    return "flashinfer" if importlib.util.find_spec("flashinfer") is not None else "triton"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

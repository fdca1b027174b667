"""Teacher forcing inside the engine, with the logits of every forced step.

The prompt is served as in any other request (same cache, same selection: the gold answer stands
nowhere in the prompt, so a policy cannot look at it), and decoding is made to follow a given
answer. SGLang hands custom logit processors the logits over the whole vocabulary, so this is
where they are read: as Python lists in a response they would cost more than the forward pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORCED_IDS = "eval_forced_ids"
LOGITS_FILE = "eval_logits_file"
_STEP = "eval_step"


class FollowAnswer:
    """Logit processor: writes each row of logits to a file and forces the next token.

    Runs in the scheduler process. State between steps lives in the request's own parameters,
    because one processor instance serves every request.
    """

    def __call__(self, logits: Any, custom_param_list: list[dict[str, Any]] | None = None) -> Any:
        """Handle one step of every request of a batch.

        Parameters
        ----------
        logits : object
            Tensor ``(requests, vocabulary)``, changed in place.
        custom_param_list : list of dict, optional
            One dict a request, with ``FORCED_IDS`` and ``LOGITS_FILE``.

        Returns
        -------
        Tensor
            `logits`.
        """
        for row, params in enumerate(custom_param_list or []):
            forced = params.get(FORCED_IDS)
            if not forced or _is_middle_of_prompt(params.get("__req__")):
                continue
            step = int(params.get(_STEP, 0))
            params[_STEP] = step + 1
            if step >= len(forced):
                continue
            if _is_first_rank():
                values = logits[row].detach().float().cpu().numpy()
                with Path(params[LOGITS_FILE]).open("ab") as file:
                    file.write(np.ascontiguousarray(values, dtype=np.float32).tobytes())
            logits[row] = float("-inf")
            logits[row, forced[step]] = 0.0
        return logits


def _is_middle_of_prompt(request: Any) -> bool:
    """Whether this step belongs to a piece of a chunked prefill: nothing is sampled there."""
    end = getattr(request, "extend_end", None)
    prompt = getattr(request, "origin_input_ids", None)
    output = getattr(request, "output_ids", None)
    return bool(prompt and not output and end is not None and end < len(prompt))


def _is_first_rank() -> bool:
    """With tensor parallelism every rank samples from the same gathered logits."""
    import torch

    return not (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0)


def processor_string() -> str:
    """Write the processor in SGLang's wire format for ``custom_logit_processor``.

    The format is SGLang's own: a JSON object with the class, serialised by reference to this
    module. It travels between processes of one engine and is never stored.
    """
    import dill  # type: ignore[import-untyped]

    return json.dumps({"callable": dill.dumps(FollowAnswer).hex()})


def forcing_params(answer_ids: list[int], logits_file: Path) -> dict[str, Any]:
    """Build ``custom_params`` that make a request follow `answer_ids`; remove an old file."""
    logits_file.unlink(missing_ok=True)
    return {FORCED_IDS: list(answer_ids), LOGITS_FILE: str(logits_file)}


def read_logits(logits_file: Path, rows: int) -> npt.NDArray[np.float32]:
    """Logits ``(rows, vocabulary)`` of a forced request.

    Raises
    ------
    RuntimeError
        The engine did not run the processor for every step.
    """
    flat = np.fromfile(logits_file, dtype=np.float32) if logits_file.exists() else np.empty(0, "f4")
    if rows < 1 or flat.size == 0 or flat.size % rows:
        raise RuntimeError(
            f"{flat.size} logits for {rows} forced tokens: the engine forced nothing"
        )
    return flat.reshape(rows, -1)

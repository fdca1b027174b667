"""An engine that is shut down while its folder keeps a chunk waiting; prints what waited, and what there is then.

Usage: stopping.py MODEL_FOLDER STORE_FOLDER
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sys
import threading
import time
from pathlib import Path

from interleaved import SETTINGS


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    os.environ["RAG_PIPELINE_FUSION"] = json.dumps({"store_dir": str(folder)})
    from rag_pipeline.protocol import FusionRequest
    from rag_pipeline.sglang_plugin import create_engine

    engine = create_engine(model, **SETTINGS)

    def pending() -> int:
        (state,) = engine.loop.run_until_complete(
            asyncio.wait_for(engine.tokenizer_manager.get_internal_state(), 60)
        )
        return int(state["rag_fusion"]["pending"])

    with (folder / "usage").open("r+b") as usage:
        fcntl.flock(
            usage, fcntl.LOCK_EX
        )  # as another process does for as long as it lists the folder
        engine.generate(
            input_ids=list(range(10, 90)),
            sampling_params={"temperature": 0, "max_new_tokens": 2, "ignore_eos": True},
            kv_hints=FusionRequest(spans=((16, 48), (48, 80)), prefix_len=16).to_kv_hints(),
        )
        waited = 0
        for _ in range(600):
            # Counted once every build has ended: all that is left is what waits for the folder.
            waited, before = pending(), waited
            if waited == before == 2:
                break
            time.sleep(0.1)
        threading.Timer(1.0, fcntl.flock, (usage, fcntl.LOCK_UN)).start()
        began = time.monotonic()
        engine.shutdown()
    files = len(list(folder.rglob("*.safetensors")))
    took = time.monotonic() - began
    print(json.dumps({"waited": waited, "files": files, "took": took}), flush=True)


if __name__ == "__main__":
    main()

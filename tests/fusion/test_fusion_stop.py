"""What waits for a tier when an engine of this process is shut down is written first."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def test_an_engine_in_this_process_writes_what_waits_before_it_is_killed(
    tiny_model, tmp_path, warm_start
):
    program = Path(__file__).with_name("stopping.py")
    done = warm_start.run(
        [sys.executable, str(program), tiny_model("llama"), str(tmp_path / "kv")],
        environment=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["waited"] == told["files"] == 2, told

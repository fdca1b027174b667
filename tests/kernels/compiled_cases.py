"""Run by test_triton.py in a process of its own: compile the kernels for sm_90a without a GPU; prints JSON."""

from __future__ import annotations

import json

from rag_eval.gpu_check.compiled import build, variants

if __name__ == "__main__":
    print(json.dumps({name: build(*rest) for name, rest in variants()}))

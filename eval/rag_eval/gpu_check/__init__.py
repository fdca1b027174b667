"""One program for a machine with a GPU: ``python -m rag_eval.gpu_check --out DIR``.

It needs torch and Triton, and takes FlashInfer along where that is installed; SGLang and the network are not needed.
``--device cpu --small`` runs all of it at toy sizes, so that it is known to run before a GPU is asked for.
"""

from __future__ import annotations

from rag_eval.gpu_check.command import main

__all__ = ["main"]

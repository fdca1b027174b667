"""``python -m rag_eval.gpu_check``."""

from __future__ import annotations

import sys

from rag_eval.gpu_check import main

sys.exit(main())

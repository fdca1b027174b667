"""TPLA in the engine: the latents of an MLA model sliced over the ranks of tensor parallelism (arXiv 2508.15881)."""

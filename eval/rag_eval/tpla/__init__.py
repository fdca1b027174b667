"""Evaluation of TPLA: what slicing the latents of an MLA model over ranks costs in perplexity, and saves in bytes."""

"""What a scheduler process holds for fusion: the model, the ranks, the store, the counters."""

"""Under which name a fused pass travels in ``ForwardBatch.model_specific_states``."""

PASS_KEY = "rag_fused_pass"

"""Proof on the loaded model, before the first request is fused."""

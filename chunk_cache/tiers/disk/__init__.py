"""Chunk KV in a folder: one safetensors file per chunk, a byte budget, a thread that writes."""

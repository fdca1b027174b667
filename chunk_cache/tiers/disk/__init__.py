"""Chunk KV in a folder: one safetensors file per chunk read layer by layer, an index in memory, a byte budget."""

"""Chunk KV out of the pool, into the store and onto the disk, and out of both again."""

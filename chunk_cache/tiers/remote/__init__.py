"""Chunk KV in a store that several servers share: its address, and one module per kind of server."""

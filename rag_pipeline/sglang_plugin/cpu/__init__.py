"""Engines without a GPU: the platform, its attention backend, its cores."""

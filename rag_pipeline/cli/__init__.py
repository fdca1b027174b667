"""Placeholder docstring, replaced by the owning change."""

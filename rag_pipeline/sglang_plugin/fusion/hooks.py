"""Hooked targets."""

from __future__ import annotations


def register_hooks() -> None:
    """Register."""

"""Calibration of a model: thresholds of its heads for sparse attention, and how far its layers need distant tokens."""

from __future__ import annotations

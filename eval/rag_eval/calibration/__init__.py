"""Calibration of sparse attention: thresholds of a model's heads, found on prompts that need far keys."""

from __future__ import annotations

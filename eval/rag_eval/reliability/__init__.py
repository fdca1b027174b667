"""Reliability in ten figures: what is tried against a real server and a real index, what failed, the worst value."""

from __future__ import annotations

from rag_eval.reliability.figure import FIGURES, Figure, Outcome, Plan, figure

__all__ = ["FIGURES", "Figure", "Outcome", "Plan", "figure"]

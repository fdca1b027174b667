"""Uploads under attack: servers that are killed after they accepted, and files that were made to do harm."""

from __future__ import annotations

from rag_eval.uploads.hostile_files import hostile_files
from rag_eval.uploads.hostile_run import run_hostile_files
from rag_eval.uploads.killed_jobs import run_killed_jobs

__all__ = ["hostile_files", "run_hostile_files", "run_killed_jobs"]

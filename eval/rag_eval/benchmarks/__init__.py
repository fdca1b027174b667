"""Benchmarks, each a module to run: ``python -m rag_eval.benchmarks.NAME --json``."""

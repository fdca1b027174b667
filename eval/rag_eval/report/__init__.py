"""Tables and plots of a run."""

from rag_eval.report.plots import write_plots
from rag_eval.report.published import publish, published
from rag_eval.report.tables import render_tables

__all__ = ["publish", "published", "render_tables", "write_plots"]

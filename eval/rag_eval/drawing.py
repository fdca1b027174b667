"""What every plot of evaluation has in common: no display, one style, and a PNG that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def drawing(font_size: int) -> Iterator[Any]:
    """Yield ``matplotlib.pyplot`` in the style of the project, for files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": font_size, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        yield plt


def save_png(figure: Any, path: Path, *, dpi: int) -> None:
    """Write a figure as PNG under a temporary name and rename it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=dpi, format="png")
    temporary.replace(path)

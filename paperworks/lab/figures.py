"""The look of every figure, and its file: a light SVG, or a PNG where the drawing has too many points for one."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BYTES = 150_000  # figures are committed with the results, so they stay light

INK = "#1d2129"  # text and axes; the report swaps these three for its own theme
FAINT = "#8b93a1"
PAPER = "#fdfdfc"

# Distinct for colour-blind readers and on light and dark pages alike; grey is for controls.
COLORS = ("#2f6fde", "#e0663a", "#2a9d77", "#a35bd1", "#d9a412", "#d1477f")
CONTROL = "#8b95a5"

_STYLE: Any = {  # matplotlib's own type for these lists every parameter by name
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "none",
    "figure.figsize": (7.2, 3.6),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: lighter, searchable, set in the reader's font
}


@contextmanager
def drawing(**options: Any) -> Iterator[Figure]:
    """Yield a matplotlib Figure in the house style, without pyplot and its global state."""
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "axes.prop_cycle": cycler(color=COLORS)}
    with matplotlib.rc_context(style):
        figure = Figure(**options)
        FigureCanvasAgg(figure)
        yield figure


def encode(figure: Figure, salt: str) -> tuple[str, bytes]:
    """("svg" | "png", bytes), at most MOST_BYTES; the same figure and salt give the same bytes.

    Raises ValueError when even a coarse PNG is heavier than that.
    """
    import matplotlib

    buffer = io.StringIO()
    style: Any = {**_STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        vector = _tidy(buffer.getvalue()).encode()
        if len(vector) <= MOST_BYTES:
            return "svg", vector
        for resolution in (200, 150, 110, 80, 60):
            raster = io.BytesIO()
            figure.savefig(raster, format="png", dpi=resolution, metadata={"Software": None})
            if raster.tell() <= MOST_BYTES:
                return "png", raster.getvalue()
    raise ValueError(f"figure {salt!r} is heavier than {MOST_BYTES:,} bytes even at 60 dpi; draw fewer points")


def _tidy(svg: str) -> str:
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", svg)
    return re.sub(r"\n\s*\n+", "\n", svg)

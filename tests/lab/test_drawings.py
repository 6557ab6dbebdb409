"""Figures of a comparison: nothing is cut off, and the control is grey."""

import pytest
from matplotlib.text import Text

from paperworks.lab import drawings, figures
from paperworks.lab.compare import Comparison
from paperworks.lab.figures import CONTROL

ARMS = {"without induction heads": {"loss": [0.1, 0.2]}, "all but the circuit": {"loss": [0.4, 0.5]}}


def comparison():
    curves = {arm: {"error": [[3.0, 2.0, 1.0], [3.0, 1.0, 1.0]]} for arm in ARMS}
    return Comparison(control="all but the circuit", seeds=[0, 1], numbers=ARMS, curves=curves)


@pytest.mark.parametrize("kind", ["points", "curves"])
def test_a_long_title_stays_inside_of_the_figure(kind):
    title = "Share of the model's logit difference that a set of heads reaches alone"
    with figures.drawing(figsize=(7.2, 2.2)) as figure:
        axes = figure.subplots()
        if kind == "points":
            drawings.draw_points(axes, comparison(), "loss", title=title)
        else:
            drawings.draw_curves(axes, comparison(), ["error"], title=title)
        figure.canvas.draw()
        (written,) = (text for text in axes.findobj(Text) if text.get_text().startswith("Share of"))
        box = written.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1


def test_the_control_is_grey_and_no_other_arm():
    colors = drawings.arm_colors(comparison())
    assert colors["all but the circuit"] == CONTROL
    assert colors["without induction heads"] != CONTROL

"""Plots of the report draw what small runs leave."""

import numpy as np

from mmfeat.report.plots import new_drawing
from mmfeat.report.reliability import _reliability


def test_bins_in_which_every_choice_is_right_are_drawn() -> None:
    """Their interval ends at 1, which rounding may miss by a hair."""
    for count in range(1, 60):
        _, (axes, _) = new_drawing(3.0, 2)
        _reliability(axes, np.full(count, 0.95), np.ones(count, bool))

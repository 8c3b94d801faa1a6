"""Plots of the report draw what small runs leave."""

import numpy as np

from mmfeat.report.plots import new_drawing
from mmfeat.report.reliability import _reliability, judge


def test_bins_in_which_every_choice_is_right_are_drawn() -> None:
    """Their interval ends at 1, which rounding may miss by a hair."""
    for count in range(1, 60):
        _, (axes, _) = new_drawing(3.0, 2)
        _reliability(axes, np.full(count, 0.95), np.ones(count, bool))


def test_confidence_can_be_believed_only_where_the_diagram_says_so() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.3, 1.0, 4000)
    assert judge(confidence, random.random(4000) < confidence).startswith("Its confidence can be believed")
    assert "too sure: of answers given with" in judge(confidence, random.random(4000) < confidence - 0.15)
    assert "not sure enough" in judge(confidence, random.random(4000) < np.minimum(confidence + 0.15, 1))
    assert judge(np.full(5, 0.9), np.ones(5, bool)).startswith("There are too few answers")

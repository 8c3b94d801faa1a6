"""The simulations in small: each claim about intervals and probabilities is held against known truth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/simulations.py"


def test_calibration_is_held_against_true_probabilities() -> None:
    command = [sys.executable, SCRIPT, "--small", "clusters", "calibration"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.stdout.count("interval of") == 6, answer
    assert all("passed" in line for line in answer.stdout.splitlines() if "log-loss of calibrated" in line), answer
    assert answer.stdout.count("above chance covers") == 4, answer
    assert "mean probability of the rare class above its share" in answer.stdout

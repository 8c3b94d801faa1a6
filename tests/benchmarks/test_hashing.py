"""The benchmark of the built-in text encoder in small: it tells the time and the quality of both ways."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/hashing.py"


def test_time_and_quality_are_told(tmp_path: Path) -> None:
    kinds = (("good", "yes"), ("bad", "no"))
    rows = [f"{word}{n},a {word} number {n},{label}" for n in range(40) for word, label in kinds]
    table = tmp_path / "words.csv"
    table.write_text("\n".join(["id,text,label", *rows]))
    answer = subprocess.run([sys.executable, SCRIPT, "--data", table], capture_output=True, text=True, timeout=120)
    assert re.search(r"80 texts: hashing [\d.]+ s, TF-IDF [\d.]+ s, ratio [\d.]+", answer.stdout), answer
    assert re.search(r"macro-F1: hashing (0\.9\d\d|1\.000), TF-IDF 1\.000, difference [+-]0\.0\d\d", answer.stdout), (
        answer
    )

"""Both published systems of docs/recipes.md run from the first command to the last, on small models and few epochs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmfeat.samples.dataset import read_samples
from tests.docs.markdown import ROOT, blocks
from tests.docs.test_readme import check, in_process, place  # noqa: F401
from tests.finetune.small_finetunes import show_few_pixels
from tests.sweep.small_sweeps import rows

PAGE = ROOT / "docs/recipes.md"
SYSTEMS = dict(zip("AB", (block.text.splitlines() for block in blocks(PAGE, "console")), strict=True))


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("system", SYSTEMS)
def test_system_runs_from_extract_to_submit(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    show_few_pixels(monkeypatch)
    for line in SYSTEMS[system]:
        check(in_process(f"{line} --data mvsa" if line == "mmfeat submit" else line))
    assert {path.name for path in Path(f"splits-{system.lower()}").iterdir()} >= {"train_split.csv", "test_split.csv"}
    assert len(rows(Path("submission.csv"))) == len(read_samples("mvsa").unlabelled)
    assert list(Path("heads").glob("*/report-files/*.tex"))

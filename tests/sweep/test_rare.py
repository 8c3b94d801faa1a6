"""Classes with too few samples for the folds: an error, left out, or joined, in the run and in all that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmfeat.audit.audit import audit_data
from mmfeat.errors import ConfigError, DataError
from mmfeat.extraction.extract import extract_features
from mmfeat.prediction.predict import predict_data
from mmfeat.prediction.submit import write_submission
from mmfeat.reproduce import reproduce_run
from mmfeat.runs.run import Run, read_run
from mmfeat.samples.corrections import Rare
from mmfeat.sweep.train import train_heads
from tests.sweep.small_sweeps import SMALL

COLUMNS = {"id": "sku", "text": "title", "label": "kind"}
COUNTS = {"red": 9, "blue": 9, "kite": 2, "glider": 1, "": 2}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with two common and two rare classes and rows to predict, test data, and a cache of their vectors."""
    folder, number = tmp_path_factory.mktemp("shop"), 0
    for name, counts in (("train", COUNTS), ("test", {"red": 2, "kite": 1, "glider": 1})):
        rows = ["sku,title,kind"]
        for label, count in counts.items():
            for _ in range(count):
                rows.append(f"{name}{number},{label or 'red'} thing number {number} of {label},{label}")
                number += 1
        (folder / f"{name}.csv").write_text("\n".join(rows))
    extract_features(folder / "train.csv", ["hashing"], cache=folder / "cache", columns=COLUMNS)
    return folder


def trained(shop: Path, **changes: Any) -> Run:
    heads = {"fusion": ["none"], "baselines": ["ridge"], "protocol": SMALL, "columns": COLUMNS}
    places = {"cache": shop / "cache", "out": shop / "heads"}
    return train_heads(shop / "train.csv", ["hashing"], **{**places, **heads, **changes}).run


@pytest.mark.parametrize(("rare", "classes", "scored"), [("drop", (), 2), ("join", ("other",), 4)])
def test_rare_classes_are_left_out_or_joined_everywhere(
    shop: Path, tmp_path: Path, rare: str, classes: tuple[str, ...], scored: int
) -> None:
    glider = COUNTS["red"] + COUNTS["blue"] + COUNTS["kite"]
    (tmp_path / "fixed.csv").write_text(f"id,label\ntrain{glider},{'red' if rare == 'drop' else 'kite'}\n")
    columns = {**COLUMNS, "labels": str(tmp_path / "fixed.csv")}  # which brings back no class that is left out
    run = read_run(trained(shop, rare=rare, columns=columns).folder)
    assert run.classes == ("blue", *classes, "red")
    assert run.config.rare == Rare(rare, {"glider": 1, "kite": 2})
    out = {"run": run.folder, "device": "cpu"}
    written = write_submission(**out, out=tmp_path / "s.csv")
    assert written.rows == COUNTS[""]
    assert not written.data_changed
    predicted = predict_data(shop / "test.csv", **out)
    assert len(predicted.predictions) == 4
    assert predicted.names == ("sku", "kind")
    assert set(predicted.predictions.labels) <= {*run.classes}
    assert predicted.scores is not None
    assert predicted.scores.samples == scored
    audit = audit_data(shop / "train.csv", columns=columns, run=run.folder, out=tmp_path / "audit")
    assert audit.label_errors is not None
    assert audit.data_hash == run.config.data_hash
    assert reproduce_run(run, tmp_path / "again").identical


def test_near_duplicates_count_once(shop: Path) -> None:
    table = shop / "alike.csv"
    rows = (shop / "train.csv").read_text().splitlines()
    twins = (f"x{number},a wide wooden bed for two in a light grey with slats,twin" for number in range(3))
    table.write_text("\n".join([*rows, *twins]))
    extract_features(table, ["hashing"], cache=shop / "cache", columns=COLUMNS)
    arguments = {"cache": shop / "cache", "out": shop / "heads", "columns": COLUMNS, "protocol": SMALL}
    heads = {"fusion": ["none"], "baselines": ["ridge"]}
    run = train_heads(table, ["hashing"], rare="drop", **arguments, **heads).run
    assert run.config.rare is not None
    assert run.config.rare.classes == {"glider": 1, "kite": 2, "twin": 3}
    with pytest.raises(DataError, match=r"'glider' has 1 sample.*too few: glider 1, kite 2.*--rare drop leaves"):
        trained(shop)


def test_of_several_classes_a_sample_only_the_rare_ones_change() -> None:
    drop, join = (Rare(how, {"kite": 1}, several=True) for how in ("drop", "join"))
    assert [drop.name(label) for label in ("kite|red", "red|blue", "kite")] == ["red", "red|blue", "|"]
    assert [join.name(label) for label in ("kite|red", "red|blue", "kite")] == ["other|red", "red|blue", "other"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rare": "hide"}, "use drop or join"),
        ({"rare": "drop", "task": "regression"}, "numbers are no classes"),
        ({"rare": "join", "task": "ordinal", "order": ["kite", "glider", "red", "blue"]}, "no place in an order"),
    ],
)
def test_what_suits_no_task_is_refused(shop: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trained(shop, **changes)

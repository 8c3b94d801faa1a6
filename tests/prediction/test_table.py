"""A table as a third modality, the whole way: extracted, trained, compared, predicted from tables and from Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmfeat import compare_runs, load, reproduce_run, write_report
from mmfeat.errors import DataError, RunError
from mmfeat.export.export import export_run
from mmfeat.extraction.extract import extract_features
from mmfeat.prediction.predict import predict_data
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.leaderboard import MODALITY_SETS
from mmfeat.runs.run import Run, read_run
from mmfeat.sweep.train import train_heads
from tests.cli.typed import invoke
from tests.prediction.test_to_predict import shop
from tests.sweep.small_sweeps import BUILT_IN, QUICK, SMALL

COLUMNS = {"id": "sku", "text": "title", "image": "photo", "label": "category"}
WITH_TABLE = {**COLUMNS, "table": "price+brand"}


def priced(folder: Path, rows: range) -> pd.DataFrame:
    frame = shop(folder, rows)
    cats = (frame.category == "cat").to_numpy()
    numbers = np.random.default_rng(3).permutation(len(frame))
    return frame.assign(price=np.where(numbers % 9, 10 + 5 * cats, np.nan), brand=np.where(numbers % 4, "acme", "bolt"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, on text and photo and with a table, and rows to predict."""
    folder = tmp_path_factory.mktemp("priced")
    frame = priced(folder, range(60))
    frame[:44].to_csv(folder / "train.csv", index=False)
    frame[44:].drop(columns="category").assign(brand="unheard of").to_csv(folder / "test.csv", index=False)
    frame[44:].drop(columns=["category", "price"]).to_csv(folder / "noprice.csv", index=False)
    cache = folder / "cache"
    extract_features(folder / "train.csv", BUILT_IN, columns=WITH_TABLE, cache=cache, test=folder / "test.csv")
    for columns in (COLUMNS, WITH_TABLE):
        train_heads(
            folder / "train.csv", BUILT_IN, columns=columns, cache=cache, out=folder / "heads", protocol=SMALL,
            modalities=MODALITY_SETS,
            plan=QUICK, fusion=["concat"], baselines=["ridge", "forest"],
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def runs(place: Path) -> tuple[Run, Run]:
    """The run without a table and the run with one."""
    plain, with_table = sorted(map(read_run, (place / "heads").iterdir()), key=lambda run: run.config.table is not None)
    return plain, with_table


def test_a_table_is_one_modality_more(runs: tuple[Run, Run]) -> None:
    plain, run = runs
    assert {entry.modalities for entry in plain.leaderboard} == {"both", "text", "image", "ensemble"}
    assert {entry.modalities for entry in run.leaderboard} == {"both", "text", "image", "table", "ensemble"}
    assert [column.label for column in run.config.table or ()] == ["price (numbers)", "brand (2 categories)"]
    assert run.entry("ridge", "table").macro_f1.value > 0.8
    assert plain.config.data_hash == run.config.data_hash
    (_, test) = compare_runs([plain, run], head="ridge", modalities="both").tests
    assert test is not None


def test_text_and_photo_alone_score_as_they_do_without_a_table(runs: tuple[Run, Run]) -> None:
    for head in ("concat", "ridge"):
        for modality in ("text", "image"):
            found = [run.out_of_fold(run.entry(head, modality)).probabilities for run in runs]
            np.testing.assert_array_equal(*found)


def test_the_test_data_are_predicted_with_their_table(place: Path, runs: tuple[Run, Run]) -> None:
    run = runs[1]
    result = write_submission(run.folder, out=place / "s.csv", head="ridge", modalities="both")
    assert len(pd.read_csv(result.path)) == 16
    predicted = predict_data(place / "test.csv", run.folder, head="ridge", modalities="table").predictions
    model = load(run.folder, head="ridge", modalities="table", device="cpu")
    rows = pd.read_csv(place / "test.csv")[["price", "brand"]].to_dict("records")
    np.testing.assert_allclose(model.predict_proba(table=rows), predicted.probabilities, atol=1e-5)


def test_tables_without_the_columns_are_told(place: Path, runs: tuple[Run, Run]) -> None:
    run, columns = runs[1], {name: column for name, column in COLUMNS.items() if name != "label"}
    with pytest.raises(DataError, match="no column category, price among"):
        predict_data(place / "noprice.csv", run.folder)
    with pytest.raises(DataError, match=r"no column price, brand, which ridge on both sees; name yours with --columns"):
        predict_data(place / "noprice.csv", run.folder, columns=columns, head="ridge", modalities="both")
    predicted = predict_data(place / "noprice.csv", run.folder, columns=columns, head="ridge", modalities="text")
    assert len(predicted.predictions) == 16


def test_a_model_names_what_it_lacks(runs: tuple[Run, Run]) -> None:
    model = load(runs[1].folder, head="concat", modalities="both", device="cpu")
    with pytest.warns(UserWarning, match=r"1 of 1 samples predicted without cells of a table \(price, brand\)"):
        model.predict("river stone")
    with pytest.raises(DataError, match=r"table\[0\]: no column 'prise' in the run; it has price, brand"):
        model.predict("river stone", table={"prise": 9})
    with pytest.raises(DataError, match="1 texts but 2 rows"):
        model.predict("river stone", table=[{"price": 9}, {"price": 8}])


def test_a_changed_cell_is_another_run(place: Path, runs: tuple[Run, Run], tmp_path: Path) -> None:
    run = reproduce_run(runs[1].folder, out=tmp_path)
    assert run.identical
    frame = pd.read_csv(place / "train.csv")
    kept = frame.copy()
    frame.loc[0, "price"] = 11
    try:
        frame.to_csv(place / "train.csv", index=False)
        with pytest.raises(RunError, match="changed"):
            reproduce_run(runs[1].folder, out=tmp_path / "again")
    finally:
        kept.to_csv(place / "train.csv", index=False)


def test_reports_name_the_table_and_exports_pass_it_over(runs: tuple[Run, Run], tmp_path: Path) -> None:
    page = write_report(runs[1].folder, out=tmp_path / "r.html", photos=0).path.read_text()
    assert "price (numbers), brand (2 categories)" in page
    with pytest.raises(RunError, match="ridge on table cannot be exported: it reads columns of a table"):
        export_run(runs[1].folder, head="ridge", modalities="table", out=tmp_path / "e")


def test_the_dry_run_and_the_summary_say_what_the_columns_hold(place: Path, tmp_path: Path) -> None:
    columns = ",".join(f"{name}={column}" for name, column in COLUMNS.items())
    typed = ["extract", "--data", str(place / "train.csv"), "--encoders", "hashing", "--cache", str(tmp_path)]
    line = "table: price (numbers), brand (2 categories); 4 values a sample"
    for flags in (["--dry-run"], []):
        answer = invoke(*typed, "--columns", f"{columns},table=price,brand", *flags)
        assert line in answer.stdout, answer.output
    refused = invoke(*typed, "--columns", "id=sku,text=title,table=title,label=category")
    assert "no numbers and no categories" in refused.output

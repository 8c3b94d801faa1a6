"""Ordinal tasks: classes with an order, kappa as the score, and choices by the expected class that favour it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from mmfeat.errors import ConfigError, DataError
from mmfeat.evaluation.decisions import Decision, fit_decision
from mmfeat.evaluation.metrics import evaluate
from mmfeat.extraction.extract import extract_features
from mmfeat.finetune.finetune import finetune_heads
from mmfeat.prediction.predict import predict_data
from mmfeat.report.report import write_report
from mmfeat.runs.run import Run
from mmfeat.samples.labels import Targets, indicator, read_targets
from mmfeat.sweep.train import Sweep, train_heads
from tests.sweep.small_sweeps import QUICK, SMALL, results

STARS = ("1", "2", "3", "4", "10")
WORDS = dict(zip(STARS, ("awful", "bad", "fair", "good", "great"), strict=True))
COLUMNS = {"table": "length+weight"}


def rated(rows: int, seed: int = 0) -> pd.DataFrame:
    """Samples with a number of stars, of which two columns tell something."""
    random = np.random.default_rng(seed)
    columns = random.standard_normal((rows, 2))
    merit = columns @ [1.0, 0.7] + random.standard_normal(rows)
    stars = np.array(STARS)[np.searchsorted(np.quantile(merit, [0.04, 0.3, 0.75, 0.9]), merit)]
    texts = [f"a thing of number {seed} {number}" for number in range(rows)]
    ids = [f"{seed}-{number}" for number in range(rows)]
    return pd.DataFrame({"id": ids, "text": texts, "label": stars, "length": columns[:, 0], "weight": columns[:, 1]})


def rate(place: Path, file: str = "stars.csv", **given: object) -> Sweep:
    asked = {"fusion": ["linear"], "baselines": ["logistic"], "modalities": ["table"], "task": "ordinal"}
    asked |= {"columns": COLUMNS, "cache": place / "cache", "out": place / "heads", "protocol": SMALL, "plan": QUICK}
    return train_heads(place / file, ["hashing"], **{**asked, **given})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stars")
    frame = rated(400)
    frame.to_csv(folder / "stars.csv", index=False)
    frame.assign(label=frame.label.map(WORDS)).to_csv(folder / "words.csv", index=False)
    rated(80, 1).to_csv(folder / "more.csv", index=False)
    extract_features(folder / "stars.csv", ["hashing"], cache=folder / "cache", columns=COLUMNS)
    extract_features(folder / "words.csv", ["hashing"], cache=folder / "cache", columns=COLUMNS)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return rate(place).run


def test_classes_are_in_order() -> None:
    assert read_targets(["10", "9", "9.5", "10"], "ordinal").classes == ("9", "9.5", "10")
    named = read_targets(["high", "low", "low"], "ordinal", ["low", "medium", "high"])
    assert (named.classes, named.ordered, named.task) == (("low", "high"), True, "ordinal")
    with pytest.raises(DataError, match="label 'high' is no number; say the order of the labels"):
        read_targets(["high", "1"], "ordinal")
    with pytest.raises(DataError, match="--order low: label 'high' of the data has no place"):
        read_targets(["high", "low"], "ordinal", ["low"])


@pytest.mark.parametrize("classes", [2, 5])
def test_kappa_is_that_of_scikit_learn_and_its_interval_that_of_resampling(classes: int) -> None:
    random = np.random.default_rng(classes)
    numbers = random.integers(0, classes, 300)
    chosen = np.clip(numbers + random.integers(-1, 2, (2, 300)), 0, classes - 1)
    names = tuple(map(str, range(classes)))
    targets = Targets(names, indicator(numbers, classes), ordered=True)
    shares = np.full((2, 300, classes), 1 / classes)
    scores = evaluate(targets, indicator(chosen, classes), shares)

    def kappa(rows: np.ndarray) -> float:
        return float(np.mean([cohen_kappa_score(numbers[rows], row[rows], weights="quadratic") for row in chosen]))

    assert scores["kappa"]["value"] == pytest.approx(kappa(np.arange(300)))
    drawn = [kappa(random.integers(0, 300, 300)) for _ in range(400)]
    ends = scores["kappa"]["low"], scores["kappa"]["high"]
    assert ends == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.02)
    unordered = evaluate(Targets(names, targets.matrix), indicator(chosen, classes), shares)
    assert {name: scores[name] for name in unordered if name != "seeds"} == {
        name: unordered[name] for name in unordered if name != "seeds"
    }


def logits_of(rows: int, seed: int) -> tuple[np.ndarray, Targets]:
    """True log-probabilities of five classes, most samples of the middle ones."""
    random = np.random.default_rng(seed)
    merit = random.standard_normal(rows)
    logits = -((merit[:, None] * 0.8 - np.linspace(-2.5, 2.5, 5)) ** 2) + np.log([0.05, 0.3, 0.4, 0.2, 0.05])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    numbers = (random.random(rows)[:, None] > shares.cumsum(1)).sum(1).clip(0, 4)
    return logits, Targets(STARS, indicator(numbers, 5), ordered=True)


def test_cuts_of_the_expected_class_beat_the_most_probable_class_on_other_rows() -> None:
    gains = []
    for seed in range(5):
        logits, targets = logits_of(500, seed)
        decision = fit_decision(logits, targets, targets.prior)
        fresh, labels = logits_of(4000, 100 + seed)
        kappas = [
            cohen_kappa_score(labels.numbers, chosen.argmax(-1), weights="quadratic")
            for chosen in (decision.choose(fresh), indicator(fresh.argmax(-1), 5))
        ]
        gains.append(kappas[0] - kappas[1])
        assert decision.cuts == tuple(sorted(decision.cuts or ()))
        assert Decision.from_json(decision.to_json()) == decision
    assert min(gains) > 0.01


def test_a_strength_of_zero_rounds_and_no_row_does_too() -> None:
    logits, targets = logits_of(300, 0)
    assert fit_decision(logits, targets, targets.prior, adjustment=0.0).cuts == (0.5, 1.5, 2.5, 3.5)
    none = targets.take(np.zeros(0, int))
    assert fit_decision(logits[:0], none, targets.prior).cuts == (0.5, 1.5, 2.5, 3.5)
    even = fit_decision(logits, targets, targets.prior, adjustment=1.0).choose(logits)
    np.testing.assert_allclose(even.mean(0), targets.prior, atol=0.01)


def test_a_run_is_ranked_by_kappa_and_predicts_the_labels_of_the_user(run: Run, place: Path) -> None:
    kappas = [entry.kappa.value for entry in run.leaderboard if entry.kappa]
    assert kappas == sorted(kappas, reverse=True)
    assert len(kappas) == len(run.leaderboard)
    best = run.leaderboard[0]
    assert run.classes == STARS
    assert best.headline == best.kappa
    assert best.headline_name == "kappa"
    out = run.out_of_fold(best)
    by_seed = [cohen_kappa_score(out.targets.numbers, chosen.argmax(1), weights="quadratic") for chosen in out.chosen]
    assert best.by_seed.values == pytest.approx(tuple(by_seed))
    predicted = predict_data(place / "more.csv", run.folder, cache=place / "cache")
    assert set(predicted.predictions.labels) <= set(STARS)
    assert predicted.scores is not None
    assert predicted.scores.kappa is not None
    assert predicted.scores.kappa.value > 0.4


def test_the_same_seed_gives_the_same_run_and_words_in_order_that_of_numbers(run: Run, place: Path) -> None:
    again = rate(place, out=place / "again").run
    assert results(again) == results(run)
    words = rate(place, "words.csv", order=list(WORDS.values())).run
    assert words.classes == tuple(WORDS.values())
    assert words.config.order == tuple(WORDS.values())
    assert words.leaderboard[0].kappa == run.leaderboard[0].kappa
    backwards = rate(place, "words.csv", order=list(WORDS.values())[::-1], baselines=["logistic"], fusion=["none"]).run
    assert backwards.name != words.name
    assert backwards.classes == tuple(WORDS.values())[::-1]


def test_the_report_names_kappa(run: Run, tmp_path: Path) -> None:
    page = write_report(run.folder, out=tmp_path / "report.html").path.read_text(encoding="utf-8")
    assert "kappa with 95 % intervals" in page
    assert "confusion" in page


def test_what_an_order_cannot_do_is_refused_in_one_line(run: Run, place: Path) -> None:
    with pytest.raises(ConfigError, match="--order low,high: only classes of --task ordinal have an order"):
        rate(place, task="multiclass", order=["low", "high"])
    with pytest.raises(ConfigError, match="a run of --task ordinal, whose encoders cannot be fine-tuned"):
        finetune_heads(run.folder)

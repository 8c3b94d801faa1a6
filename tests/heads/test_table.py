"""Columns of a table as a modality of heads: the same numbers as scikit-learn's, fitted in the fold, in every head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from mmfeat.cache.features import Features
from mmfeat.heads.data import HeadData
from mmfeat.heads.jobs import Job, Workbench, restore_heads, run_job
from mmfeat.heads.registry import FUSIONS, NEEDS_TOKENS, HeadSettings, load_fusion
from mmfeat.heads.stack import Member, predict_stack, train_stack
from mmfeat.samples.dataset import Sample
from mmfeat.samples.table_columns import TableColumn, TableCounts
from tests.heads.toy_features import SAMPLES, TARGETS, TEST, TRAIN, VALIDATION, features, with_tokens

SETTINGS = HeadSettings(epochs=6, batch_size=16, learning_rate=3e-3, modality_dropout=0.1)
MEMBER = Member(SETTINGS, TRAIN, VALIDATION, (1, 2), 8)
ALONE = "only in a test row"


def frame() -> pd.DataFrame:
    """Prices of which some are missing, and brands, one of them in test rows alone."""
    random = np.random.default_rng(5)
    numbers = TARGETS.matrix.argmax(1)
    brands = np.array(["acme", "bolt", "cork", None], object)[(numbers + (random.random(SAMPLES) < 0.2)) % 4]
    brands[random.random(SAMPLES) < 0.2] = None
    brands[TEST[:2]] = ALONE
    prices = np.where(random.random(SAMPLES) < 0.2, np.nan, 100 * numbers + random.normal(0, 20, SAMPLES))
    return pd.DataFrame({"price": prices, "brand": brands})


def samples() -> list[Sample]:
    rows = frame().astype(object).where(frame().notna(), None).itertuples(index=False)
    return [
        Sample(str(number), label="x", table=tuple(None if cell is None else str(cell) for cell in row))
        for number, row in enumerate(rows)
    ]


def columns(rows: np.ndarray | None = None) -> tuple[TableColumn, ...]:
    counts = TableCounts(["price", "brand"])
    for row in np.arange(SAMPLES) if rows is None else rows:
        counts.add(samples()[row])
    return counts.columns()


def with_table(seen: Features, rows: np.ndarray | None = None) -> Features:
    return seen.with_table(columns(rows), samples())


def by_scikit_learn(train: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
    """(n, D) rows by transformers that were fitted on training rows, and the brands of the last columns."""
    transformer = ColumnTransformer(
        [
            ("numbers", FunctionTransformer(), ["price"]),
            ("lacks", MissingIndicator(features="all"), ["price"]),
            ("brands", OneHotEncoder(handle_unknown="ignore", sparse_output=False), ["brand"]),
        ]
    )
    everything = make_pipeline(transformer, StandardScaler(), SimpleImputer()).fit(frame().iloc[train])
    return everything.transform(frame().iloc[rows]), list(transformer.fit(frame().iloc[train])["brands"].categories_[0])


def test_heads_see_what_scikit_learn_makes_of_the_training_rows() -> None:
    data = HeadData(with_table(features()), "table")
    module = load_fusion("concat")(1, data.shape, 3)
    module.standardise(0, data.statistics(TRAIN))
    batch = data.batch(torch.from_numpy(TEST)[None])
    (given,) = module.inputs["table"]
    seen = given(batch.vectors["table"][0], batch.masks["table"][0])[0].numpy()
    wanted, brands = by_scikit_learn(TRAIN, TEST)
    price, brand = columns()
    assert ALONE in brand.values
    assert ALONE not in brands
    places = [0, 1, *(2 + [*brand.values, None].index(name if isinstance(name, str) else None) for name in brands)]
    np.testing.assert_allclose(seen[:, places], wanted, atol=1e-5)
    rest = np.setdiff1d(np.arange(price.width + brand.width), places)
    assert len(rest) == 1
    np.testing.assert_array_equal(seen[:, rest], 0)


def test_vectors_that_are_prepared_are_the_same() -> None:
    data = HeadData(with_table(features()), "table")
    module = load_fusion("concat")(1, data.shape, 3)
    module.standardise(0, data.statistics(TRAIN))
    (given,) = module.inputs["table"]
    rows = torch.from_numpy(TEST)[None]
    np.testing.assert_array_equal(
        data.prepared([TRAIN]).batch(rows).vectors["table"][0], given.normed(data.batch(rows).vectors["table"][0])
    )


@pytest.mark.parametrize(("head", "difference"), [("ridge", 2e-3), ("logistic", 2e-3), ("knn", 0.05)])
def test_a_category_of_test_rows_alone_changes_no_baseline(head: str, difference: float) -> None:
    """Up to rounding; the nearest neighbours are the same, their cosines with rows of that category a little lower."""

    def logits(rows: np.ndarray | None) -> np.ndarray:
        bench = Workbench(with_table(features(), rows), TARGETS, "cpu", "pooled")
        member = replace(MEMBER, fold=np.union1d(TRAIN, VALIDATION), parts=(VALIDATION,))
        (fitted,) = run_job(Job(head, "both", (member,), ((TEST,),)), bench)
        return fitted.logits[0]

    known = [row for row in range(SAMPLES) if row not in TEST[:2]]
    np.testing.assert_allclose(logits(None), logits(np.array(known)), atol=difference)


def plain(name: str, seen: Features, modality: str) -> np.ndarray:
    data = HeadData(seen, modality, tokens="pooled" if name == NEEDS_TOKENS else "")
    (trained,) = train_stack(load_fusion(name), data, TARGETS, [MEMBER])
    return predict_stack(load_fusion(name), 3, data, [trained.tensors], [TEST])[0]


def without(seen: Features, *modalities: str) -> Features:
    return replace(seen, blocks=tuple(block for block in seen.blocks if block.modality not in modalities))


@pytest.mark.parametrize("lacking", [(), ("image",), ("image", "text")])
@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_takes_a_table_beside_whatever_there_is(name: str, lacking: tuple[str, ...]) -> None:
    seen = without(with_table(features(missing=0.1)), *lacking)
    found = plain(name, seen, "both")
    assert np.isfinite(found).all()
    share = (found.argmax(1) == TARGETS.matrix[TEST].argmax(1)).mean()
    assert share > (0.6 if not lacking else 0.55)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_without_a_table_is_the_fusion_of_before(name: str) -> None:
    np.testing.assert_array_equal(
        plain(name, features(), "both"), plain(name, without(with_table(features()), "table"), "both")
    )


def test_a_table_is_a_token_beside_those_of_a_photo() -> None:
    """Trained on compact tokens, and restored for tokens as they are cached."""
    seen = with_tokens(with_table(features()))
    bench = Workbench(seen, TARGETS, "cpu", "tokens")
    (fitted,) = run_job(Job(NEEDS_TOKENS, "both", (MEMBER,), ((TEST,),), keep=True), bench)
    data = HeadData(seen, "both", tokens="tokens")
    assert data.shape.tokens == {"image": (6,), "text": (6,)}
    (restored,) = restore_heads(NEEDS_TOKENS, {}, [fitted.tensors], 3, data)(data)
    np.testing.assert_allclose(restored[TEST], fitted.logits[0], atol=2e-3)


def test_a_table_stays_where_blocks_are_named() -> None:
    seen = with_table(features())
    assert [block.name for block in seen.named(["image-0-0"]).blocks] == ["image-0-0", "table"]
    assert [block.name for block in features().named(["image-0-0"]).blocks] == ["image-0-0"]

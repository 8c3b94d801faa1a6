"""Encoder is a transformer of scikit-learn: the vectors of `embed`, in pipelines, frames, grids and other processes."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import mmfeat
from mmfeat import Encoder, FusionClassifier
from mmfeat.errors import ConfigError, DataError

LABELS = np.arange(40) % 2


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """40 samples whose texts and photos tell the label; one lacks its text and another one its photo."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, label in enumerate(LABELS):
        Image.fromarray(rng.integers(0, 100 + 100 * label, (40, 40, 3), np.uint8)).save(folder / f"{number}.png")
    texts: list[str | None] = [f"{'good happy' if label else 'bad sad'} {n}" for n, label in enumerate(LABELS)]
    texts[3] = None
    photos: list[str | None] = [str(folder / f"{number}.png") for number in range(40)]
    photos[4] = None
    return pd.DataFrame({"text": texts, "photo": photos, "price": rng.random(40)}, index=np.arange(100, 140))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoder") / "cache"


FORMS: dict[str, Callable[[pd.Series], Any]] = {
    "series": lambda texts: texts,
    "list": list,
    "frame": pd.DataFrame,
    "array": lambda texts: texts.to_numpy(),
    "column": lambda texts: texts.to_numpy()[:, None],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_column_in_any_form_gives_what_embed_gives(form: str, frame: pd.DataFrame, cache: Path) -> None:
    expected = mmfeat.embed(list(frame["text"]), encoder="hashing", cache=None)
    column, encoder = FORMS[form](frame["text"]), Encoder("hashing", cache=cache)
    np.testing.assert_array_equal(encoder.fit_transform(column), expected)
    np.testing.assert_array_equal(clone(encoder).fit(column).transform(column), expected)
    assert np.isnan(expected[3]).all()


def test_vectors_of_frames_have_names_and_the_index(frame: pd.DataFrame, cache: Path) -> None:
    vectors = Encoder("hashing", cache=cache).set_output(transform="pandas").fit_transform(frame["text"])
    assert vectors.index.equals(frame.index)
    assert vectors.columns[:2].tolist() == ["hashing_0", "hashing_1"]
    assert vectors.shape == (40, 4096)


def test_texts_photos_and_numbers_in_one_pipeline(frame: pd.DataFrame, cache: Path) -> None:
    columns = ColumnTransformer(
        [
            ("text", Encoder("hashing", cache=cache), "text"),
            ("image", Encoder("hog", cache=cache), ["photo"]),
            ("table", "passthrough", ["price"]),
        ]
    )
    head = FusionClassifier(widths=[("text", 4096), ("image", 996), ("table", 1)], epochs=3, device="cpu")
    pipeline = make_pipeline(columns, head).fit(frame, LABELS)
    assert pipeline.score(frame, LABELS) > 0.9
    assert columns.fit(frame).get_feature_names_out()[[0, 4096, -1]].tolist() == [
        "text__hashing_0",
        "image__hog_0",
        "table__price",
    ]
    dumped = pickle.dumps(pipeline)
    np.testing.assert_array_equal(pickle.loads(dumped).predict(frame), pipeline.predict(frame))  # noqa: S301
    with pytest.warns(UserWarning, match="image file not found"):  # a single broken photo is no mistake
        assert len(pipeline.predict(frame[:1].assign(photo="nowhere.png"))) == 1


def test_a_grid_over_encoders_encodes_each_text_once(frame: pd.DataFrame, tmp_path: Path) -> None:
    texts, labels = frame["text"].dropna(), LABELS[frame["text"].notna()]
    grid = {"encoder__encoder": ["hashing", "hashing:1"], "logisticregression__C": [1.0, 10.0]}
    pipeline = make_pipeline(Encoder(cache=tmp_path), LogisticRegression())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search = GridSearchCV(pipeline, grid, cv=2, n_jobs=2).fit(texts, labels)
    assert search.best_score_ > 0.9
    again = mmfeat.extract_features(pd.DataFrame({"text": texts}), ["hashing"], cache=tmp_path)
    assert not sum(again.new.values())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"encoder": 3}, "encoder 3: name one"),
        ({"encoder": []}, r"encoder \[\]: name one"),
        ({"encoder": "hashing,hog"}, "say modality='text' or 'image'"),
        ({"encoder": "hog", "modality": "text"}, "it takes no texts"),
        ({"modality": "sound"}, "modality 'sound': use"),
        ({"options": {}}, r"options \{\}: use EncoderOptions"),
        ({"cache": 3}, "cache 3: name a folder"),
        ({"device": None}, "device None: use auto"),
    ],
)
def test_wrong_parameters_get_one_line(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Encoder(**{"cache": None, **parameters}).fit(["a text"])


def test_wrong_columns_get_one_line(frame: pd.DataFrame) -> None:
    encoder = Encoder(cache=None)
    with pytest.raises(NotFittedError):
        encoder.transform(["a"])
    for column, message in ((frame, "3 columns"), (frame["price"], "no text"), ("a", "no list"), (None, "no list")):
        with pytest.raises(DataError, match=message):
            encoder.fit(column)
    with pytest.raises(DataError, match="all 2 texts are None"):
        encoder.fit([None, None])
    with pytest.warns(UserWarning, match="all 1 texts are None"):
        assert np.isnan(encoder.fit(["a"]).transform([None])).all()

"""The built-in text encoder against scikit-learn's TF-IDF, fitted on the same texts: CPU seconds and macro-F1 of both.

    python benchmarks/hashing.py --data TABLE [--characters]

Both run in this process and take turns; a time is the least of five. The encoder gets batches of 32 texts. Macro-F1 is
that of a logistic regression with balanced classes, in 5 folds that keep equal texts together; the penalty is chosen
inside the training rows, where TF-IDF and the scaling of hashed columns are fitted, too. TF-IDF takes words, or with
`--characters`, for scripts without spaces, single characters and pairs of characters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from table import Row, measured

from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.samples.dataset import read_samples

BATCH = 32
STRENGTHS = (1, 4, 16, 64, 256)  # of a logistic regression on rows whose length is about 1
Split = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]  # rows to train and to test on -> the inputs of both


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def folds(labels: np.ndarray, texts: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedGroupKFold

    groups = np.unique(texts, return_inverse=True)[1]
    return list(StratifiedGroupKFold(count, shuffle=True, random_state=0).split(labels, labels, groups))


def scores(split: Split, labels: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Macro-F1 of each fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    def score(train: np.ndarray, test: np.ndarray, strengths: tuple[float, ...]) -> list[float]:
        inputs, unseen = split(train, test)
        models = (LogisticRegression(C=c, max_iter=200, tol=1e-3, class_weight="balanced") for c in strengths)
        predicted = (model.fit(inputs, labels[train]).predict(unseen) for model in models)
        return [f1_score(labels[test], chosen, average="macro") for chosen in predicted]

    found = []
    for train, test in folds(labels, texts, 5):
        inner, held = (train[part] for part in folds(labels[train], texts[train], 4)[0])
        found += score(train, test, (STRENGTHS[int(np.argmax(score(inner, held, STRENGTHS)))],))
    return np.array(found)


def compare_quality(texts: np.ndarray, labels: np.ndarray, vectors: np.ndarray, vectorizer: Any) -> None:
    def weighted(train: np.ndarray, test: np.ndarray) -> tuple[Any, Any]:
        return vectorizer.fit_transform(texts[train]), vectorizer.transform(texts[test])

    def hashed(train: np.ndarray, test: np.ndarray) -> tuple[Any, Any]:
        mean, deviation = vectors[train].mean(0), vectors[train].std(0)
        scale = np.where(deviation > 1e-6, deviation, 1) * np.sqrt(vectors.shape[1])
        return (vectors[train] - mean) / scale, (vectors[test] - mean) / scale

    ours, theirs = (scores(split, labels, texts) for split in (hashed, weighted))
    error = (ours - theirs).std(ddof=1) / np.sqrt(len(ours))
    print(f"macro-F1: hashing {ours.mean():.3f}, TF-IDF {theirs.mean():.3f}, "
          f"difference {(ours - theirs).mean():+.3f} ± {error:.3f} (goal -0.010)")  # fmt: skip


def rows(small: bool) -> Iterator[Row]:
    """CPU time on made-up texts as long as a tweet, and as a title."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    (encoder,) = load_encoders(describe_encoders(["hashing"], EncoderOptions(dtype="float32", cleaning="tweet")), "cpu")
    random = np.random.default_rng(0)
    for length, name in ((15, "tweets"), (5, "titles")):
        numbers = np.minimum(random.zipf(1.2, (200 if small else 4000, length)), 30_000)
        texts = [encoder.prepare(" ".join(f"w{number:x}ord" for number in row)) for row in numbers.tolist()]

        def encode(texts: list[str] = texts) -> None:
            for start in range(0, len(texts), BATCH):
                encoder.embed(texts[start : start + BATCH])

        def fit(texts: list[str] = texts) -> None:
            TfidfVectorizer().fit_transform(texts)

        encode()  # the table of characters is made once
        spent = [(cpu_seconds(encode), cpu_seconds(fit)) for _ in range(5)]
        ours, theirs = (min(times) for times in zip(*spent, strict=True))
        yield measured(f"hashing of {name}, CPU time against TF-IDF of words", ours / theirs, "x", most=4.0)


def main() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--characters", action="store_true")
    parser.add_argument("--cleaning", default="tweet", choices=("tweet", "none"))
    asked = parser.parse_args()
    samples = [sample for sample in read_samples(asked.data) if sample.text]
    options = EncoderOptions(dtype="float32", cleaning=asked.cleaning)
    (encoder,) = load_encoders(describe_encoders(["hashing"], options), "cpu")
    texts = [encoder.prepare(sample.text) for sample in samples]
    vectorizer = TfidfVectorizer(**({"analyzer": "char", "ngram_range": (1, 2)} if asked.characters else {}))

    def encode() -> Iterator[np.ndarray]:
        return (encoder.embed(texts[start : start + BATCH])[0] for start in range(0, len(texts), BATCH))

    vectors = np.concatenate(list(encode()))  # the table of characters is made once
    times = [
        (
            cpu_seconds(lambda: sum(map(len, encode()))),
            cpu_seconds(lambda: vectorizer.fit_transform(texts)),
        )
        for _ in range(5)
    ]
    ours, theirs = (min(column) for column in zip(*times, strict=True))
    print(f"{len(texts):,} texts: hashing {ours:.3f} s, TF-IDF {theirs:.3f} s, ratio {ours / theirs:.1f} (goal 4)")
    known = [row for row, sample in enumerate(samples) if sample.label is not None]
    if known:
        labels = np.array([samples[row].label for row in known])
        compare_quality(np.array([texts[row] for row in known], object), labels, vectors[known], vectorizer)


if __name__ == "__main__":
    main()

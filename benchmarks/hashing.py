"""The built-in text encoder against scikit-learn's TF-IDF of words, fitted on the same texts: CPU seconds of both.

    python benchmarks/hashing.py --data TABLE

Both run in this process and take turns; a figure is the least of five. The encoder gets batches of 32 texts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.samples.dataset import read_samples

BATCH = 32


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    samples = read_samples(parser.parse_args().data)
    (encoder,) = load_encoders(describe_encoders(["hashing"], EncoderOptions(dtype="float32", cleaning="tweet")), "cpu")
    texts = [encoder.prepare(sample.text) for sample in samples if sample.text]

    def encode() -> None:
        for start in range(0, len(texts), BATCH):
            encoder.embed(texts[start : start + BATCH])

    encode()  # the table of characters is made once
    runs = [(cpu_seconds(encode), cpu_seconds(lambda: TfidfVectorizer().fit_transform(texts))) for _ in range(5)]
    ours, theirs = (min(times) for times in zip(*runs, strict=True))
    print(f"{len(texts):,} texts: hashing {ours:.3f} s, TF-IDF {theirs:.3f} s, ratio {ours / theirs:.1f} (goal 4)")


if __name__ == "__main__":
    main()

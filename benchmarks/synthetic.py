"""Samples that are not real, but can be learned: vectors that lean towards their class, and a table of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfeat.cache.features import Block, Features
from mmfeat.cache.shard import Rows
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.evaluation.splits import TEST, VALIDATION, Splits
from mmfeat.samples.dataset import Sample, read_samples
from mmfeat.samples.labels import Targets, indicator

CLASSES = ("negative", "neutral", "positive")
SHARES = (0.2, 0.3, 0.5)
WIDTHS = {"image": 1024, "text": 384}
TOKENS = {"image": 49, "text": 30}
LEAN = 0.06  # of the classes' means, in standard deviations a column: a head reaches a macro-F1 of about 0.8
TEST_SHARE, VALIDATION_PARTS = 5, 5  # of 4,000 samples 800 test, 640 validate and 2,560 train
OUTPUTS = ("pooled", "tokens")
OPTIONS = EncoderOptions(dtype="bfloat16", cleaning="tweet", outputs=OUTPUTS)


@dataclass(frozen=True)
class Made:
    """Samples with the vectors of one image and one text encoder."""

    features: Features
    targets: Targets

    @property
    def vectors(self) -> np.ndarray:
        """(N, D) float32, both encoders side by side."""
        return np.concatenate([block.vectors for block in self.features.blocks], axis=1).astype(np.float32)


def make_samples(samples: int, widths: Mapping[str, int], numbers: np.ndarray | None = None) -> Made:
    """Samples of three classes of unequal size, or whose vectors lean towards the classes with these numbers; vectors
    are float16, as they come out of a cache."""
    random = np.random.default_rng(0)
    leans = random.choice(len(CLASSES), samples, p=SHARES) if numbers is None else numbers
    blocks = tuple(
        Block(name, name, leaning(leans, width, random), np.ones(samples, bool), name) for name, width in widths.items()
    )
    classes = CLASSES if numbers is None else tuple(map(str, range(numbers.max() + 1)))
    return Made(Features(tuple(map(str, range(samples))), blocks), Targets(classes, indicator(leans, len(classes))))


def leaning(numbers: np.ndarray, width: int, random: np.random.Generator) -> np.ndarray:
    """(N, width) float16 noise around the mean of each sample's class."""
    means = LEAN * random.standard_normal((max(len(CLASSES), numbers.max() + 1), width), np.float32)
    return (means[numbers] + random.standard_normal((len(numbers), width), np.float32)).astype(np.float16)


def make_splits(samples: int, folds: int) -> Splits:
    """Folds that test a fifth each; of the rest a fifth validates, a different one with each of five repeats."""
    order = np.random.default_rng(1).permutation(samples)
    roles = np.full((samples, folds), "", dtype="U12")
    for fold in range(folds):
        roles[order[fold::TEST_SHARE], fold] = TEST
        rest = order[roles[order, fold] != TEST]
        for part in range(VALIDATION_PARTS):
            roles[rest[part::VALIDATION_PARTS], fold] = f"{VALIDATION}-{part + 1}"
    return Splits(tuple(map(str, range(samples))), tuple(f"fold{fold}" for fold in range(folds)), roles)


def write_extracted(folder: Path, samples: int) -> list[str]:
    """`folder/table.csv`, its photos, and `folder/cache` as if two encoders with tokens had run; returns requests."""
    random = np.random.default_rng(2)
    numbers = random.choice(len(CLASSES), samples, p=SHARES)
    _write_table(folder, numbers, random)
    requests = [_write_image_model(folder / "image-model"), _write_text_model(folder / "text-model")]
    listed = read_samples(folder / "table.csv")
    labels = np.array([CLASSES.index(str(sample.label)) for sample in listed.samples])
    cache = Cache(folder / "cache", listed.name)
    for tower in describe_encoders(requests, OPTIONS):
        _fill(cache, tower, listed.samples, labels)
    return requests


def _write_table(folder: Path, numbers: np.ndarray, random: np.random.Generator) -> None:
    from PIL import Image

    (folder / "photos").mkdir(parents=True)
    with open(folder / "table.csv", "w", encoding="utf-8") as table:
        table.write("id,text,image,label\n")
        for row, number in enumerate(numbers.tolist()):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64, 64)).save(folder / f"photos/{row}.jpg")
            words = " ".join(f"word{word}" for word in random.integers(0, 5000, 8))
            table.write(f"s{row},{words},photos/{row}.jpg,{CLASSES[number]}\n")


def _write_image_model(folder: Path) -> str:
    """The request for an image model that is described, and never loaded because nothing is missing."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_large_patch32_224"}))
    (folder / "model.safetensors").write_bytes(b"stands for weights")
    return f"timm:{folder}"


def _write_text_model(folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "model.safetensors").write_bytes(b"stands for weights")
    return f"bert:{folder}"


def _fill(cache: Cache, tower: Tower, samples: Sequence[Sample], labels: np.ndarray) -> None:
    """Values of all samples in the cache; a sample's tokens lean as its vector does."""
    spec = tower.spec
    random = np.random.default_rng(3)
    vectors = leaning(labels, WIDTHS[spec.modality], random)
    noise = random.standard_normal((TOKENS[spec.modality], vectors.shape[1]), np.float32).astype(np.float16)
    with cache.writer(spec, {}) as writer:
        for start in range(0, len(samples), 256):
            part, values = samples[start : start + 256], vectors[start : start + 256]
            keys = [sample.key(spec.modality)[0] or b"" for sample in part]
            tokens = list(values[:, None] + noise) if spec.output == "tokens" else values
            writer.add(Rows(keys, [sample.id for sample in part], [""] * len(part), tokens))

"""Made-up vectors of 300 samples on which the tests of heads train: in memory or on disk, with views and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from mmfeat.cache.features import Block, Features, MappedBlock
from mmfeat.samples.labels import Targets, indicator

SAMPLES = 300
CLASSES = ("a", "b", "c")
NUMBERS = np.random.default_rng(7).choice(3, SAMPLES, p=[0.45, 0.2, 0.35])
TARGETS = Targets(CLASSES, indicator(NUMBERS, 3))
MULTILABEL = Targets(CLASSES, np.stack([NUMBERS == 0, NUMBERS == 2, NUMBERS != 1], axis=1), multilabel=True)
TRAIN, VALIDATION, TEST = np.arange(180), np.arange(180, 220), np.arange(220, SAMPLES)
SIGNAL = {"text": 0, "image": 2}  # the class that a modality knows: only both tell all three apart


def features(
    missing: float = 0.0,
    scale: float = 1.0,
    image: Sequence[int] = (8,),
    text: Sequence[int] = (12,),
    views: int = 0,
    told: Sequence[str] = ("image", "text"),
) -> Features:
    """An encoder for each width; views of photos are noisier. Vectors of modalities not `told` are noise."""
    rng = np.random.default_rng(8)
    blocks = []
    for modality, widths in (("text", text), ("image", image)):
        for number, width in enumerate(widths):
            mask = rng.random(SAMPLES) >= missing
            for view in range(views + 1 if modality == "image" else 1):
                vectors = rng.standard_normal((SAMPLES, width))
                if modality in told:
                    vectors[:, 0] += (6 - view) * (SIGNAL[modality] == NUMBERS)
                there = mask & (rng.random(SAMPLES) >= missing) if view else mask
                vectors = np.where(there[:, None], vectors * scale, np.nan).astype(np.float32)
                name, source = f"{modality}-{number}-{view}", f"{modality}-{number}"
                blocks.append(Block(name, modality, vectors, there, source, f"aug{view}" if view else "none"))
    return Features(tuple(map(str, range(SAMPLES))), tuple(blocks))


def on_disk(plain: Features) -> Features:
    """The same vectors as blocks that are read a batch at a time."""
    mapped = tuple(
        MappedBlock(
            block.name,
            block.modality,
            block.vectors.shape[1],
            block.mask.astype(np.int64),
            block.mask,
            np.arange(SAMPLES),
            partial(_read, np.nan_to_num(block.vectors)[:, None], block.mask.astype(np.int64)),
            block.source,
            block.view,
            "pooled",
        )
        for block in plain.blocks
    )
    return Features(plain.ids, (), mapped)


def with_tokens(plain: Features, width: int = 6, longest: int = 4, missing: float = 0.0) -> Features:
    """Token states of both modalities beside the vectors, 1 to `longest` a sample; the last one carries the signal."""
    rng = np.random.default_rng(9)
    mapped = []
    for modality in ("text", "image"):
        there = rng.random(SAMPLES) >= missing
        lengths = np.where(there, rng.integers(1, longest + 1, SAMPLES), 0)
        values = rng.standard_normal((SAMPLES, longest, width)).astype(np.float32)
        values[np.arange(SAMPLES), lengths - 1, 0] += 9 * (SIGNAL[modality] == NUMBERS)
        mapped.append(token_block(modality, values, lengths))
    return Features(plain.ids, plain.blocks, tuple(mapped))


def token_block(modality: str, values: np.ndarray, lengths: np.ndarray) -> MappedBlock:
    """(N, T, D) tokens of which `lengths` are there."""
    rows = np.arange(len(values))
    read = partial(_read, values, lengths)
    return MappedBlock(f"{modality}-tokens", modality, values.shape[-1], lengths, lengths > 0, rows, read)


def _read(values: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """As the cache reads: zeros where a sample has fewer tokens than the longest of the batch."""
    most = lengths[rows].max(initial=0)
    there = np.arange(most) < lengths[rows][:, None]
    return np.where(there[..., None], values[rows, :most], 0).astype(values.dtype)

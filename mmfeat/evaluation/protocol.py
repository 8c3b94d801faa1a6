"""Protocols: how heads are scored, and the splits that a protocol asks for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmfeat.errors import ConfigError
from mmfeat.evaluation.split_files import FOLDS_FILE, has_splits, load_splits, save_splits
from mmfeat.evaluation.splits import HOLDOUT, Splits, check_folds, make_folds, make_given, make_holdout
from mmfeat.samples.dataset import Sample
from mmfeat.samples.duplicates import duplicate_links, linked_groups
from mmfeat.samples.keys import ContentKeys, image_hashes
from mmfeat.samples.labels import TEST, TRAIN, Targets, split_notes
from mmfeat.samples.thumbnails import SecondLook
from mmfeat.system.wording import Progress, counted

AUTO, KFOLD, HOLD, GIVEN = "auto", "kfold", "holdout", "given"
PROTOCOLS = (AUTO, KFOLD, HOLD, GIVEN)
LARGE_GROUP = 0.1  # share of the test rows of a fold; larger groups of near duplicates are told
UNEVEN = 0.1  # share by which the test rows of a fold may differ from their part without a word
SHOWN = 60  # characters of a text in a note
HASHES_FILE, THUMBNAILS_FILE = "images.hashes", "images.thumbnails"  # files in the data set's cache folder


@dataclass(frozen=True)
class Protocol:
    """How heads are scored: in `folds` folds with `seeds` seeds each, in one `holdout` of `shares`, or in the split
    `given` with the data; `auto` is the given one, or folds where there is none.

    The shares are train:validation:test or train:test. `grouped` keeps near duplicates on one side of each split.
    Splits are read from the folder `split_dir`, or written into the folder if it holds none.
    """

    kind: str = AUTO
    folds: int = 5
    seeds: int = 3
    shares: tuple[float, ...] = (8.0, 1.0, 1.0)
    grouped: bool = True
    split_dir: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.kind not in PROTOCOLS:
            raise ConfigError(f"--protocol {self.kind}: use one of {', '.join(PROTOCOLS)}")
        if self.seeds < 1:
            raise ConfigError(f"--seeds {self.seeds}: at least 1 is needed")
        if len(self.shares) not in (2, 3) or not all(0 < share < math.inf for share in self.shares):
            written = ":".join(f"{share:g}" for share in self.shares)
            raise ConfigError(f"--split {written}: write train:validation:test, as 8:1:1, or train:test, as 8:2")
        object.__setattr__(self, "shares", tuple(map(float, self.shares)))  # 8 and 8.0 are the same protocol

    def of(self, labelled: Sequence[Sample]) -> Protocol:
        """The protocol for these samples, which is never `auto`. Raises `ConfigError` where no split is given."""
        parts = {sample.split for sample in labelled}
        has_own = "" not in parts and TRAIN in parts and len(parts) > 1
        is_saved = self.split_dir is not None and has_splits(Path(self.split_dir))
        if self.kind == GIVEN and not has_own and not is_saved:
            raise ConfigError(
                f"--protocol {GIVEN}: not every labelled sample is of train, val or test; say it in a column split, or "
                "name files or folders so; --protocol kfold draws folds"
            )
        if self.kind != AUTO:
            return self
        if is_saved and (Path(str(self.split_dir)) / FOLDS_FILE).is_file():
            return replace(self, kind=KFOLD)
        return replace(self, kind=GIVEN if has_own else HOLD if is_saved else KFOLD)

    @property
    def test_share(self) -> float:
        """The share of the samples that one fold tests."""
        return 1 / self.folds if self.kind == KFOLD else self.shares[-1] / sum(self.shares)


def protocol_splits(
    labelled: Sequence[Sample],
    targets: Targets,
    images: ContentKeys,
    folder: Path,
    protocol: Protocol,
    progress: Progress,
) -> tuple[Splits, Path | None, tuple[str, ...]]:
    """The splits, the folder into which they were written (None where they were loaded or no folder was named), and
    notes on groups of near duplicates that weigh much in a fold."""
    protocol = protocol.of(labelled)
    ids = [sample.id for sample in labelled]
    saved = Path(protocol.split_dir) if protocol.split_dir else None
    if saved is not None and has_splits(saved):
        splits = load_splits(saved, ids)
        if (splits.names == (HOLDOUT,)) != (protocol.kind != KFOLD):
            kind = "a holdout" if splits.names == (HOLDOUT,) else "folds"
            raise ConfigError(f"--protocol {protocol.kind}: {saved} holds {kind}; name another --split-dir")
        return splits, None, ()
    if protocol.kind == KFOLD:  # before any photo is looked at
        check_folds(targets, np.arange(len(ids)), protocol.folds)
    links, groups = near_duplicates(labelled, images, folder, protocol, progress)
    if protocol.kind == GIVEN:
        parts = [sample.split for sample in labelled]
        splits = make_given(parts, targets, ids, groups, protocol.seed, protocol.seeds)
    elif protocol.kind == KFOLD:
        splits = make_folds(targets, ids, groups, protocol.folds, protocol.seed, protocol.seeds)
    else:
        splits = make_holdout(targets, ids, groups, protocol.shares, protocol.seed, protocol.seeds)
    if saved is not None:
        save_splits(splits, saved, [str(sample.label) for sample in labelled])
    if protocol.kind == GIVEN:
        return splits, saved, (*split_notes(Counter(parts)), *_groups_on_both_sides(splits, groups))
    tested = protocol.test_share * len(ids)
    return splits, saved, (*_large_groups(labelled, links, groups, tested), *_uneven_folds(splits, tested))


def near_duplicates(
    samples: Sequence[Sample], images: ContentKeys, folder: Path, protocol: Protocol, progress: Progress
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The links of near duplicates, as `duplicate_links` gives them, and the number (N,) of the group of each sample.

    Without `protocol.grouped` each sample is its own group. Facts about photos are kept in `folder`.
    """
    if not protocol.grouped:
        return {}, np.arange(len(samples))
    hashes = image_hashes(samples, images, folder / HASHES_FILE, progress)
    look = SecondLook(samples, images.keys, folder / THUMBNAILS_FILE, progress)
    links = duplicate_links(samples, images.keys, hashes, look)
    return links, linked_groups(links.values(), len(samples))


def _large_groups(
    samples: Sequence[Sample], links: Mapping[str, np.ndarray], groups: np.ndarray, tested: float
) -> list[str]:
    """A line on the groups larger than `LARGE_GROUP` of the `tested` rows of a fold: how many, and why the largest."""
    sizes = np.bincount(groups)
    if sizes.max(initial=0) <= max(LARGE_GROUP * tested, 1):
        return []
    inside = {rule: pairs[groups[pairs[:, 0]] == sizes.argmax()] for rule, pairs in links.items()}
    rule = max(inside, key=lambda name: len(inside[name]))
    sample = samples[int(inside[rule][0, 0])]
    example = " ".join((sample.text or "").split()) if rule.endswith("text") else Path(str(sample.image)).name
    example = f"{example[: SHOWN - 1]}…" if len(example) > SHOWN else example
    return [
        f"{counted(int((sizes > LARGE_GROUP * tested).sum()), 'group')} of near duplicates larger than a tenth of a "
        f"fold; the largest has {sizes.max():,} of {len(groups):,} samples, by {rule}: {example}"
    ]


def _groups_on_both_sides(splits: Splits, groups: np.ndarray) -> list[str]:
    """A line on the near duplicates that the user's own split puts among the scored samples and among others."""
    scored = splits.roles[:, 0] == TEST
    if not (both := np.intersect1d(groups[scored], groups[~scored])).size:
        return []
    count = counted(int(np.isin(groups[scored], both).sum()), "scored sample")
    return [f"{count} of the data's own split have near duplicates elsewhere in it; mmfeat audit shows them"]


def _uneven_folds(splits: Splits, tested: float) -> list[str]:
    """A line with the numbers of test rows of all folds, where one differs by more than `UNEVEN` and one row."""
    sizes = (splits.roles == TEST).sum(axis=0)
    if np.abs(sizes - tested).max() <= max(UNEVEN * tested, 1):
        return []
    each = ", ".join(f"{size:,}" for size in sizes.tolist())
    what = "folds test" if len(sizes) > 1 else "the holdout tests"
    return [f"{what} {each} samples, not {tested:,.0f}: groups of near duplicates stay whole (or --no-group)"]

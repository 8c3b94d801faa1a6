"""Protocols: how heads are scored, the splits that a protocol asks for, and the files that keep splits: `folds.csv`, or
the three files of a holdout."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmfeat.errors import ConfigError, RunError
from mmfeat.evaluation.resampling import joined_groups
from mmfeat.evaluation.splits import HOLDOUT, Splits, check_folds, make_folds, make_given, make_holdout
from mmfeat.samples.dataset import Sample
from mmfeat.samples.duplicates import duplicate_links, linked_groups
from mmfeat.samples.encodings import decode_text
from mmfeat.samples.keys import ContentKeys, image_hashes
from mmfeat.samples.labels import TEST, TRAIN, VALIDATION, Targets, split_notes
from mmfeat.samples.thumbnails import SecondLook
from mmfeat.system.files import csv_text, file_sha256, write_atomic
from mmfeat.system.wording import Progress, counted

FOLDS_FILE = "folds.csv"
HOLDOUT_FILES = {TRAIN: "train_split.csv", VALIDATION: "val_split.csv", TEST: "test_split.csv"}
GROUP_COLUMN = "group"  # column of the numbers of groups of near duplicates; empty for a sample that has none
ROLE_COLUMN = "role"  # column of `train_split.csv`, for rows that validate with one seed and train with the others
FORMER_FINAL = "final"  # name of a column without test rows that earlier versions kept beside the folds

_ROLE = re.compile(f"{TRAIN}|{TEST}|{VALIDATION}(-[1-9][0-9]?)?")
AUTO, KFOLD, HOLD, GIVEN = "auto", "kfold", "holdout", "given"
PROTOCOLS = (AUTO, KFOLD, HOLD, GIVEN)
LARGE_GROUP = 0.1  # share of the test rows of a fold; larger groups of near duplicates are told
UNEVEN = 0.1  # share by which the test rows of a fold may differ from their part without a word
SHOWN = 60  # characters of a text in a note
HASHES_FILE, THUMBNAILS_FILE = "images.hashes", "images.thumbnails"  # files in the data set's cache folder


def save_splits(splits: Splits, folder: Path, labels: Sequence[str]) -> None:
    """Write `folds.csv` with an id and one column for each fold; a holdout goes to three files of id and label.

    Where samples are near duplicates, a last column has the numbers of their groups. `val_split.csv` is empty where
    each repeat validates on a part of `train_split.csv`.
    """
    rows, of = joined_groups(splits.groups, len(splits.ids))
    groups = np.full((len(splits.ids), 1 if len(rows) else 0), "", dtype="U20")
    groups[rows] = of[:, None]
    last = [GROUP_COLUMN] * groups.shape[1]
    if splits.names != (HOLDOUT,):
        table = np.column_stack([splits.ids, splits.roles, groups]).tolist()
        write_atomic(folder / FOLDS_FILE, csv_text(["id", *splits.names, *last], table).encode())
        return
    roles = splits.roles[:, 0].tolist()
    for file, name in HOLDOUT_FILES.items():
        shown = [ROLE_COLUMN] if file == TRAIN and splits.parts(0) else []
        lines = [
            [id, label, *[role][: len(shown)], *group]
            for id, label, role, group in zip(splits.ids, labels, roles, groups.tolist(), strict=True)
            if _file_of(role) == file
        ]
        write_atomic(folder / name, csv_text(["guid", "tag", *shown, *last], lines).encode())


def has_splits(folder: Path) -> bool:
    """Whether the folder holds files that `load_splits` reads."""
    return any((folder / name).is_file() for name in (FOLDS_FILE, HOLDOUT_FILES[TRAIN]))


def files_hash(folder: Path) -> str:
    """SHA-256 of the files that keep the splits in a folder; empty where there are none."""
    files = [folder / name for name in (FOLDS_FILE, *HOLDOUT_FILES.values()) if (folder / name).is_file()]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else ""


def check_splits(folder: Path, digest: str) -> None:
    """Raise `RunError` where the splits of a run are not those that were saved, whose hash is `digest`."""
    if digest not in ("", files_hash(folder)):  # earlier versions recorded none
        raise RunError(f"{folder}: its splits are not those that were saved; run mmfeat heads again")


def load_splits(folder: Path, ids: Sequence[str]) -> Splits:
    """The splits in `folder`, in the order of `ids`; they must be about exactly these samples.

    Reads `folds.csv`, or the three files of a holdout: id first, header optional, other columns ignored. Raises
    `RunError` with file and remedy for anything that is no split of these samples.
    """
    path, names, rows, groups = _read_files(folder)
    roles = {row[0]: row[1:] for row in rows}
    if len(roles) < len(rows):
        raise RunError(f"{path}: an id stands on two lines; each sample has one line")
    if set(roles) != set(ids):
        missing, extra = len(set(ids) - set(roles)), len(set(roles) - set(ids))
        raise RunError(
            f"{path}: splits of {len(roles)} samples, the data has {len(ids)} labelled ones ({missing} have no "
            f"fold, {extra} are gone); make new splits by leaving out --split-dir"
        )
    table = _role_table(path, [roles[id] for id in ids], len(names))
    splits = Splits(tuple(ids), names, table, group_numbers(groups, ids))
    for number in range(len(names)):
        folds = [splits.fold(number, repeat) for repeat in range(splits.parts(number) or 1)]
        if not all(len(fold.train) and len(fold.validation) and len(fold.test) for fold in folds):
            raise RunError(f"{path}: each fold needs {TRAIN}, {VALIDATION} and {TEST} rows, {names[number]!r} has not")
    if twice := int(((splits.roles == TEST).sum(axis=1) > 1).sum()):
        raise RunError(f"{path}: {twice} samples are {TEST} in several folds; test each of them once")
    return splits


def read_roles(folder: Path) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Names of the folds, the id of each line, and its roles (M, F), of any samples; an id may stand on several lines.

    The audit uses this to name the fault of splits that `load_splits` refuses. Raises `RunError` for other files.
    """
    path, names, rows, _ = _read_files(folder)
    return names, [row[0] for row in rows], _role_table(path, [row[1:] for row in rows], len(names))


def read_groups(folder: Path, ids: Sequence[str]) -> np.ndarray | None:
    """The groups of near duplicates of some samples, by the splits in `folder`; None where these name none."""
    return group_numbers(_read_files(folder)[-1], ids) if has_splits(folder) else None


def group_numbers(groups: Mapping[str, str], ids: Sequence[str]) -> np.ndarray | None:
    """(N,) the number of the group of each id; an id without a group is alone. None where no id has a group."""
    named = [groups.get(id) or f" {row}" for row, id in enumerate(ids)]
    return np.unique(named, return_inverse=True)[1] if any(groups.values()) else None


def _file_of(role: str) -> str:
    """The role whose file holds a row of a holdout: rows that validate in one repeat are written with training rows."""
    return TRAIN if role.startswith(f"{VALIDATION}-") else role


def _read_files(folder: Path) -> tuple[Path, tuple[str, ...], list[list[str]], dict[str, str]]:
    """(file to name in errors, names of the folds, rows of id and roles, id -> group)."""
    path = folder / FOLDS_FILE
    if path.is_file() or not has_splits(folder):
        return path, *_read_folds(path)
    groups: dict[str, str] = {}
    return folder / HOLDOUT_FILES[TRAIN], (HOLDOUT,), list(_read_holdout(folder, groups)), groups


def _read_rows(path: Path) -> list[list[str]]:
    try:
        text, _ = decode_text(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: no saved splits ({error.strerror}); --split-dir is a run folder") from error
    return [row for row in csv.reader(io.StringIO(text, newline="")) if row]


def _read_folds(path: Path) -> tuple[tuple[str, ...], list[list[str]], dict[str, str]]:
    """Names of the folds, rows of id and roles, and the group of each id that has one."""
    header, *rows = _read_rows(path) or [[]]
    if {len(row) for row in rows} != {len(header)} or len(header) < 2:
        raise RunError(f"{path}: each line must have an id and one cell a fold, under a header of their names")
    groups: dict[str, str] = {}
    if header[-1] == GROUP_COLUMN and len(header) > 2:
        groups = {row[0]: row[-1] for row in rows}
        header, rows = header[:-1], [row[:-1] for row in rows]
    if header[-1] == FORMER_FINAL and len(header) > 2 and TEST not in {row[-1] for row in rows}:
        header, rows = header[:-1], [row[:-1] for row in rows]
    return tuple(header[1:]), rows, groups


def _read_holdout(folder: Path, groups: dict[str, str]) -> Iterator[list[str]]:
    """Yield id and role of each line of the three files, and add its group to `groups`; without `val_split.csv`,
    `train_split.csv` needs roles."""
    for role, name in HOLDOUT_FILES.items():
        path = folder / name
        if role == VALIDATION and not path.is_file():
            continue
        rows = _read_rows(path)
        header = rows.pop(0) if rows and rows[0][0].strip().lower() in ("guid", "id") else []
        for row in rows:
            cells = dict(zip(header, row, strict=False))
            groups[row[0].strip()] = cells.get(GROUP_COLUMN, "")
            has_role = role == TRAIN and ROLE_COLUMN in header
            yield [row[0].strip(), cells.get(ROLE_COLUMN, "") if has_role else role]


def _role_table(path: Path, rows: list[list[str]], folds: int) -> np.ndarray:
    if wrong := {cell for row in rows for cell in row if not _ROLE.fullmatch(cell)}:
        raise RunError(
            f"{path}: {min(wrong)!r} is no role; cells must be {TRAIN}, {VALIDATION} or {TEST}, "
            f"or {VALIDATION}-1, {VALIDATION}-2 and so on"
        )
    return np.array(rows).reshape(-1, folds)


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
    share = 1 / protocol.folds if protocol.kind == KFOLD else protocol.shares[-1] / sum(protocol.shares)
    tested = share * len(ids)
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

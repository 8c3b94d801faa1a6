"""Targets: the labels of samples as a table of samples by classes, for one class a sample or for several; and the parts
of a data set that its user split."""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from posixpath import basename, dirname

import numpy as np

from mmfeat.errors import DataError

MULTICLASS, MULTILABEL, ORDINAL, REGRESSION = TASKS = ("multiclass", "multilabel", "ordinal", "regression")
VALUE = "value"  # the only "class" of a regression, whose column holds the numbers
MANY = 10  # labels that are all numbers and more than this many are most likely no classes
SEPARATOR = "|"  # stands between the classes of a multi-label cell; a cell of one `|` has none of the classes
DIGITS = 9  # significant digits of predicted numbers
SHOWN = 5  # classes that a note names
FOLDS = 5  # number of folds of a cross-validation
RARE_REMEDY = "--rare drop leaves such classes out, --rare join makes them one"
# What stands for no label in files of programs, without regard to capitals: of R, pandas, databases and JSON.
NO_LABEL = frozenset({"", "null", "nan", "na", "n/a", "#n/a", "<na>", "none"})
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
SPLIT = "split"  # the column of parts
OWN_SPLIT = "split of the data"  # begins the note on it
TRAIN, VALIDATION, TEST = "train", "validation", "test"  # the parts of a split
# What people call the parts, in folders, files and cells; Karpathy's `restval` trains, too.
PARTS = {
    **dict.fromkeys(("train", "training", "restval"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}


@dataclass(frozen=True)
class Targets:
    """Labels of N samples: `matrix` (N, C) bool, one True a row unless `multilabel`; columns as in `classes`, which are
    `ordered` from the lowest to the highest in an ordinal task. The `matrix` (N, 1) of a regression is float64."""

    classes: tuple[str, ...]
    matrix: np.ndarray
    multilabel: bool = False
    ordered: bool = False

    def __len__(self) -> int:
        return len(self.matrix)

    @property
    def numeric(self) -> bool:
        """Whether the labels are numbers instead of classes."""
        return self.matrix.dtype != bool

    @property
    def task(self) -> str:
        """The task of the labels, one of `TASKS`."""
        if self.numeric:
            return REGRESSION
        return MULTILABEL if self.multilabel else ORDINAL if self.ordered else MULTICLASS

    @property
    def numbers(self) -> np.ndarray:
        """(N,) int class numbers. Raises `ValueError` for multi-label targets, which have no single number."""
        if self.multilabel:
            raise ValueError("multi-label targets have no one class a sample; use matrix")
        return self.matrix.argmax(axis=1)

    @property
    def prior(self) -> np.ndarray:
        """(C,) share of the samples that have each class; adds up to 1 unless multi-label. The mean of numbers."""
        return self.matrix.mean(axis=0)

    def take(self, rows: Sequence[int] | np.ndarray) -> Targets:
        """The targets of some rows, given by numbers or by a mask; the classes stay."""
        return replace(self, matrix=self.matrix[rows])


def no_labels(named: str | None) -> frozenset[str]:
    """The spellings of a missing label: those that the user names, separated by commas, or `NO_LABEL`."""
    return NO_LABEL if named is None else frozenset({"", *(word.strip().casefold() for word in named.split(","))})


def is_missing(label: str, spellings: Collection[str] = NO_LABEL) -> bool:
    """Whether a label cell stands for no label."""
    return label.strip().casefold() in spellings


def label_of(values: Sequence[object], where: str) -> str:
    """The label cell of a list of classes, `a|b`, or a lone `|`. Raises `DataError` for a list of other things."""
    names = [str(int(v) if isinstance(v, float) and v.is_integer() else v).strip() for v in values if v is not None]
    if any(isinstance(value, list | Mapping) for value in values):
        raise DataError(f"{where}: the list of labels holds lists or objects; write the names of classes")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DataError(
            f"{where}: the list of labels has {repeated[0]!r} twice; write the names of a sample's classes, not a "
            "number for each class"
        )
    if odd := next((name for name in names if SEPARATOR in name), None):
        raise DataError(f"{where}: the class {odd!r} in a list of labels holds a {SEPARATOR}; write another name")
    return SEPARATOR.join(names) or SEPARATOR


def written_list(cell: str) -> list[object] | None:
    """The list that a cell of text is by JSON or Python, as pandas writes it to CSV; None for other texts."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    try:
        values = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return values if isinstance(values, list) else None


def some_counts(counts: Mapping[str, int]) -> str:
    """`kite 2, glider 1 and 3 more`."""
    first = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:SHOWN])
    return first + (f" and {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else "")


def rare_note(labels: Mapping[str, int]) -> list[str]:
    """A note on classes with fewer samples than there are folds; `labels` maps the label cells to their counts. None
    where there are many different numbers, which are most likely to be predicted as such."""
    counts, several = Counter[str](), any(SEPARATOR in label for label in labels)
    for label, count in labels.items():
        counts.update(dict.fromkeys(classes_in(label, several), count))
    rare = {name: count for name, count in sorted(counts.items(), key=lambda item: item[::-1]) if count < FOLDS}
    if not rare or looks_numeric(list(counts)):
        return []
    others = [name for name in counts if name not in rare and not any(map(str.isdigit, name))]
    close = [found for name in rare for found in difflib.get_close_matches(name, others, 1, cutoff=0.85)]
    meant = f' (did you mean "{close[0]}"?)' if close else ""
    return [f"too few samples for {FOLDS} folds: {some_counts(rare)}{meant}; for heads {RARE_REMEDY}"]


def missing_note(counts: Mapping[str, int]) -> list[str]:
    """A note on the words that were read as no label, each of which may be a class to the user."""
    listed = ", ".join(f"{word!r} {count:,}" for word, count in counts.items() if count)
    return [f"read as no label: {listed} (if such a word is a class, say --no-label null)"] if listed else []


def part_named(word: str) -> str:
    """The part of a split that a folder, a cell or the first word of a file's name calls so, "" for none."""
    plain = re.sub(r"[\W_]?(set|data|split)$", "", word.strip().casefold())
    return PARTS.get(plain, "")


def part_of_name(path: str) -> str:
    """The part of a split that a file is by the first word of its name, as in `train-00000.parquet`."""
    return part_named(re.split(r"[^a-z]", basename(path).casefold())[0])


def part_of_file(path: str) -> str:
    """The part of a split that a file is by its own name or by that of its folder."""
    return part_of_name(path) or part_named(basename(dirname(path)))


def label_notes(labels: Mapping[tuple[str, str], int]) -> list[str]:
    """Notes on what `mmfeat heads` does with labels, of which `labels` counts (part of the user's split, label)."""
    joined = next((label for _, label in labels if SEPARATOR in label.strip(SEPARATOR)), "")
    several = [f"labels such as {joined}: with heads --task multilabel each of them is a class"] if joined else []
    counts = Counter[str]()
    for (part, _), count in labels.items():
        counts[part] += count
    return [*split_notes(counts), *several]


def split_notes(counts: Mapping[str, int]) -> list[str]:
    """A note on the numbers of labelled samples of each part of a split, and on what `mmfeat heads` does with them."""
    parts = [part for part in (TRAIN, VALIDATION, TEST) if counts.get(part)]
    if counts.get("") or len(parts) < 2 or parts[0] != TRAIN:
        return []
    listed = ", ".join(f"{part} {counts[part]:,}" for part in parts)
    chosen = f", choose on {VALIDATION}" if len(parts) == 3 else ""
    return [
        f"{OWN_SPLIT}: {listed}; heads learn from {TRAIN}{chosen} and are scored on {parts[-1]} "
        "(--protocol kfold draws folds over all)"
    ]


def classes_in(label: str | None, multilabel: bool) -> set[str]:
    """The classes that a label cell names; no class without a label."""
    if label is None or not multilabel:
        return set() if label is None else {label}
    return {name for part in label.split(SEPARATOR) if (name := part.strip())}


def labels_alike(classes: Sequence[str]) -> list[str]:
    """A note on classes that differ only in case, or are the same number: most likely one class was meant."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        key = str(float(name)) if _NUMBER.fullmatch(name) else name.casefold()
        alike.setdefault(key, []).append(name)
    listed = "; ".join(", ".join(names) for names in alike.values() if len(names) > 1)
    return [f"labels differ only in spelling and count as classes of their own: {listed}"] if listed else []


def read_targets(labels: Sequence[str], task: str = MULTICLASS, order: Sequence[str] = ()) -> Targets:
    """The targets of label cells, classes sorted; those of an ordinal task by `order`, or else as numbers.

    A multi-label cell is `a|b`; a lone `|` is labelled with none of the classes. Raises `DataError` if
    there is nothing to tell apart: a single class, or a multi-label class that all samples have; and for labels
    without an order, or that are no numbers in a regression.
    """
    if task == MULTILABEL:
        return _read_multilabel(labels)
    if task == REGRESSION:
        return Targets((VALUE,), _numbers(labels))
    classes = tuple(_in_order(set(labels), order) if task == ORDINAL else sorted(set(labels)))
    if len(classes) < 2:
        labelled = f"only one class ({classes[0]})" if classes else "no sample"
        raise DataError(f"{labelled} is labelled; a classifier needs two classes, so label samples of another one")
    column = {name: number for number, name in enumerate(classes)}
    return Targets(classes, indicator([column[label] for label in labels], len(classes)), ordered=task == ORDINAL)


def _in_order(labels: set[str], order: Sequence[str]) -> list[str]:
    """The labels from the lowest to the highest. Raises `DataError` for a label that has no place."""
    if order:
        if unknown := sorted(labels - set(order)):
            raise DataError(f"--order {','.join(order)}: label {unknown[0]!r} of the data has no place; name it too")
        return [name for name in dict.fromkeys(order) if name in labels]
    if words := sorted(name for name in labels if number_of(name) is None):
        raise DataError(
            f"--task {ORDINAL}: label {words[0]!r} is no number; say the order of the labels, the lowest first: "
            "--order low,medium,high"
        )
    return sorted(labels, key=lambda name: (float(name), name))


def _numbers(labels: Sequence[str]) -> np.ndarray:
    """(N, 1) the numbers of label cells. Raises `DataError` for another label, and where all are equal."""
    numbers = [number_of(label) for label in labels]
    if None in numbers:
        wrong = [label for label, number in zip(labels, numbers, strict=True) if number is None]
        raise DataError(
            f"--task {REGRESSION}: {len(wrong):,} of {len(labels):,} labels are no numbers, as {wrong[0]!r}; correct "
            "them, or say --no-label for words that stand for no label"
        )
    if len(set(numbers)) < 2:
        raise DataError(f"--task {REGRESSION}: all labels are {labels[0] if labels else 'missing'}, nothing to predict")
    return np.array(numbers, dtype=np.float64)[:, None]


def looks_numeric(classes: Sequence[str]) -> bool:
    """Whether classes are most likely the values of a number."""
    return len(classes) > MANY and all(number_of(name) is not None for name in classes)


def number_of(label: str) -> float | None:
    """The finite number that a label is, None for another one."""
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def indicator(numbers: Sequence[int] | np.ndarray, classes: int) -> np.ndarray:
    """(...,) class numbers as (..., C) bool with one True a row."""
    return np.asarray(numbers)[..., None] == np.arange(classes)


def _read_multilabel(labels: Sequence[str]) -> Targets:
    cells = [classes_in(cell, multilabel=True) for cell in labels]
    classes = tuple(sorted(set().union(*cells)))
    if not classes:
        raise DataError(f"no sample is labelled with a class; write the classes of a sample as a{SEPARATOR}b")
    column = {name: number for number, name in enumerate(classes)}
    matrix = np.zeros((len(cells), len(classes)), dtype=bool)
    for row, cell in enumerate(cells):
        matrix[row, [column[name] for name in cell]] = True
    if matrix.all(axis=0).any():
        name = classes[int(matrix.all(axis=0).argmax())]
        raise DataError(
            f"all samples are labelled {name!r}, so there is nothing to tell apart; leave {name!r} out, or label "
            f"samples without it (a lone {SEPARATOR} is a sample with none of the classes)"
        )
    return Targets(classes, matrix, multilabel=True)


def names_of(chosen: np.ndarray, classes: tuple[str, ...]) -> str:
    """The label cell of a (C,) choice: one class, or `a|b`, or a lone `|`; the number of a regression."""
    if chosen.dtype != bool:
        return np.format_float_positional(chosen[0], precision=DIGITS, unique=False, fractional=False, trim="-")
    return SEPARATOR.join(name for name, is_chosen in zip(classes, chosen, strict=True) if is_chosen) or SEPARATOR


def cells_of(chosen: np.ndarray, classes: tuple[str, ...]) -> list[str]:
    """The label cells of (N, C) choices; an equal choice is written once."""
    if chosen.dtype != bool:
        return [names_of(row, classes) for row in chosen]
    rows = [row.tobytes() for row in chosen]
    cells = {row: names_of(np.frombuffer(row, bool), classes) for row in set(rows)}
    return [cells[row] for row in rows]


def absent_note(targets: Targets) -> list[str]:
    """A line about classes that no scored sample has: unlike scikit-learn's, a macro-F1 here is over all classes."""
    absent = [
        name for name, has in zip(targets.classes, np.any(targets.matrix, axis=0).tolist(), strict=True) if not has
    ]
    shown = f"{', '.join(absent[:SHOWN])}{' and others' if len(absent) > SHOWN else ''}"
    return [f"no scored sample is {shown}, which counts as an F1 of 0 in macro-F1"] if absent else []

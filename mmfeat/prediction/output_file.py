"""The prediction file: ids, labels and probabilities as CSV, TSV or JSON lines.

Two checks come before anything is written: of the predictions, and of the formatted text when it is read back.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmfeat.errors import ConfigError, SubmissionError
from mmfeat.samples.dataset import SampleSet
from mmfeat.samples.labels import SEPARATOR, cells_of, number_of
from mmfeat.system.files import write_atomic

NAMES = ("guid", "tag")
FORMATS = ("csv", "tsv", "jsonl")
# Suffixes of formats that are refused.
UNWRITTEN = ("parquet", "xlsx", "xls", "json", "npy", "npz", "h5", "hdf5", "gz", "zip")
DELIMITERS = {"csv": ",", "tsv": "\t"}
PHOTOS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")  # first bytes of photo files
OBJECT = "probabilities"  # name of the field in JSON lines
DIGITS = 6
ROUNDING = 0.5 * 10.0**-DIGITS
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Predictions:
    """Predictions for N samples: `chosen` (N, C) bool, one class a row unless `multilabel`, and calibrated
    `probabilities` (N, C), with `ids` of length N and `classes` of length C. In a regression both are (N, 1) numbers.
    """

    ids: tuple[str, ...] = field(repr=False)
    chosen: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]
    multilabel: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def numeric(self) -> bool:
        return self.chosen.dtype != bool

    @property
    def labels(self) -> list[str]:
        """The N label cells: one class, or for multi-label runs `a|b` or a lone `|`."""
        return cells_of(self.chosen, self.classes)

    @property
    def shares(self) -> dict[str, float]:
        """Class -> share of the samples for which the class is predicted; of numbers, what `spread_of` says."""
        if self.numeric:
            return spread_of(self.chosen)
        return dict(zip(self.classes, self.chosen.mean(0).tolist(), strict=True)) if len(self) else {}


def spread_of(numbers: np.ndarray) -> dict[str, float]:
    """The lowest, the mean and the highest number, of none nothing."""
    if not numbers.size:
        return {}
    return {"lowest": float(numbers.min()), "mean": float(numbers.mean()), "highest": float(numbers.max())}


@dataclass(frozen=True)
class OutputFormat:
    """The format of a prediction file. `names` are the columns of id and label; with `probabilities`, the columns of
    all classes may follow."""

    format: str = "csv"
    header: bool = True
    names: tuple[str, ...] = NAMES
    probabilities: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"--format {self.format}: use one of {', '.join(FORMATS)}")
        if self.format == "jsonl" and not self.header:
            raise ConfigError("--no-header: JSON lines have no header, each names its fields; use csv or tsv")
        if len(self.names) != 2 and not (self.probabilities and len(self.names) > 2):
            raise ConfigError(
                f"--columns {','.join(self.names)}: name two columns to write, id and label, as in guid,tag; "
                "with --proba those of the classes may follow"
            )
        if len({*self.names}) < len(self.names) or not all(map(str.strip, self.names)):
            raise ConfigError(f"--columns {','.join(self.names)}: each column needs a name of its own")

    def columns(self, classes: Sequence[str]) -> list[str]:
        """The names of the columns; a column of probabilities is called `p_CLASS` unless `names` names the column."""
        if not self.probabilities or self.format == "jsonl":
            return list(self.names[:2])
        if len(self.names) == 2:
            return [*self.names, *(f"p_{name}" for name in classes)]
        if len(self.names) != 2 + len(classes):
            raise ConfigError(
                f"--columns: {len(self.names) - 2} names for the probabilities of {len(classes)} classes "
                f"({', '.join(classes)}); name them all, or only the first two columns"
            )
        return list(self.names)

    def check(self, classes: Sequence[str]) -> None:
        """Raise `ConfigError` where `names` does not fit the classes."""
        names = self.columns(classes)
        clash = OBJECT in names if self.format == "jsonl" and self.probabilities else len({*names}) < len(names)
        if clash:
            raise ConfigError(f"--columns {','.join(self.names)}: a name stands for two columns; choose another")
        if self.format == "jsonl" and len(self.names) > 2:
            raise ConfigError(f"--columns {','.join(self.names)}: JSON lines name probabilities by class; name two")


def names_in(samples: SampleSet, training: SampleSet) -> tuple[str, str]:
    """The columns of the file: those of id and label in the user's tables, and `NAMES` where there is no table."""
    if not samples.names:
        return NAMES
    label = samples.names.get("label") or training.names.get("label") or "label"
    return samples.names.get("id", "id"), label


def choose_format(out: str | Path | None, named: str | None) -> str:
    """The format `named`, else the format of the suffix of `out`, else csv. Raises `ConfigError` where both differ."""
    suffix = Path(out).suffix.lower().lstrip(".") if out is not None else ""
    if named and named not in FORMATS:
        raise ConfigError(f"--format {named}: use one of {', '.join(FORMATS)}")
    if named and suffix in FORMATS and suffix != named:
        raise ConfigError(f"--format {named} contradicts --out {out}; leave out --format, or name a .{named} file")
    if not named and suffix in UNWRITTEN:
        raise ConfigError(f"--out {out}: .{suffix} is not written; name a .csv, .tsv or .jsonl file, or a --format")
    return named or (suffix if suffix in FORMATS else "csv")


def prediction_text(predictions: Predictions, output: OutputFormat) -> str:
    """The text of the whole file. Raises `SubmissionError` for predictions or a text that fail a check."""
    output.check(predictions.classes)
    rows = list(zip(predictions.ids, predictions.labels, strict=True))
    if predictions.numeric and output.probabilities:
        raise ConfigError("--proba: a predicted number has no probabilities of classes; leave it out")
    check_rows(rows, predictions.ids, () if predictions.numeric else predictions.classes, predictions.multilabel)
    if output.probabilities:
        check_probabilities(predictions.probabilities, predictions.ids, predictions.multilabel)
    text = _json_lines(predictions, output) if output.format == "jsonl" else _delimited(predictions, output)
    read_back(text, predictions, output)
    return text


def write_prediction_file(path: Path, predictions: Predictions, output: OutputFormat) -> None:
    """Check the file and write it atomically: a reader sees the old file or the whole new file."""
    text = prediction_text(predictions, output)
    write_atomic(path, _encoded(text))


def checked_target(out: str | Path, *kept: str | Path) -> Path:
    """The path to write, with links resolved. Raises `SubmissionError` for a device, a pipe, a folder or a photo, and
    for a path that is one of the `kept` paths (data, run) or lies in one of them."""
    path = Path(os.path.realpath(out)) if Path(out).is_symlink() else Path(out)
    if not str(out) or (path.exists() and not path.is_file()):
        raise SubmissionError(f"--out {out}: not a file that can be written; name a file, as in --out submission.csv")
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise SubmissionError(f"--out {out}: a link to itself; name a file, as in --out submission.csv")
    for kept_path in kept:
        source = Path(os.path.realpath(kept_path))
        if target == source or (source.is_dir() and source in target.parents):
            raise SubmissionError(f"--out {path}: this would overwrite the data in {kept_path}; name a file elsewhere")
    if target.exists() and _is_photo(target):  # a table of samples may name the photo
        raise SubmissionError(f"--out {path}: this would overwrite a photo; name a file elsewhere")
    return path


def _is_photo(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(PHOTOS)


def check_rows(rows: Pairs, ids: Sequence[str], classes: Sequence[str], multilabel: bool = False) -> None:
    """Raise `SubmissionError` unless every id stands in `rows` once and in order, with a label of `classes`, or without
    classes a number.

    Labels of `multilabel` rows are `a|b`, or a lone `|`.
    """
    if [id for id, _ in rows] != list(ids) or len(set(ids)) != len(ids):
        raise SubmissionError(
            f"{len(rows)} rows do not name the {len(ids)} samples once each and in order; nothing was written"
        )
    for id, label in rows:
        if not classes:
            if number_of(label) is None:
                raise SubmissionError(f"sample {id} would get the label {label!r}, which is no number")
            continue
        names = label.split(SEPARATOR) if multilabel and label != SEPARATOR else [label]
        if not set(names) <= {*classes, *([SEPARATOR] if multilabel else [])}:
            raise SubmissionError(f"sample {id} would get the label {label!r}, which is none of {', '.join(classes)}")


def check_probabilities(probabilities: np.ndarray, ids: Sequence[str], multilabel: bool, slack: float = 1e-6) -> None:
    """Raise `SubmissionError` unless all probabilities are in [0, 1] and, unless `multilabel`, rows add up to 1."""
    good = np.isfinite(probabilities) & (probabilities >= 0) & (probabilities <= 1 + slack)
    wrong = ~good.all(-1)
    if not multilabel:
        wrong |= ~(np.abs(probabilities.sum(-1) - 1) <= slack)
    if wrong.any():
        row = int(wrong.argmax())
        values = ", ".join(f"{value:.6g}" for value in probabilities[row])
        raise SubmissionError(f"sample {ids[row]} would get the probabilities {values}; nothing was written")


def read_back(text: str, predictions: Predictions, output: OutputFormat) -> None:
    """Parse the text as a reader will. Raises `SubmissionError` where the parsed rows differ from the predictions."""
    try:
        read = _read_json_lines if output.format == "jsonl" else _read_delimited
        rows, probabilities = read(text, predictions.classes, output)
    except (csv.Error, ValueError, KeyError, TypeError, IndexError) as error:
        raise SubmissionError(f"the file would not read as {output.format} ({error}); nothing was written") from error
    form = float if predictions.numeric else str  # 104.50 is the number 104.5
    wanted = zip(predictions.ids, predictions.labels, strict=True)
    if [(id, form(label)) for id, label in rows] != [(id, form(label)) for id, label in wanted]:
        raise SubmissionError(f"read as {output.format}, the file would not have the samples' ids and labels again")
    if output.probabilities:
        slack = ROUNDING * len(predictions.classes) + 1e-6
        check_probabilities(probabilities, predictions.ids, predictions.multilabel, slack)
        if np.abs(probabilities - predictions.probabilities).max(initial=0) > ROUNDING + 1e-9:
            raise SubmissionError("the file would have other probabilities than predicted; nothing was written")


def _delimited(predictions: Predictions, output: OutputFormat) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=DELIMITERS[output.format], lineterminator="\n")
    if output.header:
        writer.writerow(output.columns(predictions.classes))
    written = predictions.probabilities if output.probabilities else predictions.probabilities[:, :0]
    for id, label, values in zip(predictions.ids, predictions.labels, written.tolist(), strict=True):
        writer.writerow([id, label, *(f"{value:.{DIGITS}f}" for value in values)])
    return text.getvalue()


def _json_lines(predictions: Predictions, output: OutputFormat) -> str:
    lines = []
    for row, (id, label) in enumerate(zip(predictions.ids, predictions.labels, strict=True)):
        value = float(label) if predictions.numeric else label
        entry: dict[str, str | float | Mapping[str, float]] = dict(zip(output.names, (id, value), strict=True))
        if output.probabilities:
            rounded = (round(value, DIGITS) for value in predictions.probabilities[row].tolist())
            entry[OBJECT] = dict(zip(predictions.classes, rounded, strict=True))
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines)


def _read_delimited(text: str, classes: Sequence[str], output: OutputFormat) -> tuple[Pairs, np.ndarray]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[output.format], strict=True)
    columns = output.columns(classes)
    if output.header and (header := next(reader, [])) != columns:
        raise ValueError(f"its header reads {', '.join(header)}")
    cells = list(reader)
    if odd := next((row for row in cells if len(row) != len(columns)), None):
        raise ValueError(f"{len(odd)} cells in a row of {len(columns)}")
    return [(row[0], row[1]) for row in cells], np.array([row[2:] for row in cells], float)


def _read_json_lines(text: str, classes: Sequence[str], output: OutputFormat) -> tuple[Pairs, np.ndarray]:
    entries = [json.loads(line) for line in text.split("\n")[:-1]]
    wanted = {*output.names, *([OBJECT] if output.probabilities else [])}
    if odd := next((entry for entry in entries if set(entry) != wanted), None):
        raise ValueError(f"a line has {', '.join(odd)}")
    rows = [(entry[output.names[0]], entry[output.names[1]]) for entry in entries]
    if not output.probabilities:
        return rows, np.empty((len(rows), 0))
    return rows, np.array([[entry[OBJECT][name] for name in classes] for entry in entries], float)


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise SubmissionError(f"an id is no text ({error.reason}); rename the file, nothing was written") from error

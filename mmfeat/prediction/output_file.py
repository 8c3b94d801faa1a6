"""The prediction file: ids, labels and probabilities as CSV, TSV or JSON lines, checked before it is written.

It is checked twice: what shall be written, and what somebody reads who opens the file.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfeat.errors import ConfigError, SubmissionError
from mmfeat.samples.labels import SEPARATOR, names_of
from mmfeat.system.files import write_atomic

NAMES = ("guid", "tag")
FORMATS = ("csv", "tsv", "jsonl")
UNWRITTEN = ("parquet", "xlsx", "xls", "json", "npy", "npz", "h5", "hdf5", "gz", "zip")  # would not hold what they say
DELIMITERS = {"csv": ",", "tsv": "\t"}
PHOTOS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")  # how files of them begin
OBJECT = "probabilities"  # what JSON lines call it
DIGITS = 6
ROUNDING = 0.5 * 10.0**-DIGITS
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Predictions:
    """`chosen` (N, C) bool and calibrated `probabilities` (N, C) of N samples; one class a row unless `multilabel`."""

    ids: tuple[str, ...]
    chosen: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]
    multilabel: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> list[str]:
        """One class a sample, or `a|b`, or a lone `|`."""
        return [names_of(row, self.classes) for row in self.chosen]

    @property
    def shares(self) -> dict[str, float]:
        """Label -> share of the samples it is predicted for."""
        return dict(zip(self.classes, self.chosen.mean(0).tolist(), strict=True)) if len(self) else {}


@dataclass(frozen=True)
class Layout:
    """How predictions are written: `names` of the id and the label, and with `probabilities` perhaps of each class."""

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
        """Names of the columns; probabilities are `p_CLASS` unless named."""
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
        """Raise `ConfigError` where the names do not fit these classes."""
        names = self.columns(classes)
        clash = OBJECT in names if self.format == "jsonl" and self.probabilities else len({*names}) < len(names)
        if clash:
            raise ConfigError(f"--columns {','.join(self.names)}: a name stands for two columns; choose another")
        if self.format == "jsonl" and len(self.names) > 2:
            raise ConfigError(f"--columns {','.join(self.names)}: JSON lines name probabilities by class; name two")


def choose_format(out: str | Path | None, named: str | None) -> str:
    """`named`, or what the suffix of `out` says, or csv. Raises `ConfigError` where the two contradict."""
    suffix = Path(out).suffix.lower().lstrip(".") if out is not None else ""
    if named and named not in FORMATS:
        raise ConfigError(f"--format {named}: use one of {', '.join(FORMATS)}")
    if named and suffix in FORMATS and suffix != named:
        raise ConfigError(f"--format {named} contradicts --out {out}; leave out --format, or name a .{named} file")
    if not named and suffix in UNWRITTEN:
        raise ConfigError(f"--out {out}: .{suffix} is not written; name a .csv, .tsv or .jsonl file, or a --format")
    return named or (suffix if suffix in FORMATS else "csv")


def prediction_text(predictions: Predictions, layout: Layout) -> str:
    """The whole file. Raises `SubmissionError` where it would break its rules: nothing wrong is ever returned."""
    layout.check(predictions.classes)
    labels = predictions.labels
    check_rows(
        list(zip(predictions.ids, labels, strict=True)), predictions.ids, predictions.classes, predictions.multilabel
    )
    if layout.probabilities:
        check_probabilities(predictions.probabilities, predictions.ids, predictions.multilabel)
    text = _json_lines(predictions, layout) if layout.format == "jsonl" else _delimited(predictions, layout)
    read_back(text, predictions, layout)
    return text


def write_prediction_file(path: Path, predictions: Predictions, layout: Layout) -> None:
    """Check and write in one step: a reader sees the old file or the whole new one."""
    text = prediction_text(predictions, layout)
    write_atomic(path, _encoded(text))


def checked_target(out: str | Path, *kept: str | Path) -> Path:
    """Where to write: a new file or a plain one, behind a link too; never a device, a pipe, a folder or a photo, and
    never one of what is `kept` (data, run) or in it."""
    path = Path(os.path.realpath(out)) if Path(out).is_symlink() else Path(out)
    if not str(out) or (path.exists() and not path.is_file()):
        raise SubmissionError(f"--out {out}: not a file that can be written; name a file, as in --out submission.csv")
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise SubmissionError(f"--out {out}: a link to itself; name a file, as in --out submission.csv")
    for each in kept:
        source = Path(os.path.realpath(each))
        if target == source or (source.is_dir() and source in target.parents):
            raise SubmissionError(f"--out {path}: this would overwrite the data in {each}; name a file elsewhere")
    if target.exists() and _is_photo(target):  # which a table may name
        raise SubmissionError(f"--out {path}: this would overwrite a photo; name a file elsewhere")
    return path


def _is_photo(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(PHOTOS)


def check_rows(rows: Rows, ids: Sequence[str], classes: Sequence[str], multilabel: bool = False) -> None:
    """Every id once and in order, no empties, only known labels; raises `SubmissionError` otherwise.

    Labels of `multilabel` rows are `a|b`, or a lone `|`.
    """
    if [id for id, _ in rows] != list(ids) or len(set(ids)) != len(ids):
        raise SubmissionError(
            f"{len(rows)} rows do not name the {len(ids)} samples once each and in order; nothing was written"
        )
    for id, label in rows:
        names = label.split(SEPARATOR) if multilabel and label != SEPARATOR else [label]
        if not set(names) <= {*classes, *([SEPARATOR] if multilabel else [])}:
            raise SubmissionError(f"sample {id} would get the label {label!r}, which is none of {', '.join(classes)}")


def check_probabilities(probabilities: np.ndarray, ids: Sequence[str], multilabel: bool, slack: float = 1e-6) -> None:
    """Each in [0, 1] and, unless `multilabel`, those of a sample adding up to 1; else `SubmissionError`."""
    good = np.isfinite(probabilities) & (probabilities >= 0) & (probabilities <= 1 + slack)
    wrong = ~good.all(-1)
    if not multilabel:
        wrong |= ~(np.abs(probabilities.sum(-1) - 1) <= slack)
    if wrong.any():
        row = int(wrong.argmax())
        values = ", ".join(f"{value:.6g}" for value in probabilities[row])
        raise SubmissionError(f"sample {ids[row]} would get the probabilities {values}; nothing was written")


def read_back(text: str, predictions: Predictions, layout: Layout) -> None:
    """Read the file as others will, and compare; `SubmissionError` where it does not say what was predicted."""
    try:
        read = _read_json_lines if layout.format == "jsonl" else _read_delimited
        rows, probabilities = read(text, predictions.classes, layout)
    except (csv.Error, ValueError, KeyError, TypeError, IndexError) as error:
        raise SubmissionError(f"the file would not read as {layout.format} ({error}); nothing was written") from error
    if rows != list(zip(predictions.ids, predictions.labels, strict=True)):
        raise SubmissionError(f"read as {layout.format}, the file would not have the samples' ids and labels again")
    if layout.probabilities:
        slack = ROUNDING * len(predictions.classes) + 1e-6
        check_probabilities(probabilities, predictions.ids, predictions.multilabel, slack)
        if np.abs(probabilities - predictions.probabilities).max(initial=0) > ROUNDING + 1e-9:
            raise SubmissionError("the file would have other probabilities than predicted; nothing was written")


def _delimited(predictions: Predictions, layout: Layout) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=DELIMITERS[layout.format], lineterminator="\n")
    if layout.header:
        writer.writerow(layout.columns(predictions.classes))
    shown = predictions.probabilities if layout.probabilities else predictions.probabilities[:, :0]
    for id, label, values in zip(predictions.ids, predictions.labels, shown.tolist(), strict=True):
        writer.writerow([id, label, *(f"{value:.{DIGITS}f}" for value in values)])
    return text.getvalue()


def _json_lines(predictions: Predictions, layout: Layout) -> str:
    lines = []
    for row, (id, label) in enumerate(zip(predictions.ids, predictions.labels, strict=True)):
        entry: dict[str, str | Mapping[str, float]] = dict(zip(layout.names, (id, label), strict=True))
        if layout.probabilities:
            rounded = (round(value, DIGITS) for value in predictions.probabilities[row].tolist())
            entry[OBJECT] = dict(zip(predictions.classes, rounded, strict=True))
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(lines)


def _read_delimited(text: str, classes: Sequence[str], layout: Layout) -> tuple[Rows, np.ndarray]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[layout.format], strict=True)
    columns = layout.columns(classes)
    if layout.header and (header := next(reader, [])) != columns:
        raise ValueError(f"its header reads {', '.join(header)}")
    cells = list(reader)
    if odd := next((row for row in cells if len(row) != len(columns)), None):
        raise ValueError(f"{len(odd)} cells in a row of {len(columns)}")
    return [(row[0], row[1]) for row in cells], np.array([row[2:] for row in cells], float)


def _read_json_lines(text: str, classes: Sequence[str], layout: Layout) -> tuple[Rows, np.ndarray]:
    entries = [json.loads(line) for line in text.split("\n")[:-1]]
    wanted = {*layout.names, *([OBJECT] if layout.probabilities else [])}
    if odd := next((entry for entry in entries if set(entry) != wanted), None):
        raise ValueError(f"a line has {', '.join(odd)}")
    rows = [(entry[layout.names[0]], entry[layout.names[1]]) for entry in entries]
    if not layout.probabilities:
        return rows, np.empty((len(rows), 0))
    return rows, np.array([[entry[OBJECT][name] for name in classes] for entry in entries], float)


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise SubmissionError(f"an id is no text ({error.reason}); rename the file, nothing was written") from error

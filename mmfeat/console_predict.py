"""What a person sees of predictions: how labels are spread, what to be warned of, and a few samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from mmfeat.console import err, out
from mmfeat.wording import interval, shown

if TYPE_CHECKING:
    from mmfeat.predict import Predicted
    from mmfeat.submit import Submission

FEW = 20  # samples that a terminal shows as a table
SHOWN_CLASSES = 8  # whose probabilities have columns of their own; of more classes the first are named
SHOWN_FIRST = 3


def show_submission(result: Submission) -> None:
    """Label distribution beside that out of fold and the training prior, warnings, and the files."""
    out.print(f"{result.rows:,} predictions for {shown(result.data)} by {result.head} on {result.modalities}")
    table = Table("label", "predicted", *(["out of fold"] if result.out_of_fold else []), "in training", box=None)
    for label, share in result.trained.items():
        seen = [f"{result.out_of_fold.get(label, 0.0):.1%}"] if result.out_of_fold else []
        table.add_row(label, f"{result.predicted.get(label, 0.0):.1%}", *seen, f"{share:.1%}")
    out.print(table)
    for line in result.notes:
        out.print(f"note: {line}")
    if result.data_changed:
        out.print("note: labels, texts or photos changed since this run was trained; mmfeat heads trains anew")
    if result.without_features:
        count, example = len(result.without_features), result.without_features[0]
        out.print(f"{count:,} samples have neither text nor image that could be read (first: {example})")
    out.print(f"run {result.run.folder}")
    out.print(f"leaderboard {result.run.leaderboard_file}")
    out.print(f"submission {result.path}")
    out.print("next: hand it in; mmfeat report shows what to expect of it")


def show_notes(result: Predicted) -> None:
    """Who predicts, how right it is where labels tell, and what to be warned of: all beside what is printed."""
    err.print(f"{result.head} on {result.modalities} of {result.run.folder}")
    if result.scores is not None:
        f1, accuracy = (interval(result.scores[name]) for name in ("macro_f1", "accuracy"))
        err.print(f"{result.scores['samples']:,} labelled samples: accuracy {accuracy}, macro-F1 {f1}")
    for line in result.notes:
        err.print(f"note: {line}")


def show_few(result: Predicted) -> None:
    """A line a sample: label and probabilities."""
    found, classes = result.predictions, result.predictions.classes
    columns = classes if len(classes) <= SHOWN_CLASSES else ("most probable",)
    table = Table("sample", "label", *columns, box=None)
    for id, label, row in zip(found.ids, found.labels, found.probabilities.tolist(), strict=True):
        cells = [f"{value:.3f}" for value in row]
        if len(classes) > SHOWN_CLASSES:
            first = sorted(zip(row, classes, strict=True), reverse=True)[:SHOWN_FIRST]
            cells = [", ".join(f"{name} {value:.3f}" for value, name in first)]
        table.add_row(id, label, *cells)
    out.print(table)

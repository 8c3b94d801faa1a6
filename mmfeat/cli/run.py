"""`mmfeat run`: the whole way in one command, from a table or folder to a verdict, a report and a submission."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from mmfeat.cli import extract as cli_extract
from mmfeat.cli import flags
from mmfeat.cli import heads as cli_heads
from mmfeat.cli.console import ConsoleProgress, out, show_notes
from mmfeat.cli.flags import READING_PARAMETERS, Heads, Parameters, option, reading, takes
from mmfeat.cli.predict import warnings_of
from mmfeat.errors import HeadError
from mmfeat.system.wording import Advance, counted, duration, head_label, shown, size_of

if TYPE_CHECKING:
    from mmfeat.audit.result import Audit
    from mmfeat.runs.run import Run
    from mmfeat.samples.rows import Overview

EXTRACT, HEADS = cli_extract.PARAMETERS, cli_heads.PARAMETERS
PARAMETERS: Parameters = {
    **{name: EXTRACT[name] for name in ("data", "test", "encoders", "cache", *READING_PARAMETERS, "device")},
    **{name: HEADS[name] for name in ("fusion", "baselines", "task", "rare")},
    "heads": (Heads, "heads"),
    "out": (option("The submission to write, where there is something to predict."), "submission.csv"),
}


class Steps(ConsoleProgress):
    """The steps of the command; what a step shows while it works, and prints at its end, begins with its number."""

    keeps = False  # the results of a step stay

    def __init__(self) -> None:
        self.names, self.number = ["extract", "heads", "audit", "report"], 1

    @property
    def title(self) -> str:
        return f"{self.number}/{len(self.names)} {self.names[self.number - 1]}"

    def step(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
        return super().step(self.title if title == self.names[self.number - 1] else f"{self.title}: {title}", total)

    def end(self, result: str, *notes: str) -> None:
        """Print the result of a step, and notes; the next step begins."""
        out.print(f"{self.title}: {result}")
        show_notes(map(shown, notes), "  ")
        self.number += 1


@takes(PARAMETERS, "what was finished is kept, the same command goes on from there")
def run(context: typer.Context, **given: Any) -> None:
    """Do it all: extract, heads, audit, report and submit. The same command goes on after an interrupt.

    \b
    mmfeat run listings.csv --columns text=title,image=photo,label=category --test test.csv
    """
    values, steps = cli_extract.named_data(context), Steps()
    from mmfeat.prediction.output_file import checked_target, choose_format
    from mmfeat.runs.verdict import prediction_step
    from mmfeat.samples.corrections import check_rare

    choose_format(checked_target(values["out"], values["data"]), None)  # wrong values show before any work
    check_rare(values["rare"] or "", values["task"])
    best = _train(context, values, steps)
    places = [*_examine(best, values, steps), *(_submit(best, values, steps) if "submit" in steps.names else ())]
    cli_heads.show_judgement(best)
    for place in (f"run {best.folder}", *places):
        out.print(place)
    out.print(f"next: {'open the report in a browser' if 'submit' in steps.names else prediction_step(best)}")


def _train(context: typer.Context, values: dict[str, Any], steps: Steps) -> Run:
    """Extract the vectors and train heads on them, with the defaults of both commands."""
    from mmfeat.extraction.requests import test_of
    from mmfeat.samples.labels import RARE_REMEDY, REGRESSION

    told: list[Overview] = []

    def tell(samples: Overview) -> None:
        """Say what the data are; those that cannot be learned from are refused before hours of extraction."""
        few = [note for note in samples.notes if RARE_REMEDY in note] if values["task"] != REGRESSION else []
        cli_extract.show_samples(replace(samples, notes=tuple(note for note in samples.notes if note not in few)))
        if not told and not samples.labels:
            raise HeadError(f"{samples.source}: no sample has a label to learn; --columns label=... names their column")
        if few and not values["rare"]:
            raise HeadError(f"{samples.source}: {few[0].replace('for heads ', '')}")
        told.append(samples)
        test = test_of(values["cache"], values["data"]) if values["test"] is None else values["test"]
        if len(told) == 1 and (test or sum(samples.labels.values()) < len(samples)):
            steps.names.append("submit")

    asked = _defaults(EXTRACT) | values
    found = cli_extract.extract_data(asked, steps, tell)
    request = flags.find_request(asked)
    parts = [found, *([found.test] if found.test else [])]
    new, lost = (sum(sum(getattr(part, kind).values()) for part in parts) for kind in ("new", "unreadable"))
    names = ", ".join(dict.fromkeys(tower.spec.name for tower in found.towers))
    spent = duration(sum(part.seconds for part in parts))
    what = f"{counted(new, 'new vector')} of {names} in {spent}" if new else f"every vector of {names} was there"
    steps.end(what + (f", {lost:,} unreadable" if lost else ""), *(note for part in parts for note in part.lost))
    asked = _defaults(HEADS) | values | {"out": values["heads"]}
    sweep = cli_heads.train(context, asked, request, steps)
    board = sweep.run.leaderboard
    heads = sum(not entry.is_ensemble for entry in board)
    how = "trained before" if sweep.reused else f"trained in {duration(sweep.seconds)}"
    many = counted(heads, "head") + (f" and {counted(len(board) - heads, 'ensemble')}" if len(board) > heads else "")
    steps.end(f"{many} on {board[0].samples:,} samples, {how}", *sweep.notes)
    return sweep.run


def _examine(best: Run, values: dict[str, Any], steps: Steps) -> list[str]:
    from mmfeat.audit.audit import audit_data
    from mmfeat.report.report import write_report

    where = {"run": best.folder, "heads": values["heads"]}
    audit = audit_data(values["data"], columns=reading(values), cache=values["cache"], **where, progress=steps)
    steps.end(_audited(audit))
    page = write_report(**where, data=values["data"], columns=reading(values), progress=steps)
    steps.end(f"{page.samples:,} samples, {page.photos:,} photos, {size_of(page.bytes)}", *page.notes)
    doubted = audit.label_errors and audit.label_errors["errors"]
    return [f"report {page.path}", f"audit {audit.folder / 'label_errors.csv' if doubted else audit.file}"]


def _audited(audit: Audit) -> str:
    errors = audit.label_errors
    doubted = [f"{errors['errors']:,} of {errors['samples']:,} labels are in doubt"] if errors else []
    twins = max(counts["groups"] for counts in audit.duplicates.values())
    odd = sum(row["count"] for row in audit.odd)
    return "; ".join([*doubted, f"groups of near duplicates: {twins:,}", f"odd texts or photos: {odd:,}"])


def _submit(best: Run, values: dict[str, Any], steps: Steps) -> list[str]:
    from mmfeat.prediction.submit import write_submission

    result = write_submission(best.folder, out=values["out"], device=values["device"], progress=steps)
    by = head_label(result.head, result.modalities)
    steps.end(f"{result.rows:,} predictions for {shown(result.data)} by {by}", *warnings_of(result))
    return [f"submission {result.path}"]


def _defaults(parameters: Parameters) -> dict[str, Any]:
    return {name: default for name, (_, default) in parameters.items()}

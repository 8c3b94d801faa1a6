"""`write_report`: from a run to its page, and to tables and figures for papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmfeat.cache.store import folder_name
from mmfeat.evaluation.significance import LEVEL
from mmfeat.report.facts import (
    audit_section,
    cache_section,
    data_notes,
    data_section,
    doubted_rows,
    duplicates_section,
    labels_section,
    run_section,
)  # fmt: skip
from mmfeat.report.gallery import make_gallery
from mmfeat.report.modalities import ablation_section, attribution_section
from mmfeat.report.page import Page, checked_page, render, write_figures, write_page, write_tables
from mmfeat.report.reliability import reliability_section, residuals_section
from mmfeat.report.scores import (
    classes_section,
    comparison_sections,
    confusion_section,
    leaderboard_section,
    names_of_runs,
    significance_section,
)
from mmfeat.report.section import Section, Subject, in_gallery, interval, title_of
from mmfeat.report.training import curves_section, effects_section, stages_section
from mmfeat.runs.compare import compare_runs
from mmfeat.runs.run import Run, choose_run, read_run
from mmfeat.runs.verdict import verdict
from mmfeat.samples.labels import SEPARATOR
from mmfeat.system.notebook import usual_progress
from mmfeat.system.wording import Progress

REPORT = "report.html"
PHOTOS = 1500
BYTES = 9_900_000  # largest page; the gallery gets the bytes that the sections leave
AUDIT = "audit"
SECTIONS = (
    classes_section, confusion_section, ablation_section, attribution_section, labels_section, duplicates_section,
    stages_section, leaderboard_section, reliability_section, data_section, significance_section, curves_section,
    effects_section, cache_section,
)  # fmt: skip


NUMBER_SECTIONS = (
    residuals_section, ablation_section, leaderboard_section, data_section, significance_section, curves_section,
    effects_section, cache_section,
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The page that was written, its size in bytes, and the files for papers beside the page."""

    path: Path
    runs: tuple[Run, ...]
    bytes: int
    samples: int
    photos: int
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    waiting: int = 0  # samples to predict, whose photos are in the page too


@dataclass(frozen=True)
class Papers:
    """The kinds of files for papers, which are written into the folder `NAME-files` beside the page."""

    latex: bool = False
    csv: bool = False
    png: bool = False

    def write(self, page: Path, sections: Sequence[Section]) -> tuple[Path, ...]:
        folder = page.with_name(f"{page.stem}-files")
        files: list[Path] = []
        for wanted, latex in ((self.latex, True), (self.csv, False)):
            files += write_tables(folder, sections, latex) if wanted else []
        return (*files, *(write_figures(folder, sections) if self.png else []))


def write_report(
    run: str | Path | None = None,
    *,
    out: str | Path | None = None,
    heads: str | Path = "heads",
    head: str | None = None,
    modalities: str | None = None,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
    audit: str | Path = AUDIT,
    photos: int = PHOTOS,
    papers: Papers | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write one HTML page about a run, by default about the best run in `heads`, and by default to `RUN/report.html`.

    `head` and `modalities` name the entry that the page examines, by default the recommended one. At most `photos`
    photos are in the page, errors first. `audit` is the folder of all audits. Raises `RunError` where files of
    the run are missing or damaged.
    """
    chosen = choose_run(run, heads, data, head, modalities)
    path = checked_page(Path(out) if out else chosen.folder / REPORT)
    subject = Subject.of(chosen, head, modalities, data, columns)
    progress = progress or usual_progress()
    sections = [
        *make_sections(subject, progress),
        audit_section(subject, Path(audit) / folder_name(chosen.config.dataset)),
        run_section(subject),
    ]
    classes = [*chosen.classes, *([SEPARATOR] if chosen.config.is_multilabel else [])]
    page = Page(_title(subject), _subtitle(subject), _headline(subject), sections, None, classes, _verdict(subject))
    if chosen.config.is_regression:  # the largest errors are in a section
        gallery = None
    else:
        gallery = make_gallery(subject, photos, BYTES - len(render(page).encode()), progress)
    size = write_page(path, replace(page, gallery=gallery))
    files = (papers or Papers()).write(path, sections)
    counts = (gallery.samples, gallery.shown) if gallery else (subject.entry.samples, 0)
    return Report(path, (chosen,), size, *counts, files, data_notes(subject), gallery.waiting if gallery else 0)


def write_comparison(
    runs: Sequence[str | Path],
    *,
    out: str | Path = "comparison.html",
    head: str | None = None,
    modalities: str | None = None,
    papers: Papers | None = None,
) -> Report:
    """Write one HTML page about several runs, tested against the first. Raises `RunError` for fewer than two runs."""
    path = checked_page(Path(out))
    comparison = compare_runs([read_run(Path(run)) for run in runs], head, modalities)
    names = names_of_runs(comparison)
    sections = comparison_sections(comparison)
    scores = [(name, interval(entry.headline), "") for name, entry in zip(names, comparison.entries, strict=True)]
    title = f"{comparison.entries[0].headline_title} of an entry of each"
    size = write_page(path, Page(f"Comparison of {len(names)} runs", title, scores, sections, None))
    return Report(path, comparison.runs, size, 0, 0, (papers or Papers()).write(path, sections))


def make_sections(subject: Subject, progress: Progress) -> list[Section]:
    made, sections = [], NUMBER_SECTIONS if subject.run.config.is_regression else SECTIONS
    with progress.step("report", len(sections)) as advance:
        for make in sections:
            made.append(make(subject))
            advance(1)
    return [section for section in made if section is not None]


def _title(subject: Subject) -> str:
    """The data set, and in a few words how good the entry is."""
    run, entry = subject.run, subject.entry
    if run.config.is_multilabel or run.config.is_regression:
        return f"{run.config.dataset}: {entry.headline_title} {entry.headline.value:.2f}"
    right = f"{run.config.dataset}: {entry.accuracy.value:.0%} right"
    gained = next((gain for entry in (entry, *run.leaderboard) if (gain := entry.gain)), None)
    helps = gained is not None and gained.p_holm < LEVEL and gained.value > 0 and not run.config.table
    return f"{right}, text and photo together beat either alone" if helps else right


def _subtitle(subject: Subject) -> str:
    run = subject.run
    kind = "fine-tuning" if run.is_finetuned else "heads"
    encoders = ", ".join(dict.fromkeys(tower.spec.name for tower in run.towers))
    return f"{title_of(subject.entry)} is examined here · run {run.folder.name}: {kind} on {encoders}"


def _verdict(subject: Subject) -> list[str]:
    """Three sentences: how good the entry is, what several modalities bring, and what to look at first."""
    run, entry = subject.run, subject.entry
    others, name = run.leaderboard[1:], f"the ensemble {entry.head}" if entry.is_ensemble else entry.label
    scores = " and ".join(f"{entry.titles[score]} {interval(entry.score(score))}" for score in entry.main_names[:2])
    ties = sum(bool(other.tie) for other in others)
    tied = f"; {ties:,} of {len(others):,} others tie with the best" if ties else ""
    sentences = [f"On samples that it has not seen, {name} has {scores}{tied}."]
    if any(entry.gain for entry in run.leaderboard):
        sentences.append(verdict(run)[-1].replace("(p ", "(p-value "))
    if run.config.is_regression:
        return [*sentences, "Look at the largest errors first: often it is the label that is wrong."]
    weakest = min(entry.classes, key=lambda name: entry.classes[name].f1.value if entry.classes[name].support else 2)
    if entry.classes[weakest].f1.value == 1:
        return [*sentences, "Every answer is right: make sure that no text or photo gives the label away."]
    found = f"{entry.classes[weakest].recall:.0%} of its samples are found"
    return [*sentences, f"The hardest class is {weakest}: {found}. Look at the surest mistakes first."]


def _headline(subject: Subject) -> list[tuple[str, str, str]]:
    """(name, value, address in the page) of four numbers."""
    entry = subject.entry
    numbers = [(entry.titles[name], interval(entry.score(name)), "") for name in entry.main_names[:2]]
    numbers.append(("samples out of fold", f"{entry.samples:,}", ""))
    if doubted := 0 if subject.run.config.is_regression else len(doubted_rows(subject)):
        numbers.append(("labels in doubt", f"{doubted:,}", in_gallery(status="doubted")))
    return numbers

"""`write_report`: from a run to its page, and to tables and figures for papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfeat.errors import ConfigError
from mmfeat.files import write_atomic
from mmfeat.progress import Progress, Silent
from mmfeat.report.facts import cache_section, data_section, run_section
from mmfeat.report.gallery import make_gallery
from mmfeat.report.modalities import ablation_section, attribution_section
from mmfeat.report.page import Page, render
from mmfeat.report.papers import write_figures, write_tables
from mmfeat.report.reliability import reliability_section
from mmfeat.report.results import Results
from mmfeat.report.scores import classes_section, confusion_section, leaderboard_section, significance_section
from mmfeat.report.section import Section, interval, title_of
from mmfeat.report.training import curves_section, effects_section, stages_section
from mmfeat.runs import Run, best_run, read_run

REPORT = "report.html"
PHOTOS = 1500
SECTIONS = (
    leaderboard_section, significance_section, stages_section, classes_section, confusion_section, reliability_section,
    ablation_section, attribution_section, curves_section, effects_section, data_section, cache_section, run_section,
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The page that was written, how large it is in bytes, and the files for papers beside it."""

    path: Path
    run: Run
    bytes: int
    samples: int
    photos: int
    files: tuple[Path, ...]


def write_report(
    run: str | Path | None = None,
    *,
    out: str | Path | None = None,
    heads: str | Path = "heads",
    head: str | None = None,
    modalities: str | None = None,
    data: str | None = None,
    columns: Mapping[str, str] | None = None,
    photos: int = PHOTOS,
    latex: bool = False,
    csv: bool = False,
    png: bool = False,
    progress: Progress | None = None,
) -> Report:
    """One HTML page about a run, by default the best one, as `RUN/report.html`.

    `head` and `modalities` name the entry that is looked at closely, by default the best; at most `photos` photos are
    in the page, errors first. `latex`, `csv` and `png` write tables and figures into the folder `NAME-files` beside it.
    Raises `RunError` where the run is not whole.
    """
    chosen = read_run(Path(run)) if run else best_run(Path(heads), data, head, modalities)
    path = Path(out) if out else chosen.folder / REPORT
    if path.is_dir() or not path.suffix:
        raise ConfigError(f"--out {path}: name an HTML file, as in --out report.html")
    results = Results.of(chosen, head, modalities, data, columns)
    progress = progress or Silent()
    sections = make_sections(results, progress)
    gallery = make_gallery(results, photos, progress)
    classes = [*chosen.classes, *(["|"] if chosen.config["task"] == "multilabel" else [])]
    page = Page(f"Report of {chosen.folder.name}", _subtitle(results), _headline(results), sections, gallery, classes)
    text = render(page).encode()
    write_atomic(path, text)
    files = _papers(path.with_name(f"{path.stem}-files"), sections, latex, csv, png)
    return Report(path, chosen, len(text), gallery.samples, gallery.shown, tuple(files))


def make_sections(results: Results, progress: Progress) -> list[Section]:
    """Those that there is something to say in."""
    made = []
    with progress.task("report", len(SECTIONS)) as advance:
        for make in SECTIONS:
            made.append(make(results))
            advance(1)
    return [section for section in made if section is not None]


def _subtitle(results: Results) -> str:
    run = results.run
    kind = "fine-tuning" if run.is_finetuned else "heads"
    encoders = ", ".join(dict.fromkeys(tower.spec.name for tower in run.towers))
    return f"{kind} on {run.config['dataset']} with {encoders}"


def _headline(results: Results) -> list[tuple[str, str]]:
    entry = results.entry
    ties = sum(each["tie"] for each in results.run.leaderboard if each is not entry)
    return [
        ("shown closely", title_of(entry)),
        ("macro-F1", interval(entry["macro_f1"])),
        ("accuracy", interval(entry["accuracy"])),
        ("samples out of fold", f"{entry['samples']:,}"),
        ("ties with the best", f"{ties:,} of {len(results.run.leaderboard) - 1:,}"),
    ]


def _papers(folder: Path, sections: Sequence[Section], latex: bool, csv: bool, png: bool) -> list[Path]:
    files: list[Path] = []
    if latex:
        files += write_tables(folder, sections, latex=True)
    if csv:
        files += write_tables(folder, sections, latex=False)
    return files + (write_figures(folder, sections) if png else [])

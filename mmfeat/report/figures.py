"""Figures of a run in a notebook: those of the report, which `Run.plot` gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmfeat.errors import ConfigError
from mmfeat.report.plots import heat_map, plain, png
from mmfeat.report.reliability import diagram, scatter
from mmfeat.report.scores import PLOTTED, confusion, forest
from mmfeat.report.section import MOST_CLASSES, Figure
from mmfeat.runs.run import Run
from mmfeat.system.files import write_atomic

SCREEN = 96  # dots an inch on a screen; twice as many are drawn


@dataclass(frozen=True)
class Plot:
    """A plot that a notebook shows and `save` writes; `figure.draw()` is the figure of matplotlib."""

    figure: Figure

    def save(self, path: str | Path) -> Path:
        """Write the plot in the format of the suffix: .png, .svg, .pdf. Raises `ConfigError` for another one."""
        path = Path(path)
        try:
            kind = path.suffix.lower().removeprefix(".")
            write_atomic(path, png(self.figure) if kind == "png" else plain(self.figure, kind or "none"))
        except ValueError as error:
            raise ConfigError(f"{path}: no format of plots; name it .png, .svg or .pdf") from error
        return path

    def __repr__(self) -> str:
        return f"<Plot: {self.figure.caption}>"

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        data = png(self.figure, 2 * SCREEN)
        return data, {"width": int.from_bytes(data[16:20], "big") // 2}  # the header of a PNG has its width


@dataclass(frozen=True)
class Plots:
    """The plots of a run; `head` and `modalities` name an entry of its leaderboard, by default the best one."""

    run: Run

    def leaderboard(self, entries: int = PLOTTED) -> Plot:
        """The scores of the first entries with their 95 % intervals; blue are the first and what ties with it."""
        return Plot(forest(self.run.leaderboard, entries))

    def confusion(self, head: str | None = None, modalities: str | None = None) -> Plot:
        """Labels in rows, predictions in columns. Raises `ConfigError` where that is no matrix that can be read."""
        classes = self.run.classes
        self._of_classes()
        if self.run.config.is_multilabel or len(classes) > MOST_CLASSES:
            why = "several classes a sample" if self.run.config.is_multilabel else f"{len(classes)} classes"
            raise ConfigError(f"{self.run.folder}: {why} are no matrix to draw; the table is in the report")
        return Plot(heat_map(confusion(self.run.entry(head, modalities), classes, 0)))

    def calibration(self, head: str | None = None, modalities: str | None = None) -> Plot:
        self._of_classes()
        return Plot(diagram(self.run.out_of_fold(self.run.entry(head, modalities))))

    def residuals(self, head: str | None = None, modalities: str | None = None) -> Plot:
        """Predicted against true numbers, and the errors. Raises `ConfigError` for classes."""
        if not self.run.config.is_regression:
            raise ConfigError(f"{self.run.folder}: classes have no residuals; plot.confusion has their errors")
        return Plot(scatter(self.run.out_of_fold(self.run.entry(head, modalities))))

    def _of_classes(self) -> None:
        if self.run.config.is_regression:
            raise ConfigError(f"{self.run.folder}: a regression has no classes; plot.residuals has its errors")

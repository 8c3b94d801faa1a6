"""The page: one HTML file with its style, script, plots and photos, which asks the network for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from mmfeat.errors import ConfigError
from mmfeat.report.gallery import Gallery
from mmfeat.report.plots import svg
from mmfeat.report.section import Section

FILES = {name: f"report.{name}" for name in ("css", "js")}


@dataclass(frozen=True)
class Page:
    """What the page shows: `headline` are (name, value) pairs at its top."""

    title: str
    subtitle: str
    headline: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    gallery: Gallery | None
    classes: Sequence[str] = ()


def render(page: Page) -> str:
    """The whole HTML text."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ConfigError("mmfeat report needs Jinja2 and matplotlib; pip install 'mmfeat[report]'") from error
    environment = Environment(
        loader=PackageLoader("mmfeat.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["svg"] = svg
    parts: dict[str, Any] = {name: _read(file) for name, file in FILES.items()}
    return environment.get_template("report.html").render(page=page, **parts)


def _read(name: str) -> str:
    return resources.files("mmfeat.report").joinpath("templates", name).read_text(encoding="utf-8")

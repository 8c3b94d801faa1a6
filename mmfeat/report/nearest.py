"""The page of a search for neighbours: the query and what is nearest to it, with photos."""

from __future__ import annotations

from pathlib import Path

from mmfeat.prediction.nearest import Neighbours
from mmfeat.report.card import make_card
from mmfeat.report.page import Page, checked_page, write_page
from mmfeat.report.section import Section
from mmfeat.samples.dataset import Sample

LETTERS = 600  # most letters of a text


def write_neighbours(found: Neighbours, out: str | Path) -> int:
    """Write one HTML page that opens without a network, and return its size in bytes."""
    path = checked_page(Path(out))
    query = Section("query", "Query", cards=[make_card(found.query, found.query.id, _facts(found.query), LETTERS)])
    pairs = zip(found.samples, found.similarities, strict=True)
    cards = [make_card(s, f"{rank}. {cosine:.3f}", _facts(s), LETTERS) for rank, (s, cosine) in enumerate(pairs, 1)]
    nearest = Section("neighbours", "Neighbours", found.notes, cards=cards)
    subtitle = f"nearest first, by the cosine of vectors of {found.encoder}"
    return write_page(path, Page(f"Neighbours of {found.query.id}", subtitle, [], [query, nearest], None))


def _facts(sample: Sample) -> str:
    return f"id {sample.id}" + (f" · label {sample.label}" if sample.label else "")

"""The page of a search for neighbours: the query and what is nearest to it, with photos."""

from __future__ import annotations

import base64
from pathlib import Path

from mmfeat.prediction.nearest import Neighbours
from mmfeat.report.gallery import TEXT_LENGTHS, thumbnail
from mmfeat.report.page import Page, checked_page, write_page
from mmfeat.report.section import Card, Section
from mmfeat.samples.dataset import Sample


def write_neighbours(found: Neighbours, out: str | Path) -> int:
    """Write one HTML page that opens without a network, and return its size in bytes."""
    path = checked_page(Path(out))
    query = Section("query", "Query", cards=[_card(found.query, found.query.id)])
    pairs = zip(found.samples, found.similarities, strict=True)
    cards = [_card(sample, f"{rank}. {cosine:.3f}") for rank, (sample, cosine) in enumerate(pairs, 1)]
    nearest = Section("neighbours", "Neighbours", found.notes, cards=cards)
    subtitle = f"nearest first, by the cosine of vectors of {found.encoder}"
    return write_page(path, Page(f"Neighbours of {found.query.id}", subtitle, [], [query, nearest], None))


def _card(sample: Sample, title: str) -> Card:
    photo = base64.b64encode(thumbnail(sample)).decode() if sample.image is not None else ""
    facts = f"id {sample.id}" + (f" · label {sample.label}" if sample.label else "")
    return Card(title, (sample.text or "")[: TEXT_LENGTHS[0]], facts, photo)

"""The map of a report: true places of the samples, and points that show their sample in a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfeat.cache.store import Cache
from mmfeat.report import gallery as module
from mmfeat.report.gallery import place_samples
from mmfeat.report.report import write_report
from mmfeat.report.section import Subject
from mmfeat.runs.run import Run
from tests.report.browser import open_browser, open_page, requests
from tests.sweep.small_sweeps import NO_HEADS, make_place, sweep


@pytest.fixture(scope="module")
def run(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = make_place(demo_folder, tmp_path_factory.mktemp("map"))
    return sweep(place, **{**NO_HEADS, "modalities": ["both", "text", "image"]}, ensembles=False).run


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run.folder, out=tmp_path_factory.mktemp("page") / "report.html", photos=5).path


def unpacked(page: Path, name: str) -> Any:
    packed = re.search(rf'id="{name}">([^<]*)<', page.read_text())
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def known(page: Path) -> list[Any]:
    """The rows of the samples that have a label, which alone are on the map."""
    return [row for row in unpacked(page, "rows") if row[6] is not None]


def test_places_are_the_principal_components_of_the_cached_vectors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # UMAP may be installed here
    subject = Subject.of(run, "knn", "text")
    samples = list(subject.samples or ())[:60]
    places, how = place_samples(subject, [None, *samples])
    assert [row for row, *_ in places] == list(range(1, 61))
    spec = next(tower.spec for tower in run.config.encoders if tower.spec.modality == "text")
    block = Cache(run.config.cache, run.config.dataset).load(samples, [spec]).blocks[0]
    units = block.vectors.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    units[~block.mask] = units[block.mask].mean(0)
    left, values, _ = np.linalg.svd(units - units.mean(0))
    for axis in (0, 1):
        expected, found = left[:, axis] * values[axis], [place[1 + axis] for place in places]
        assert abs(np.corrcoef(expected, found)[0, 1]) > 0.98  # rounded, and the outermost are moved to the edge
    share = np.square(values[:2]).sum() / np.square(values).sum()
    assert how == f"principal components, {100 * share:.0f} % of the variance"
    monkeypatch.setattr(module, "POINTS", 7)
    few, _ = place_samples(subject, samples)
    assert [row for row, *_ in few] == [0, 10, 20, 30, 39, 49, 59]


def test_umap_places_them_where_it_is_installed(run: Run) -> None:
    pytest.importorskip("umap")
    subject = Subject.of(run, "knn", "both")
    samples = list(subject.samples or ())[:80]
    places, how = place_samples(subject, samples)
    assert how == "UMAP"
    assert places == place_samples(subject, samples)[0]
    assert {0 <= place <= 1000 for _, *both in places for place in both} == {True}


def test_each_point_is_a_row_of_the_page(page: Path) -> None:
    rows, points = known(page), unpacked(page, "places")
    assert sorted(row for row, *_ in points) == list(range(len(rows)))
    assert {0 <= place <= 1000 for _, *both in points for place in both} == {True}


def test_without_a_cache_there_is_no_map(run: Run, tmp_path: Path) -> None:
    cache = Path(run.config.cache)
    cache.rename(cache.with_name("away"))
    try:
        text = write_report(run.folder, out=tmp_path / "report.html", photos=0).path.read_text()
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        cache.with_name("away").rename(cache)
    assert 'id="gallery"' in text
    assert 'id="map"' not in text
    assert "#map" not in text


def test_a_browser_shows_the_sample_of_a_point(page: Path) -> None:
    rows, points = known(page), unpacked(page, "places")
    with open_browser() as driver:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys
        from selenium.webdriver.support.ui import Select

        open_page(driver, page)
        canvas, panel = driver.find_element("id", "points"), driver.find_element("id", "pointed")
        assert panel.text == ""
        legend = driver.find_element("id", "legend")
        assert sum(int(line.split()[-1]) for line in legend.text.splitlines()) == len(points)
        assert canvas.size["width"] > 600
        first = min(points, key=lambda point: point[1])
        driver.execute_script("arguments[0].scrollIntoView()", canvas)
        x = 8 + first[1] / 1000 * (canvas.size["width"] - 16) - canvas.size["width"] / 2
        y = 8 + (1 - first[2] / 1000) * (canvas.size["height"] - 16) - canvas.size["height"] / 2
        ActionChains(driver).move_to_element_with_offset(canvas, round(x), round(y)).perform()
        assert f"id {rows[first[0]][0]}" in panel.text
        order = sorted(points, key=lambda point: point[1])
        canvas.send_keys(Keys.ARROW_RIGHT)
        assert f"id {rows[order[1][0]][0]}" in panel.text
        canvas.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
        assert f"id {rows[order[-1][0]][0]}" in panel.text
        Select(driver.find_element("name", "colour")).select_by_value("right")
        wrong = sum(not row[6] for row in rows)
        assert legend.text.splitlines() == [f"right {len(rows) - wrong}", f"wrong {wrong}"]
        assert requests(driver) == {page.resolve().as_uri()}
        assert not driver.get_log("browser")

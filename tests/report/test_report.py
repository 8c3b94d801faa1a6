"""The report: one page that is true to the run, opens without a network, and stays small."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfeat.errors import ConfigError, RunError
from mmfeat.evaluation.metrics import wilson
from mmfeat.evaluation.significance import compare_pairs, paired_difference
from mmfeat.extraction.extract import extract_features
from mmfeat.heads.registry import HeadSettings
from mmfeat.prediction.submit import write_submission
from mmfeat.report.gallery import ROW_SHARE, make_gallery
from mmfeat.report.modalities import WHO, attribute
from mmfeat.report.page import Page, latex_table, render
from mmfeat.report.reliability import reliability_section
from mmfeat.report.report import Papers, write_report
from mmfeat.report.section import Subject, Table, interval
from mmfeat.report.training import correlation, group_means, read_trials, varied
from mmfeat.runs.run import Run
from mmfeat.sweep.search import Plan
from mmfeat.system.wording import Silent
from tests.report.browser import open_browser, open_page, requests
from tests.sweep.small_sweeps import BUILT_IN, FLOAT32, rows, sweep

SCRIPT = "</script><img src=x onerror=alert(1)>"
MANY = 100_000
UNNAMED = """[...document.querySelectorAll('select, input, button, [role=img], [role=region], nav')].filter(
    each => !(each.ariaLabel || each.textContent.trim() || (each.labels && each.labels[0]?.textContent.trim()))
)"""


@pytest.fixture(scope="module")
def run(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Concat and kNN on text, image and both, dropout searched; one text would break a careless page."""
    place = tmp_path_factory.mktemp("report")
    shutil.copytree(demo_folder, place / "demo")
    first = (place / "demo/train.txt").read_text().splitlines()[1].split(",")[0]
    (place / "demo/data" / f"{first}.txt").write_text(SCRIPT)
    extract_features(place / "demo", BUILT_IN, cache=place / "cache", options=FLOAT32)
    plan = Plan(HeadSettings(epochs=2), space={"dropout": [0.2, 0.5]})
    made = sweep(place, plan=plan, modalities=["both", "text", "image"], baselines=["knn", "prior"])
    return made.run


@pytest.fixture(scope="module")
def page(run: Run) -> Path:
    return write_report(run.folder).path


def samples_of(page: Path) -> list[list[Any]]:
    """The rows of the gallery, as a reader of the file finds them."""
    packed = re.search(r'id="rows">([^<]*)<', page.read_text())
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_the_page_has_every_section_and_asks_for_nothing(run: Run, page: Path) -> None:
    text = page.read_text()
    for name in ("leaderboard", "significance", "classes", "confusion", "reliability", "ablation", "attribution"):
        assert f'<section id="{name}"' in text
    for name in ("curves", "settings", "data", "cache", "run", "gallery"):
        assert f'<section id="{name}"' in text
    places = set(re.findall(r' href="#([^"?]+)"', text))
    assert (
        {"gallery", "glossary", "term-macro-F1", "term-out-of-fold"}
        <= places
        <= set(re.findall(r' id="([^"]+)"', text))
    )
    folded = re.findall(r'<section id="([^"]+)" class="folded"', text)
    assert folded == ["significance", "curves", "settings", "cache", "audit", "run"]
    outside = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", outside)
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in text


def test_the_gallery_holds_every_sample_as_the_run_has_it(run: Run, page: Path, tmp_path: Path) -> None:
    found = [row for row in samples_of(page) if row[6] is not None]
    best = rows(run.head_folder(run.entry()) / "out_of_fold.csv")
    assert {row[0] for row in found} == {row["id"] for row in best}
    labels = {row["id"]: row["label"] for row in best}
    assert all(row[2] == labels[row[0]] for row in found)
    wrong = [row for row in found if not row[6]]
    assert found[: len(wrong)] == wrong  # errors first, the surest at the top
    assert [row[4] for row in wrong] == sorted((row[4] for row in wrong), reverse=True)
    assert all((row[2] == row[3]) == bool(row[6]) for row in found)
    waiting = [row for row in samples_of(page) if row[6] is None]
    submission = write_submission(run.folder, out=tmp_path / "s.csv")
    assert [[row[0], row[3]] for row in waiting] == [[row["guid"], row["tag"]] for row in rows(submission.path)]


def test_numbers_on_the_page_are_those_of_the_leaderboard(run: Run, page: Path) -> None:
    text = page.read_text()
    for entry in run.leaderboard:
        assert f"{entry.macro_f1.value:.3f} [" in text
    for name, count in run.results.class_counts.items():
        assert re.search(rf"{name}</th>\s*<td>{count}</td>", text)
    section = reliability_section(Subject.of(run))
    assert interval(run.recommended.calibration_excess) in section.words[1]  # predictions are read back rounded
    assert [row[0] for row in section.tables[1].rows] == list(run.results.class_counts)


def test_what_strangers_wrote_is_text(page: Path) -> None:
    assert SCRIPT not in page.read_text()
    assert any(row[1] == SCRIPT for row in samples_of(page))


def test_the_same_run_makes_the_same_page(run: Run, page: Path, tmp_path: Path) -> None:
    assert write_report(run.folder, out=tmp_path / "again.html").path.read_bytes() == page.read_bytes()


def test_plots_are_well_formed_and_take_the_colours_of_the_page(page: Path) -> None:
    plots = re.findall(r"<svg.*?</svg>", page.read_text(), flags=re.S)
    assert len(plots) >= 5
    ids: list[str] = []
    for plot in plots:
        ElementTree.fromstring(plot.replace("xlink:href", "href"))
        assert "currentColor" in plot
        assert "#010101" not in plot
        ids += re.findall(r'\bid="([^"]+)"', plot)
    assert len(ids) == len(set(ids))


def test_a_browser_filters_sorts_and_turns_pages_without_a_network(page: Path) -> None:
    total = len(samples_of(page))
    wrong = sum(row[6] == 0 for row in samples_of(page))
    with open_browser() as driver:
        open_page(driver, page)
        assert counted(driver) == f"{wrong} of {total} samples"
        choose(driver, "status", "all")
        assert counted(driver) == f"{total} of {total} samples"
        assert "page" in driver.find_element("id", "pager").text
        first = cards(driver)
        driver.find_element("id", "next").click()
        assert cards(driver) != first
        choose(driver, "label", "negative")
        assert counted(driver) == f"{sum(row[2] == 'negative' for row in samples_of(page))} of {total} samples"
        choose(driver, "label", "")
        driver.find_element("name", "words").send_keys("onerror")
        assert [card for card in cards(driver) if SCRIPT in card]
        assert len(cards(driver)) == 1
        assert len(driver.find_elements("css selector", "#samples img")) <= 1
        assert requests(driver) == {page.resolve().as_uri()}
        assert not [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_filters_are_in_the_address_tables_sort_and_photos_enlarge(run: Run, page: Path) -> None:
    with open_browser() as driver:
        open_page(driver, page)
        choose(driver, "status", "all")
        choose(driver, "label", "negative")
        driver.find_element("id", "next").click()
        first, address = cards(driver), driver.current_url
        assert address.endswith("#gallery?status=all&label=negative&page=2")
        driver.get("about:blank")
        open_page(driver, Path(address.removeprefix("file://").partition("#")[0]), address.partition("#")[2])
        assert cards(driver) == first
        table = driver.find_element("css selector", "#confusion table")
        count = table.find_element("css selector", "td a")
        driver.execute_script("arguments[0].click()", count)  # a cell of the matrix leads to its samples
        assert int(counted(driver).split()[0]) == int(count.get_attribute("textContent").split()[0])
        driver.execute_script("document.querySelector('#samples .photo').click()")
        assert driver.execute_script("return document.querySelector('#large').open")
        driver.find_element("css selector", "#large button").click()
        driver.execute_script("document.querySelectorAll('#ranking .sort, #leaderboard .sort')[0].click()")
        names = [
            cell.text for cell in driver.find_elements("css selector", "#leaderboard table:first-of-type tbody th")
        ]
        assert names == sorted(names)
        driver.execute_script("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        driver.find_element("id", "copy").click()
        ids = driver.execute_script("return window.copied").split()
        assert len(ids) == int(count.get_attribute("textContent").split()[0])
        assert set(ids) <= {row[0] for row in samples_of(page)}


def test_a_phone_has_no_sideways_scroll_and_the_dark_page_is_dark(page: Path) -> None:
    with open_browser(width=500) as driver:
        metrics = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        open_page(driver, page)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        paper = "return getComputedStyle(document.body).backgroundColor"
        light = driver.execute_script(paper)
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        assert sum(numbers(driver.execute_script(paper))) < 150 < 600 < sum(numbers(light))


def test_keys_and_screen_readers_find_their_way(page: Path) -> None:
    with open_browser() as driver:
        open_page(driver, page)
        assert driver.execute_script(f"return {UNNAMED}.length") == 0
        assert (
            driver.execute_script("return document.querySelectorAll('img:not([alt]), table:not(:has(caption))').length")
            == 0
        )
        assert driver.execute_script("return document.documentElement.lang") == "en"
        assert driver.execute_script("return document.querySelectorAll('h1').length") == 1
        driver.switch_to.active_element.send_keys("\t")
        assert driver.switch_to.active_element.get_attribute("class") == "skip"


def counted(driver: Any) -> str:
    return driver.find_element("id", "count").text


def cards(driver: Any) -> list[str]:
    return [item.text for item in driver.find_elements("css selector", "#samples li")]


def choose(driver: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    if name == "status":
        driver.execute_script("document.querySelector(`[name=status][value='${arguments[0]}']`).click()", value)
        return
    found = Select(driver.find_element("name", name))
    (place,) = [number for number, option in enumerate(found.options) if option.get_attribute("value") == value]
    found.select_by_index(place)


def numbers(colour: str) -> list[int]:
    return [int(value) for value in re.findall(r"\d+", colour)[:3]]


def test_a_hundred_thousand_rows_stay_small_and_usable(run: Run, tmp_path: Path) -> None:
    leaderboard = [replace(entry, samples=MANY, predictions=None).to_json() for entry in run.leaderboard]
    many, data = (
        Run.from_json(tmp_path / "many", {**run.to_json(), "leaderboard": leaderboard, "splits": ""}),
        Path(run.config.data),
    )
    photos = sorted((data / "data").glob("*.jpg"))
    words = np.random.default_rng(0).integers(0, 5000, (MANY, 18)).tolist()  # as long as tweets, and no two alike
    with (tmp_path / "many.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["id", "text", "image", "label"])
        for number in range(MANY):
            text = " ".join(map(str, words[number]))
            writer.writerow([f"id{number}", text, photos[number % len(photos)], run.classes[number % 3]])
    for folder in run.folder.glob("concat-*"):  # the head that is shown, and its twins on one modality
        header, *lines = (folder / "out_of_fold.csv").read_text().splitlines()
        kept = [line.split(",", 1)[1] for line in lines]
        copies = [f"id{number},{kept[number % len(kept)]}" for number in range(MANY)]
        (many.folder / folder.name).mkdir(parents=True)
        (many.folder / folder.name / "out_of_fold.csv").write_text("\n".join([header, *copies]) + "\n")
    results = Subject.of(many, "concat", "both", data=str(tmp_path / "many.csv"))
    page = Page("many", "", [], [], make_gallery(results, 200, 9_900_000, Silent()), run.classes)
    (tmp_path / "page.html").write_text(render(page))
    assert (tmp_path / "page.html").stat().st_size < 10_000_000
    with open_browser() as driver:
        open_page(driver, tmp_path / "page.html")
        choose(driver, "status", "all")
        assert counted(driver) == "100,000 of 100,000 samples"
        assert len(cards(driver)) == 12


def test_a_gallery_without_room_has_the_first_samples(run: Run) -> None:
    small = make_gallery(Subject.of(run), 200, 900, Silent())
    assert len(small.rows) <= 900 * ROW_SHARE
    assert 5 < small.listed < small.samples == run.results.labelled


def test_who_flips_a_sample_is_what_the_twins_say(run: Run) -> None:
    results = Subject.of(run, "concat", "both")
    found = attribute(results)
    assert found
    said = {name: run.out_of_fold(run.entry("concat", name)).voted for name in ("both", "text", "image")}
    for row, who in enumerate(found.who):
        without_text = (said["both"][row] != said["image"][row]).any()
        without_image = (said["both"][row] != said["text"][row]).any()
        expected = {(0, 0): "neither", (1, 0): "text", (0, 1): "image", (1, 1): "both"}
        assert WHO[who] == expected[int(without_text), int(without_image)]


def test_pairs_are_tested_as_each_alone(run: Run) -> None:
    found = [run.out_of_fold(entry) for entry in run.leaderboard[:3]]
    table, adjusted = compare_pairs(found[0].targets, [each.chosen for each in found])
    alone = paired_difference(found[0].targets, found[0].chosen, found[2].chosen)
    assert table[0][2].value == pytest.approx(alone.value)
    assert table[0][2].value == -table[2][0].value
    assert (adjusted == adjusted.T).all()
    assert all(adjusted[row, column] >= min(1, table[row][column].p) for row in range(3) for column in range(row))


def test_predictions_score_what_the_run_says(run: Run) -> None:
    from mmfeat.evaluation.metrics import macro_f1

    for entry in run.leaderboard:
        found = run.out_of_fold(entry)
        scores = [macro_f1(found.targets.matrix, chosen) for chosen in found.chosen]
        assert np.mean(scores) == pytest.approx(entry.macro_f1.value, abs=1e-6)


def test_settings_are_grouped_and_correlated(run: Run) -> None:
    trials = list(read_trials(run, run.entry("concat", "both")))
    assert varied([settings for settings, _ in trials]) == ["dropout"]
    groups = group_means(trials, "dropout")
    assert [row[0] for row in groups] == ["0.2", "0.5"]
    assert [row[1] for row in groups] == ["1", "1"]
    line = [({"rate": 10.0**-n}, float(n)) for n in range(20)]
    assert correlation(line, "rate")[0] == -1.0
    assert len(group_means(line, "rate")) == 4
    assert sum(int(row[1]) for row in group_means(line, "rate")) == 20


def test_a_changed_trial_is_not_reported(run: Run, tmp_path: Path) -> None:
    copied = replace(run, folder=Path(shutil.copytree(run.folder, tmp_path / "run")))
    trial = copied.head_folder(run.entry("concat", "both")) / "trials" / "0001.json"
    values = json.loads(trial.read_text())
    trial.write_text(json.dumps({**values, "scores": [[1.0]]}))
    with pytest.raises(RunError, match=r"0001\.json: not a whole trial \(it or 0001\.safetensors"):
        list(read_trials(copied, run.entry("concat", "both")))


def test_wilson_is_that_of_scipy() -> None:
    from scipy.stats import binomtest

    for right, count in ((0, 10), (7, 10), (299, 300)):
        low, high = wilson(np.array(right / count), np.array(count))
        expected = binomtest(right, count).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_files_for_papers(run: Run, tmp_path: Path) -> None:
    report = write_report(run.folder, out=tmp_path / "r.html", papers=Papers(latex=True, csv=True, png=True))
    names = {path.name for path in report.files}
    assert {"leaderboard.csv", "leaderboard.tex", "leaderboard.png", "confusion.png"} <= names
    assert rows(tmp_path / "r-files/leaderboard.csv")[0]["head"] == run.leaderboard[0].head
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.files if path.suffix == ".png")


def test_latex_says_what_the_cells_say() -> None:
    table = Table("t", "50 % of a_b", ["", "x & y"], [["$5", "±0.1 → {0}"], ["a\\b", ""]], strong=frozenset({0}))
    text = latex_table(table)
    assert r"50 \% of a\_b" in text
    assert r"\textbf{\$5} & \textbf{$\pm$0.1 $\to$ \{0\}} \\" in text
    assert r"a\textbackslash{}b &  \\" in text


def test_a_run_without_its_data_still_has_a_report(run: Run, tmp_path: Path) -> None:
    gone = tmp_path / run.folder.name
    shutil.copytree(run.folder, gone)
    config = {**run.to_json(), "data": str(tmp_path / "gone"), "cache": str(tmp_path / "no-cache")}
    (gone / "run.json").write_text(json.dumps(config))
    report = write_report(gone)
    assert report.photos == 0
    assert "is not there, so texts and photos are missing" in report.path.read_text()
    assert len(samples_of(report.path)) == report.samples


def test_what_is_wrong_is_said_in_a_line(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished run"):
        write_report(tmp_path)
    with pytest.raises(RunError, match="no film; the run has"):
        write_report(run.folder, head="film")
    with pytest.raises(ConfigError, match="name an HTML file"):
        write_report(run.folder, out=tmp_path)
    broken = tmp_path / run.folder.name
    shutil.copytree(run.folder, broken)
    path = broken / "concat-both" / "out_of_fold.csv"
    path.write_text(path.read_text().replace("p_negative", "p_other"))
    with pytest.raises(RunError, match="not the predictions of a whole run"):
        write_report(broken, out=broken / "out.html", head="concat", modalities="both")
    assert not (broken / "out.html").exists()

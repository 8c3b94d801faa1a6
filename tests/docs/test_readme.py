"""Every command of the README, of docs/session.md and of docs/own-csv.md is run in order, and does what is said there.

The folder of the session holds what its author had: data in `mvsa`, models in `weights`. Only what stands in
`SUBSTITUTIONS` is another thing here than there, and `CONFIG` shortens what trains. The session is typed as it stands,
each line a process of its own; other commands run in this process, which is the same but for starting Python.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from mmfeat.cli.main import app
from mmfeat.heads.registry import BASELINES, FUSIONS
from mmfeat.samples.dataset import read_samples
from tests.docs.markdown import ROOT, blocks
from tests.processes import Command
from tests.sweep.small_sweeps import rows

README = ROOT / "README.md"
SESSION = ROOT / "docs/session.md"
OWN_CSV = ROOT / "docs/own-csv.md"
# What is written in docs/session.md or in docs/recipes.md -> what is run here, and why.
SUBSTITUTIONS = {
    "clip,bert,resnet50": "clip:weights/clip,bert:weights/all-MiniLM-L6-v2,resnet18:weights/resnet18.pth",  # no hub
    "bert,resnet50 ": "bert:weights/all-MiniLM-L6-v2,resnet18:weights/resnet18.pth ",  # no hub
    "clip,bert ": "clip:weights/clip,bert:weights/all-MiniLM-L6-v2 ",  # no hub
    "clip ": "clip:weights/clip ",  # no hub
    "s3://bucket/tweets.parquet": "bucket/tweets.parquet",  # no network
    "--engine ray": "--engine local",  # tests/extraction/test_on_ray.py starts Ray
    "--trials 40": "--trials 2",  # the time
    "--preset bert-resnet50": "--preset bert-resnet50 --dropout 0.3,0.5 --batch-size 32",  # the time
    "--epochs 6": "--epochs 1",  # the time
    "--epochs 5": "--epochs 1",  # the time
    "export ": "export --no-model ",  # the time; tests of the export have models
    "explain 5089": "explain 1001",  # an id of the demo
}
# What is shorter here where the page names no value: `--config` never wins over a flag.
CONFIG = """
[heads]
folds = 2
seeds = 1
epochs = 1
baselines = "prior,ridge"
[finetune]
epochs = 1
seeds = 1
"""
# How lines begin that the demo has no reason to print:
DATA_ONLY = ("if errors are random,", "With ", "Text and photo together ", "note", "noise ceiling")
ENSEMBLES = ("greedy", "stacking", "mean", "product")
NAMED = re.compile(r"^(?:run|leaderboard|submission|report|audit|export) (\S+)", flags=re.MULTILINE)


SHORTER = CONFIG.replace("[heads]", '[heads]\nmodalities = "both"')  # the session shows all three


class Shown(NamedTuple):
    """A line of a page and the output that stands below it."""

    line: str
    said: str


class Answer(NamedTuple):
    code: int | None
    output: str
    errors: str


def session(page: Path = SESSION) -> list[Shown]:
    """The lines that stand behind `$`, with what they are said to print."""
    found = []
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, said = part.partition("\n")
            found.append(Shown(line, said.strip("\n")))
    return found


def others(page: Path) -> list[str]:
    """The lines of blocks that hold commands only."""
    plain = [block.text for block in blocks(page, "console") if not block.text.startswith("$ ")]
    return [line.partition(" # ")[0].strip() for text in plain for line in text.splitlines() if line.strip()]


def here(line: str, config: str) -> list[str]:
    """The words of a page's line behind `mmfeat`, with the substitutions."""
    for written, instead in SUBSTITUTIONS.items():
        line = (line + " ").replace(f" {written}", f" {instead}").rstrip()
    program, *arguments = shlex.split(line)
    assert program == "mmfeat"
    return ["--config", config, *arguments]


@pytest.fixture(scope="module")
def place(
    small_demo_folder: Path,
    tiny_bert: Path,
    tiny_clip: Path,
    tiny_timm: Path,
    resnet_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """The working folder, entered: data, models and the file that shortens."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(small_demo_folder, place / "mvsa")
    models = {"all-MiniLM-L6-v2": tiny_bert, "mobilenetv1_100-imagenet": tiny_timm, "clip": tiny_clip}
    for name, folder in models.items():
        shutil.copytree(folder, place / "weights" / name)
    shutil.copy(resnet_file, place / "weights/resnet18.pth")
    shutil.copy(next((small_demo_folder / "data").glob("*.jpg")), place / "photo.jpg")
    (place / "short.toml").write_text(CONFIG)
    (place / "shorter.toml").write_text(SHORTER)
    write_parquet(place / "mvsa", place / "bucket/tweets.parquet")
    shutil.copy(place / "mvsa/data/1001.jpg", place / "photo.jpg")
    before = Path.cwd()
    os.chdir(place)
    yield place
    os.chdir(before)


def write_parquet(folder: Path, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    samples = read_samples(folder)
    table = {"id": [each.id for each in samples], "text": [each.text for each in samples]}
    images = [str(each.image) if each.image else None for each in samples]
    path.parent.mkdir()
    pyarrow.parquet.write_table(
        pyarrow.table({**table, "image": images, "label": [each.label for each in samples]}), path
    )


@pytest.fixture(scope="module")
def typed(place: Path) -> list[Answer]:
    """What the lines of the session answer, each a process of its own."""
    return [as_process(each.line) for each in session() if "explain" not in each.line]


def as_process(line: str) -> Answer:
    command = Command(here(line, "short.toml"), Path.cwd())
    out, err = command.wait()
    return Answer(command.returncode, out, err)


def in_process(line: str) -> Answer:
    answer = CliRunner().invoke(app, here(line, "shorter.toml"))
    return Answer(answer.exit_code, answer.stdout, answer.stderr)


def check(answer: Answer) -> None:
    """Exit code 0, and every file that is named as written is there."""
    assert answer.code == 0, answer.errors
    named = NAMED.findall(answer.output)
    assert all(Path(name).exists() for name in named), named


def kind(line: str) -> str:
    """What a line begins with, up to the first thing that depends on data or machine."""
    return " ".join(re.split(r"[\d+]|: |mvsa|timm|bert|hashing|hog|heads/", line)[0].replace("(", "").split())


def is_entry(line: str) -> bool:
    """Whether it is about one head, of which a short run has fewer, or a detail, or stands for what is left out."""
    words = line.replace("=", " ").split()
    aside = line.startswith(" ") or "more" in words or line.lstrip().startswith("(")
    of_data = line.count("%") > 2 or re.match(r"(?=\w*\d)(?=\w*[a-z])\w+  ", line)  # a class, or an id
    return not words or words[0] in (*FUSIONS, *BASELINES, *ENSEMBLES) or aside or bool(of_data)


def test_the_session_runs_as_it_stands(typed: list[Answer]) -> None:
    for answer in typed:
        check(answer)
    extracted, again, trained, audited, reported, submitted = typed
    assert "wrote " in extracted.output
    assert "nothing to do: every vector is in cache/mvsa" in again.output
    assert "next: mmfeat report --run heads/mvsa-" in trained.output
    assert "label errors: " in audited.output
    assert "/report.html (" in reported.output
    assert "submission submission.csv" in submitted.output
    assert [row["guid"] for row in rows(Path("submission.csv"))] == [
        each.id for each in read_samples("mvsa").unlabelled
    ]


@pytest.mark.parametrize("number", range(len(session()) - 1))
def test_the_session_prints_what_the_page_shows(typed: list[Answer], number: int) -> None:
    """Line for line in kind: headers, summaries and next steps; numbers, labels and names differ."""
    compare(session()[number], typed[number])


def compare(shown: Shown, answer: Answer) -> None:
    printed = [kind(line) for line in answer.output.splitlines()]
    for line in shown.said.splitlines():
        assert is_entry(line) or kind(line) in printed or line.startswith(DATA_ONLY), (
            f"mmfeat prints no line like {line!r}"
        )


@pytest.mark.parametrize("target", ["demo", "test"])
def test_targets_of_the_readme(target: str) -> None:
    assert f"make {target}" in others(README)
    answer = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr
    assert ("mmfeat demo" if target == "demo" else "pytest") in answer.stdout


def test_a_table_of_ones_own_from_start_to_end(
    small_demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five commands print what the page shows, in kind; `mmfeat run` of the README takes the flags of the first."""
    first, *shown = session(OWN_CSV)
    together, *later = [line for line in others(README) if line.startswith("mmfeat ")]
    plain = first.line.replace(" --encoders hashing,hog", "")
    assert together == plain.replace("extract", "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shorter.toml").write_text(SHORTER)
    write_shop(small_demo_folder)
    for each in (first, *shown):
        answer = in_process(each.line)
        check(answer)
        compare(each, answer)
    assert list(rows(Path("submission.csv"))[0]) == ["sku", "category"]
    assert len(rows(Path("submission.csv"))) == len(rows(Path("test.csv")))
    shutil.copy("test.csv", "new.csv")
    shutil.copy(small_demo_folder / "data/1001.jpg", "photo.jpg")
    for line in later:
        check(in_process(line))


def write_shop(folder: Path) -> None:
    """The demo as train.csv and test.csv, with the columns that the page has."""
    samples = read_samples(folder)
    for name, part, more in (("train.csv", samples.labelled, ["category"]), ("test.csv", samples.unlabelled, [])):
        with Path(name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["sku", "title", "photo", *more])
            writer.writerows([each.id, each.text, each.image, each.label][: 3 + len(more)] for each in part)


@pytest.mark.parametrize("line", others(SESSION))
def test_more_commands_of_the_session_run(typed: list[Answer], line: str) -> None:
    check(in_process(line))
    if "--engine" in line:
        assert list(Path("shared/cache/tweets").glob("clip*/*.h5"))
    if "--split-dir splits" in line:
        assert sorted(path.name for path in Path("splits").iterdir()) == [
            *("test_split.csv", "train_split.csv", "val_split.csv")
        ]
    if line.startswith("mmfeat finetune"):
        (run,) = [path for path in Path("heads").iterdir() if (path / "stage-2-both").exists()]
        assert (run / "run.json").exists()


def test_why_a_sample_is_a_miss(typed: list[Answer]) -> None:
    """The session's own flags are the latest extraction's no more: they are named."""
    (asked,) = [each for each in session() if "explain" in each.line]
    encoders = re.search(r"--encoders (\S+)", session()[0].line)
    assert encoders is not None
    answer = in_process(f"{asked.line} --data mvsa --encoders {encoders.group(1)}")
    check(answer)
    assert ": hit: row " in answer.output
    assert ": miss: no shard of this encoder in " in answer.output
    assert "cleaning: there tweet, asked for none" in answer.output
    assert asked.said.splitlines()[-1] in answer.output

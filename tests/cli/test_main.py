"""The commands as a user types them: real processes, their output, their exit codes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import Result

from mmfeat.cache.survey import survey
from mmfeat.cli.main import _run, app
from mmfeat.errors import DataError
from mmfeat.runs.run import read_run
from tests.cli.typed import invoke
from tests.docs.test_commands_page import COMMANDS

PROGRESS = re.compile(r"\d/s\b")  # of steps that took more than a second, as any may on a busy machine
HEAVY = {
    *("torch", "torchvision", "timm", "open_clip", "transformers", "sklearn", "scipy", "skimage", "h5py", "pyarrow"),
    *("optuna", "ray", "loky", "fsspec", "matplotlib", "jinja2", "py3langid", "onnx", "onnxruntime", "mlflow"),
}
HEAVY_FOR_HELP = {"numpy", "pandas", "PIL", "matplotlib", "jinja2", "onnx", "onnxruntime", "mlflow"}


def mmfeat(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmfeat", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def fails(answer: subprocess.CompletedProcess[str] | Result, *words: str) -> None:
    """Exit code 1 and one line on stderr that holds `words`."""
    assert (answer.exit_code if isinstance(answer, Result) else answer.returncode) == 1, answer
    lines = [line for line in answer.stderr.strip().splitlines() if not PROGRESS.search(line)]
    assert len(lines) == 1, answer.stderr
    assert lines[0].startswith("mmfeat: ")
    assert all(word in lines[0] for word in words), lines[0]


def made_table(folder: Path) -> Path:
    """A table in which two samples have one broken photo, and one class a single sample."""
    (folder / "broken.jpg").write_text("no photo")
    rows = [f"{n},word {n},broken.jpg,{'rare' if n == 0 else 'xy'[n % 2]}" for n in range(8)]
    (folder / "few.csv").write_text("\n".join(["id,text,image,label", *rows]))
    return folder / "few.csv"


def test_samples_are_counted_that_share_an_unreadable_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "good.png")
    table = made_table(tmp_path)
    table.write_text(table.read_text().replace("broken.jpg,rare", "good.png,rare"))
    for new in (1, 0):
        assert f"{new} new, 7 photos unreadable" in invoke("extract", table, "--encoders", "hog").stdout


def test_the_whole_way_and_what_a_warm_rerun_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = invoke("demo", "--out", "demo", "--pairs", 120)
    assert made.stdout.splitlines()[-1] == "next: mmfeat extract --data demo --encoders hashing,hog"
    extracted = mmfeat("extract", "--data", "demo", "--encoders", "hashing,hog", cwd=tmp_path)
    assert extracted.returncode == 0, extracted.stderr
    assert "sample 1003: broken image" in extracted.stdout
    assert "labels: negative" in extracted.stdout
    assert "1 photo unreadable" in extracted.stdout
    assert "next: mmfeat heads --data demo" in extracted.stdout
    again, imported = run_listing_imports("extract", "--data", "demo", "--encoders", "hashing,hog", cwd=tmp_path)
    assert not imported & (HEAVY - {"h5py", "fsspec"} | {"pandas"})
    assert "nothing to do: every vector is in cache/demo" in again
    assert "1 photo unreadable" in again
    heads = ("heads", "--fusion", "concat", "--baselines", "knn", "--folds", 2, "--seeds", 2, "--epochs", 2)
    trained = mmfeat(*heads, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[0] == "using demo with hashing, hog"
    printed = trained.stdout.splitlines()
    assert any(line.startswith("Best: ") for line in printed)
    assert not [line for line in trained.stderr.splitlines() if not PROGRESS.search(line)]
    (run,) = (tmp_path / "heads").iterdir()
    rows = [line for line in printed if line[0] in "= " and "[." in line and len(line) <= 80]
    assert len(rows) == len(read_run(run).leaderboard)
    assert trained.stdout.splitlines()[-1] == f"next: mmfeat report --run heads/{run.name}"
    reprinted = ""
    for command in (heads, ("runs", "show"), ("runs", "compare", "demo", "demo"), ("report", "--photos", "0")):
        said, imported = run_listing_imports(*command, cwd=tmp_path)
        assert "run" in said
        predicts = {"torch"} if "report" in command else set()  # the samples that wait for a label
        assert not imported & ({"torch", "sklearn", "optuna", "transformers", "pandas"} - predicts), command
        reprinted = reprinted or said
    assert reprinted.splitlines()[1].startswith("nothing to do: these heads were trained")
    assert trained.stdout.splitlines()[1:8] == reprinted.splitlines()[2:9]
    invoke("extract", made_table(tmp_path), "--encoders", "hashing")
    asked = invoke("heads", "--folds", 2, "--epochs", 1)
    assert asked.stdout.splitlines()[0] == "using few.csv with hashing: the latest of 2 data sets; --data names another"
    assert "has 1 sample, each fold needs 1" in asked.stderr


def test_the_whole_way_in_one_command(small_demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = (small_demo_folder, "--encoders", "hashing", "--fusion", "none", "--baselines", "prior,ridge")
    fails(invoke("run", *flags, "--out", small_demo_folder / "x.csv"), "would overwrite the data")
    assert not [*tmp_path.iterdir()]
    printed, again = (invoke("run", *flags).stdout.splitlines() for _ in range(2))
    assert "trained before" in again[4]
    (run,) = (tmp_path / "heads").iterdir()
    places = [f"run heads/{run.name}", f"report heads/{run.name}/report.html", "audit audit/demo/label_errors.csv"]
    for lines in (printed, again):
        steps = [line[:9] for line in lines if re.match(r"\d/5 ", line)]
        assert steps == ["1/5 extra", "2/5 heads", "3/5 audit", "4/5 repor", "5/5 submi"]
        assert lines[0].endswith(": 60 samples, 54 labelled")  # before anything is encoded
        assert sum(line.startswith("Best: ") for line in lines) == 1
        assert lines[-5:-1] == [*places, "submission submission.csv"]
        assert sum(line.startswith("next: ") for line in lines) == 1
    assert all((tmp_path / place.partition(" ")[2]).exists() for place in places)
    assert len((tmp_path / "submission.csv").read_text().splitlines()) == 7
    heads = invoke("heads", "--fusion", "none", "--baselines", "prior,ridge").stdout.splitlines()
    assert heads[1].startswith("nothing to do: these heads were trained")
    Path("bare.csv").write_text("text\nred car\nblue car\n")
    fails(invoke("run", "bare.csv", "--encoders", "hashing"), "no sample has a label to learn")
    fails(
        invoke("run", "bear.csv", "--encoders", "hashing"), "bear.csv: no such folder or table; did you mean bare.csv?"
    )
    Path("typo.csv").write_text("text,label\n" + "red,Watches\n" * 5 + "blue,Watchs\n")
    fails(invoke("run", "typo.csv", "--encoders", "hashing"), 'folds: Watchs 1 (did you mean "Watches"?); --rare drop')


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    answer = invoke(*command.split(), "--help")
    assert answer.exit_code == 0
    lines = [line.strip() for line in answer.stdout.splitlines()]
    assert any(f"{line} ".startswith(f"mmfeat {command} ") for line in lines)


def test_the_list_of_commands_is_not_cut_at_80_columns() -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    inner = {name: each for group in ("cache", "runs") for name, each in commands[group].commands.items()}
    for name, command in {**commands, **inner}.items():
        assert len(command.get_short_help_str(60)) <= 60, name
        assert not command.get_short_help_str(60).endswith("..."), name


def test_help_has_panels_and_all_flags_on_request() -> None:
    short, whole = (invoke("heads", flag).stdout for flag in ("--help", "--help-all"))
    panels = ["Data:", "What to train:", "How to score:", "Search:", "Training:", "Machine:"]
    assert [line for line in short.splitlines() if line in panels] == panels
    assert "--delimiter" in whole
    assert "--delimiter" not in short
    assert "--folds <whole number>" in short
    assert "--help-all" in short


def run_listing_imports(*arguments: object, cwd: Path) -> tuple[str, set[str]]:
    """What a command prints, and the top-level packages that its process imports."""
    command = [sys.executable, "-X", "importtime", "-m", "mmfeat", *map(str, arguments)]
    answer = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    rows = [line.rsplit("|", 1)[1].strip() for line in answer.stderr.splitlines() if line.startswith("import time:")]
    assert any(row.startswith("mmfeat.") for row in rows), answer.stderr
    return answer.stdout, {row.partition(".")[0] for row in rows}


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_imports_nothing_heavy(flag: str, tmp_path: Path) -> None:
    """What makes it quick; benchmarks/startup.py has the time."""
    printed, imported = run_listing_imports(*["heads"][: flag == "--help"], flag, cwd=tmp_path)
    assert ("--learning-rate" if flag == "--help" else "mmfeat 0.") in printed
    assert not imported & (HEAVY | HEAVY_FOR_HELP)


def test_a_refused_flag_imports_nothing_heavy(demo_folder: Path, tmp_path: Path) -> None:
    wrong = ("heads", "--learning-rate", "abc", "--data", demo_folder, "--encoders", "hog")
    assert not run_listing_imports(*wrong, cwd=tmp_path)[1] & (HEAVY | {"pandas"})


def test_wrong_input_is_one_line_and_exit_code_1(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(invoke("extract", "--data", demo_folder, "--encoders", ""), "no encoders")
    fails(invoke("extract", "--data", demo_folder, "--encoders", "elmo"), "no encoder family 'elmo'")
    fails(invoke("extract", "--data", demo_folder, "--columns", "x"), "--columns x: write id=")
    fails(invoke("extract", "--data", demo_folder, "--columns", "text=a,text=b"), "text is named twice")
    fails(invoke("extract", demo_folder, "--data", "other"), "both name the data")
    fails(invoke("runs", "show"), "no finished run")
    fails(invoke("extract", "--data", demo_folder, "--cache", "", "--encoders", "hog"), "--cache is empty")
    fails(invoke("extract", "--data", demo_folder, "--device", "tpu"), "--device tpu: use one of")
    fails(invoke("heads", "--learning-rate", "-1"), "nothing was")
    wrong = invoke("heads", "--data", demo_folder, "--encoders", "hog", "--learning-rate", "-1")
    fails(wrong, "--learning-rate -1.0: a number above 0")
    fails(invoke("demo", "--out", demo_folder / "train.txt"), "not empty and not this demo")
    fails(invoke("heads"), "nothing was extracted", "mmfeat extract")
    fails(invoke("submit"), "no finished run", "mmfeat heads")
    fails(invoke("submit", "--run", "nowhere"), "nowhere: no such run in heads")
    assert not list(tmp_path.iterdir())


def test_wrong_usage_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, line in (
        (
            ["extract"],
            "mmfeat: no data: name a folder or table, as in mmfeat extract listings.csv; "
            "mmfeat extract -h shows what there is\n",
        ),
        (["heds"], "mmfeat: No such command 'heds'. Did you mean 'heads'; mmfeat -h shows what there is\n"),
        (
            ["heads", "--folds", "one"],
            "mmfeat: --folds one: write a whole number; mmfeat heads -h shows what there is\n",
        ),
        (["--url-timeout=0"], "mmfeat: --url-timeout 0: write a number, at least 0.1; mmfeat -h shows what there is\n"),
    ):
        assert _run(arguments, typed="") == 2
        assert capsys.readouterr() == ("", line)


def test_a_cache_that_cannot_be_written(demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    answer = invoke("extract", "--data", demo_folder, "--encoders", "hashing")
    fails(answer, "cannot write cache/demo", "Not a directory", "name another place")
    assert (tmp_path / "cache").read_text() == "a file where the folder should be"


def test_no_room_for_the_cache(demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on file sizes refuses like a full disk does, to processes without rights of their own, too."""
    monkeypatch.chdir(tmp_path)
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from mmfeat.cli.main import main
sys.argv = ["mmfeat", "extract", "--data", {str(demo_folder)!r}, "--encoders", "hog"]
main()
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    fails(answer, "cannot write cache/demo/hog-", "File too large", "ulimit -f")
    assert not list(tmp_path.rglob("*.tmp"))
    assert invoke("extract", "--data", demo_folder, "--encoders", "hog").exit_code == 0


def test_ctrl_c_while_the_command_line_is_imported_shows_no_traceback(tmp_path: Path) -> None:
    code = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == "mmfeat.cli.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from mmfeat.__main__ import main
main()
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout, answer.stderr) == (-signal.SIGINT, "", "")


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    arguments = ("extract", "--data", "nowhere")
    fails(mmfeat(*arguments, cwd=tmp_path), "nowhere: no such folder or table; check the path")
    answer = mmfeat(*arguments, "--debug", cwd=tmp_path)
    assert answer.returncode == 1
    assert "Traceback" in answer.stderr
    assert isinstance(invoke("--debug", *arguments).exception, DataError)


def test_config_holds_flags_and_flags_win(demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "mmfeat.toml"
    config.write_text(
        f'data = "{demo_folder}"\ncache = "store"\n\n[extract]\nencoders = ["hashing", "hog"]\nbatch_size = 9\n'
    )
    answer = invoke("extract", "--config", config, "--encoders", "hashing")
    assert answer.exit_code == 0, answer.stderr
    assert [path.name.split("-")[0] for path in (tmp_path / "store" / "demo").iterdir() if path.is_dir()] == ["hashing"]
    assert invoke("--config", config, "extract").exit_code == 0
    assert len([path for path in (tmp_path / "store" / "demo").iterdir() if path.is_dir()]) == 2
    config.write_text("colour = 1\n[heads]\nflavour = 2\n")
    fails(invoke("extract", "--config", config), "no flag colour, heads.flavour")
    fails(invoke("extract", "--config", "nowhere.toml"), "nowhere.toml: no such file")
    config.write_text('extract = 1\nout = "x"\n')
    fails(invoke("extract", "--config", config), "extract, out means something else for each command")
    config.write_text("not toml")
    fails(invoke("extract", "--config", config), "not a readable TOML file")


def test_a_table_an_encoder(
    demo_folder: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two encoders of one family differ in their options; flags win, and only encoders that are named count."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "my_two"):
        shutil.copytree(tiny_bert, tmp_path / name)
    config = tmp_path / "mmfeat.toml"
    tables = f"""data = "{demo_folder}"\ndtype = "float32"\npooling = "max"\ncleaning = "tweet"
[encoders."bert:./one"]\npooling = "cls"\nmax-length = 9
[encoders."bert:my_two"]\nlayers = 2
[encoders.hashing]\ncleaning = "none"\n"""
    config.write_text(tables)

    def specs(*flags: str) -> dict[str, tuple[Any, ...]]:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        answer = invoke("extract", "--config", config, *flags)
        assert answer.exit_code == 0, answer.output
        found = [entry.spec for entry in survey("cache") if entry.spec]
        return {
            spec.variant or spec.family: (spec.pooling, spec.max_length, spec.layers, spec.cleaning) for spec in found
        }

    given = {"one": ("cls", 9, 1, "tweet"), "my_two": ("max", 128, 2, "tweet"), "hashing": ("tower", 0, 1, "none")}
    assert specs() == given
    assert specs("--encoders", "bert:one") == {"one": given["one"]}
    assert specs("--encoders", "bert:one", "--pooling", "mean") == {"one": ("mean", 9, 1, "tweet")}
    told = invoke("cache", "explain", "1001", "--config", config, "--encoders", "bert:one").output
    assert "pooling: there mean, asked for cls" in told
    for wrong, message in (
        ("polling = 1", r'[encoders."bert:./one"]: no option polling of one encoder; did you mean pooling?'),
        ("dtype = []", "dtype takes one value"),
        ('prompt = "x"', "there are none (it is about st)"),
    ):
        config.write_text(tables.replace("max-length = 9", wrong))
        fails(invoke("extract", "--config", config), message)
    config.write_text(f'data = "{demo_folder}"\n[encoders]\nhashing = "none"\n')
    fails(invoke("extract", "--config", config), "is a table of the options of one encoder")
    config.write_text(tables.replace("[encoders.hashing]", "[encoder.hashing]"))
    fails(invoke("extract", "--config", config), "no command encoder; did you mean encoders?")


def test_flags_of_heads_change_what_was_remembered(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    invoke("extract", "--data", demo_folder, "--encoders", "hashing")
    fails(invoke("heads", "--cleaning", "none"), "not in the cache for hashing")
    fails(invoke("heads", "--encoders", "hog"), "not in the cache for hog")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--learning-rate abc", "--learning-rate 'abc': write numbers, such as 1e-4,3e-4"),
        ("--learning-rate -1", "--learning-rate -1.0: a number above 0"),
        ("--dropout 0.5,1.5", "--dropout 1.5: a share from 0 to below 1"),
        ("--batch-size 1", "--batch-size 1: at least 2"),
        ("--epochs 2.5", "--epochs '2.5': write whole numbers"),
        ("--loss hinge", "--loss hinge: use one of cross-entropy, focal"),
        ("--class-weights some", "--class-weights some: use one of none, inverse, sqrt, effective"),
        ("--trials 3", "--trials: nothing to search; give a setting several values, as in --learning-rate"),
        ("--time-limit 3", "--time-limit: nothing to search"),
        ("--search optuna", "--search optuna: nothing to search"),
        ("--split 8-1-1", "--split 8-1-1: write shares such as 8:1:1 or 8:2"),
        ("--split 8:0:2", "--split 8:0:2: write train:validation:test, as 8:1:1, or train:test, as 8:2"),
        ("--protocol nope", "--protocol nope: use one of auto, kfold, holdout, given"),
        ("--preset nope", "--preset nope: use one of bert-resnet50, frozen-clip"),
        ("--logit-adjustment x", "--logit-adjustment x: use auto or a number"),
        ("--logit-adjustment nan", "--logit-adjustment nan: use auto or a number"),
        ("--encoders nope", "no encoder family 'nope'"),
        ("--data nowhere", "nowhere: no such folder or table; check the path"),
    ],
)
def test_wrong_flags_of_heads_are_one_line(extracted: Path, flags: str, words: str) -> None:
    before = written(extracted)
    own = ["--data", "demo", "--cache", "cache", "--encoders", "hashing,hog", "--out", "heads", "--split-dir", "splits"]
    answer = invoke("heads", *own, *flags.split(" "))
    assert answer.exit_code == 1, answer.output
    (line,) = [line for line in answer.stderr.splitlines() if not line.startswith("using ")]
    assert line.startswith("mmfeat: ")
    assert words in line
    assert written(extracted) == before


def written(place: Path) -> dict[Path, int]:
    """What is there but for what the cache notes of photos, which is true whatever is asked for next."""
    notes = ("images.index", "images.hashes")
    return {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file() and path.name not in notes}


def test_labels_that_do_not_suit_the_task_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("id,text,label\n" + "".join(f"{row},text {row},sun\n" for row in range(9)))
    for task, words in (("multiclass", "only one class (sun)"), ("multilabel", "all samples are labelled 'sun'")):
        flags = ["--data", "table.csv", "--encoders", "hashing", "--task", task]
        answer = invoke("heads", *flags)
        assert answer.exit_code == 1
        assert words in answer.stderr
        assert len(answer.stderr.splitlines()) == 1


@pytest.fixture
def extracted(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the demo data and its cache, to work in."""
    monkeypatch.chdir(place)
    return place


def test_heads_goes_on_with_the_views_and_outputs_of_the_extraction(
    tmp_path: Path, demo_folder: Path, tiny_bert: Path, tiny_timm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views are trained with, and cross-attention joins where there are tokens; submit knows both."""
    monkeypatch.chdir(tmp_path)
    encoders = f"bert:{tiny_bert},timm:{tiny_timm}"
    flags = ["--encoders", encoders, "--outputs", "pooled,tokens", "--views", "1", "--dtype", "float32"]
    answer = invoke("extract", "--data", demo_folder, *flags)
    assert answer.exit_code == 0, answer.output
    quick = ["--baselines", "none", "--protocol", "holdout", "--seeds", "1", "--epochs", "1", "--modalities", "both"]
    answer = invoke("heads", *quick)
    assert answer.exit_code == 0, answer.output
    (folder,) = Path("heads").iterdir()
    run = read_run(folder)
    assert {entry.head for entry in run.leaderboard if entry.modalities == "both"} == {
        *("late", "concat", "gated", "film", "film-concat", "cross-attention")
    }
    assert sorted((tower.spec.modality, tower.spec.output, tower.spec.view) for tower in run.towers) == [
        ("image", "pooled", "none"), ("image", "pooled", "train:1"), ("image", "tokens", "none"),
        ("text", "pooled", "none"), ("text", "tokens", "none"),
    ]  # fmt: skip
    for head in ("cross-attention", "greedy", "late"):
        answer = invoke("submit", "--head", head, "--out", f"{head}.csv")
        assert answer.exit_code == 0, answer.output
        assert len(Path(f"{head}.csv").read_text().splitlines()) == 13
    answer = invoke("heads", "--views", "0", "--outputs", "pooled", *quick, "--fusion", "concat")
    assert answer.exit_code == 0, answer.output
    plain = max(Path("heads").iterdir(), key=lambda path: (path / "run.json").stat().st_mtime_ns)
    assert {tower.spec.view for tower in read_run(plain).towers} == {"none"}


def test_flag_defaults_are_those_of_the_library() -> None:
    import inspect

    from mmfeat.cli.extract import extract as command
    from mmfeat.cli.heads import PARAMETERS
    from mmfeat.encoders.spec import EncoderOptions
    from mmfeat.evaluation.protocol import Protocol
    from mmfeat.extraction.extract import DEFAULT_ENCODERS
    from mmfeat.heads.registry import HeadSettings
    from mmfeat.sweep.search import Plan
    from mmfeat.sweep.train import train_heads

    heads = {name: default for name, (_, default) in PARAMETERS.items()}
    extract = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    protocol, plan = Protocol(), Plan(HeadSettings())
    library = {name: each.default for name, each in inspect.signature(train_heads).parameters.items()}
    assert [heads[name] for name in ("protocol", "folds", "seeds", "group", "split_dir", "seed")] == [
        *(protocol.kind, protocol.folds, protocol.seeds, protocol.grouped, protocol.split_dir, protocol.seed)
    ]
    assert tuple(float(share) for share in heads["split"].split(":")) == protocol.shares
    assert [heads[name] for name in ("search", "trials", "time_limit", "refit")] == [
        *(plan.method, plan.trials, plan.time_limit, plan.refit)
    ]
    assert (heads["logit_adjustment"], plan.adjustment) == ("auto", None)
    for name in ("fusion", "baselines", "modalities"):
        assert heads[name] == ",".join(library[name])
    for name in ("ensembles", "task", "attend", "engine", "ray_address", "device", "workers", "cache"):
        assert heads[name] == library[name]
    assert {heads[name] for name in vars(HeadSettings()) if name in heads} == {None}  # the library's own
    options = {name: value for name, value in vars(EncoderOptions()).items() if name in extract}
    options["outputs"] = ",".join(EncoderOptions().outputs)
    assert {name: extract[name] for name in options} == options
    assert extract["encoders"] == ",".join(DEFAULT_ENCODERS)


def test_progress_is_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmfeat.cli import console

    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(console, "WORTH_A_LINE", 0.0)
    monkeypatch.setattr(console, "NAMED_AFTER", 0.0)
    with console.ConsoleProgress().step("photos", 30) as advance:
        advance(0)  # as one does to say that something is alive
        advance(10, "first word\nsecond line")
        advance(20)
    with console.ConsoleProgress().step("loading clip", None):
        time.sleep(0.1)
    begun, first, _, last, loading = capsys.readouterr().err.splitlines()
    assert begun == "photos: 0 of 30"
    assert first.startswith("photos: 10 of 30, ")
    assert first.endswith(" s left, first word")
    assert last.startswith("photos: 30 in ")
    assert loading == "loading clip ..."

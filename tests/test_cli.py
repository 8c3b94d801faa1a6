"""The commands as a user types them: real processes, their output, their exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def mmfeat(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmfeat", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def fails(answer: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1 and one line on stderr that holds `words`."""
    assert answer.returncode == 1, answer
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 1, answer.stderr
    assert lines[0].startswith("mmfeat: ")
    assert all(word in lines[0] for word in words), lines[0]


def test_the_whole_way(tmp_path: Path) -> None:
    made = mmfeat("demo", "--out", "demo", "--pairs", 120, cwd=tmp_path)
    assert made.stdout.splitlines()[-1] == "next: mmfeat extract --data demo --encoders hashing,hog"
    extracted = mmfeat("extract", "--data", "demo", "--encoders", "hashing,hog", cwd=tmp_path)
    assert extracted.returncode == 0, extracted.stderr
    assert "sample 1003: broken image" in extracted.stdout
    assert "labels: negative" in extracted.stdout
    assert "1 unreadable" in extracted.stdout
    assert "next: mmfeat heads --data demo" in extracted.stdout
    again = mmfeat("extract", "--data", "demo", "--encoders", "hashing,hog", cwd=tmp_path)
    assert "nothing to do: every vector is in cache/demo" in again.stdout
    assert "1 unreadable" in again.stdout
    trained = mmfeat("heads", "--fusion", "concat", "--folds", 3, "--epochs", 2, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "using demo with hashing, hog" in trained.stdout
    assert max(len(line) for line in trained.stdout.splitlines() if "concat" in line and "[" in line) <= 80
    (run,) = (tmp_path / "heads").iterdir()
    assert trained.stdout.splitlines()[-1] == f"next: mmfeat submit --run heads/{run.name}"
    reprinted = mmfeat("heads", "--fusion", "concat", "--folds", 3, "--epochs", 2, cwd=tmp_path)
    assert "nothing to do: this configuration was trained" in reprinted.stdout
    submitted = mmfeat("submit", cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.splitlines()[-3:] == [
        f"run heads/{run.name}",
        f"leaderboard heads/{run.name}/leaderboard.csv",
        "submission submission.csv",
    ]
    assert len((tmp_path / "submission.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize("command", [[], ["extract"], ["heads"], ["submit"], ["demo"]])
def test_help_has_an_example(command: list[str], tmp_path: Path) -> None:
    answer = mmfeat(*command, "--help", cwd=tmp_path)
    assert answer.returncode == 0
    assert f"mmfeat {' '.join(command)}".strip() + " " in answer.stdout.replace("Usage: ", "")


def test_nothing_heavy_is_imported_for_help_and_a_warm_rerun(demo_folder: Path, tmp_path: Path) -> None:
    heavy = "{'torch', 'sklearn', 'transformers', 'torchvision', 'timm', 'open_clip', 'pandas', 'scipy'}"
    code = "import sys\nfrom mmfeat.cli import main\nsys.argv = ['mmfeat', *sys.argv[1:]]\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += f"print('imported', sorted({heavy} & set(sys.modules)))"

    def imported(*arguments: object) -> str:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300).stdout.splitlines()[
            -1
        ]

    assert imported("--help") == "imported []"
    extraction = ("extract", "--data", demo_folder, "--encoders", "hashing,hog")
    mmfeat(*extraction, cwd=tmp_path)
    assert imported(*extraction) == "imported []"


def test_wrong_input_is_one_line_and_exit_code_1(demo_folder: Path, tmp_path: Path) -> None:
    fails(mmfeat("extract", "--data", "nowhere", cwd=tmp_path), "nowhere: no such folder or table", "--data")
    fails(mmfeat("extract", "--data", demo_folder, "--encoders", "", cwd=tmp_path), "no encoders")
    fails(mmfeat("extract", "--data", demo_folder, "--encoders", "elmo", cwd=tmp_path), "no encoder family 'elmo'")
    fails(mmfeat("extract", "--data", demo_folder, "--columns", "x", cwd=tmp_path), "--columns x: write id=")
    fails(
        mmfeat("extract", "--data", demo_folder, "--cache", "", "--encoders", "hog", cwd=tmp_path), "--cache is empty"
    )
    fails(mmfeat("extract", "--data", demo_folder, "--device", "tpu", cwd=tmp_path), "--device tpu: use one of")
    fails(mmfeat("heads", "--learning-rate", "-1", cwd=tmp_path), "nothing was")
    fails(mmfeat("demo", "--out", demo_folder / "train.txt", cwd=tmp_path), "not empty and not this demo")
    fails(mmfeat("heads", cwd=tmp_path), "nothing was extracted", "mmfeat extract")
    fails(mmfeat("submit", cwd=tmp_path), "no finished run", "mmfeat heads")
    fails(mmfeat("submit", "--run", "nowhere", cwd=tmp_path), "nowhere: no finished run here")
    assert not list(tmp_path.iterdir())


def test_wrong_usage_is_exit_code_2(tmp_path: Path) -> None:
    assert mmfeat("extract", cwd=tmp_path).returncode == 2
    assert mmfeat("dance", cwd=tmp_path).returncode == 2
    assert mmfeat("heads", "--folds", "one", cwd=tmp_path).returncode == 2


def test_a_cache_that_cannot_be_written(demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    answer = mmfeat("extract", "--data", demo_folder, "--encoders", "hashing", cwd=tmp_path)
    fails(answer, "cannot write cache/demo", "Not a directory", "name another place")
    assert (tmp_path / "cache").read_text() == "a file where the folder should be"


def test_no_room_for_the_cache(demo_folder: Path, tmp_path: Path) -> None:
    """A limit on file sizes refuses like a full disk does, to processes without rights of their own, too."""
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from mmfeat.cli import main
sys.argv = ["mmfeat", "extract", "--data", {str(demo_folder)!r}, "--encoders", "hog"]
main()
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    fails(answer, "cannot write cache/demo/hog-", "File too large", "ulimit -f")
    assert not list(tmp_path.rglob("*.tmp"))
    assert mmfeat("extract", "--data", demo_folder, "--encoders", "hog", cwd=tmp_path).returncode == 0


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    for arguments in (["--debug", "extract", "--data", "nowhere"], ["extract", "--data", "nowhere", "--debug"]):
        answer = mmfeat(*arguments, cwd=tmp_path)
        assert answer.returncode == 1
        assert "Traceback" in answer.stderr


def test_config_holds_flags_and_flags_win(demo_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "mmfeat.toml"
    config.write_text(
        f'data = "{demo_folder}"\ncache = "store"\n\n[extract]\nencoders = ["hashing", "hog"]\nmax_length = 9\n'
    )
    answer = mmfeat("extract", "--config", config, "--encoders", "hashing", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert [path.name.split("-")[0] for path in (tmp_path / "store" / "demo").iterdir() if path.is_dir()] == ["hashing"]
    assert mmfeat("--config", config, "extract", cwd=tmp_path).returncode == 0
    assert len([path for path in (tmp_path / "store" / "demo").iterdir() if path.is_dir()]) == 2
    config.write_text("colour = 1\n[heads]\nflavour = 2\n")
    fails(mmfeat("extract", "--config", config, cwd=tmp_path), "no flag colour, heads.flavour")
    fails(mmfeat("extract", "--config", "nowhere.toml", cwd=tmp_path), "nowhere.toml: not a readable TOML file")
    config.write_text('extract = 1\nout = "x"\n')
    fails(mmfeat("extract", "--config", config, cwd=tmp_path), "extract, out means something else for each command")
    config.write_text("not toml")
    fails(mmfeat("extract", "--config", config, cwd=tmp_path), "not a readable TOML file")


def test_flags_of_heads_change_what_was_remembered(demo_folder: Path, tmp_path: Path) -> None:
    mmfeat("extract", "--data", demo_folder, "--encoders", "hashing", cwd=tmp_path)
    fails(mmfeat("heads", "--cleaning", "none", cwd=tmp_path), "not in the cache for hashing")
    fails(mmfeat("heads", "--encoders", "hog", cwd=tmp_path), "not in the cache for hog")


def test_flag_defaults_are_those_of_the_library() -> None:
    import inspect

    from mmfeat import cli
    from mmfeat.encoders import EncoderOptions
    from mmfeat.extract import DEFAULT_ENCODERS
    from mmfeat.heads import HeadSettings
    from mmfeat.sweep import FOLDS

    heads = {name: parameter.default for name, parameter in inspect.signature(cli.heads).parameters.items()}
    extract = {name: parameter.default for name, parameter in inspect.signature(cli.extract).parameters.items()}
    library = vars(HeadSettings()) | {"folds": FOLDS}
    assert {name: heads[name] for name in library if name in heads} == {
        name: value for name, value in library.items() if name in heads
    }
    options = {name: value for name, value in vars(EncoderOptions()).items() if name in extract}
    options["outputs"] = ",".join(EncoderOptions().outputs)
    assert {name: extract[name] for name in options} == options
    assert extract["encoders"] == ",".join(DEFAULT_ENCODERS)


def test_progress_is_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmfeat import console

    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(console, "WORTH_A_LINE", 0.0)
    with console.ConsoleProgress().task("photos", 30) as advance:
        advance(10)
        advance(20)
    first, _, last = capsys.readouterr().err.splitlines()
    assert first.startswith("photos: 10 of 30, ")
    assert first.endswith(" s left")
    assert last.startswith("photos: 30 in ")


def test_version(tmp_path: Path) -> None:
    assert mmfeat("--version", cwd=tmp_path).stdout.startswith("mmfeat 0.")

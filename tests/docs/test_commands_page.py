"""docs/commands.md names what the command line has, and nothing else; the shell completes it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from mmfeat.cli.flags import READING_PARAMETERS
from mmfeat.cli.main import app, read_config
from tests.docs.markdown import ROOT, anchors, blocks, links

PAGE = ROOT / "docs/commands.md"
ROOT_FLAGS = {
    "--url-timeout",
    "--config",
    "--debug",
    "--trust-remote-code",
    "--version",
    "--install-completion",
    "--show-completion",
    "--help",
    "--help-all",
}


def load_script(name: str) -> ModuleType:
    """A script of docs, which is no part of a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_commands = load_script("make_commands")
COMMANDS = make_commands.commands()
OWN, _, REFERENCE = PAGE.read_text().partition(make_commands.BEGIN)


def names_of(command: str) -> set[str]:
    return {name for each in make_commands.flags(COMMANDS[command]) for name in (*each.opts, *each.secondary_opts)}


def words_of(text: str) -> set[str]:
    """Whatever looks like a flag."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def test_the_reference_is_what_the_script_writes() -> None:
    assert PAGE.read_text() == make_commands.page(OWN), "run python docs/make_commands.py"
    glossary = make_commands.GLOSSARY.read_text()
    own = glossary.partition(make_commands.BEGIN)[0]
    assert glossary == make_commands.glossary(own), "run python docs/make_commands.py"


def test_every_command_stands_there_and_no_other() -> None:
    assert re.findall(r"^### mmfeat (.+)$", REFERENCE, flags=re.MULTILINE) == list(COMMANDS)
    linked = {link.removeprefix("#mmfeat-").replace("-", " ") for link in links(PAGE) if link.startswith("#mmfeat-")}
    assert linked == set(COMMANDS)
    assert {f"mmfeat-{name.replace(' ', '-')}" for name in COMMANDS} <= anchors(PAGE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_help_stands_there_and_no_other(command: str) -> None:
    """The help is asked, not the objects that the page was made of."""
    answer = CliRunner().invoke(app, [*command.split(), "--help-all"], env={"COLUMNS": "200"})
    assert answer.exit_code == 0
    table = REFERENCE.split(f"### mmfeat {command}\n")[1].split("\n### ")[0].split("```\n")[-1]
    rows, _, shared = table.partition("\nAnd [")
    cells = re.findall(r"^\| `(.+?)` \|", rows, flags=re.MULTILINE) + re.findall(r"`(.+?)`", shared)
    stated = {name for cell in cells for name in cell.split("/")}
    assert all(f"\n| `{name}` |" in REFERENCE.split("\n### mmfeat")[0] for name in re.findall(r"`(.+?)`", shared))
    listed = re.findall(r"^  +(?:-h, )?(--\S+?)(?: / (--\S+))?(?:  | <|$)", answer.output, flags=re.MULTILINE)
    shown = {name for pair in listed for name in pair if name} - {"--help"}
    assert {name for name in stated if name.startswith("--")} == shown == names_of(command)


def test_what_is_written_by_hand_names_no_other_flag() -> None:
    known = ROOT_FLAGS | {name for command in COMMANDS for name in names_of(command)} | {"--fu"}  # before Tab
    assert words_of(OWN) <= known


def test_the_files_of_flags_in_the_page_are_read(tmp_path: Path) -> None:
    block, tables = blocks(PAGE, "toml")
    (tmp_path / "mmfeat.toml").write_text(block.text)
    (tmp_path / "tables.toml").write_text(tables.text)
    known = {
        name.replace(" ", "-"): {each.opts[0].lstrip("-"): each.name for each in make_commands.flags(command)}
        for name, command in COMMANDS.items()
    }
    values = read_config(tmp_path / "mmfeat.toml", known)
    assert values["extract"] == {
        "data": "tweets", "cache": "store/cache", "encoders": "clip,bert", "outputs": "pooled,tokens"
    }  # fmt: skip
    assert (values["heads"]["seeds"], values["cache-verify"]["parity"]) == (5, 20)
    small, dino = "st:BAAI/bge-small-en-v1.5", "timm:vit_small_patch14_dinov2.lvd142m"
    assert read_config(tmp_path / "tables.toml", known)["heads"] == {
        "data": "tweets",
        "encoders": f"{small},{dino},clip",
        "max_length": f"64,{small}=256",
        "prompt": f"{small}=query",
        "image_size": f"{dino}=336",
        "image_pooling": f"{dino}=cls+mean",
    }


def complete(words: str, number: int) -> list[str]:
    """What the shell is offered for the word of this number."""
    asked = {"_MMFEAT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    answer = CliRunner().invoke(app, [], prog_name="mmfeat", env=asked)
    return answer.output.split()


def test_tab_completes_commands_and_flags() -> None:
    assert complete("mmfeat ", 1) == list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    assert complete("mmfeat he", 1) == ["heads"]
    assert complete("mmfeat cache ", 2) == [name.split()[1] for name in COMMANDS if name.startswith("cache ")]
    assert complete("mmfeat heads --fu", 2) == ["--fusion"]
    offered = set(complete("mmfeat extract --", 2))
    assert names_of("extract") <= offered <= names_of("extract") | ROOT_FLAGS


def test_completion_is_offered_by_the_installed_command() -> None:
    """The entry point as a real process, under the name that a shell knows."""
    code = "import sys; sys.argv[0] = 'mmfeat'; from mmfeat.cli.main import main; main()"
    asked = {"_MMFEAT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "mmfeat su"}
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=120)
    assert '"submit"' in answer.stdout
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


def test_a_command_that_takes_names_of_columns_takes_all_flags_of_reading() -> None:
    for name, command in COMMANDS.items():
        flags = {option for parameter in command.params for option in parameter.opts}
        if "--columns" in flags:
            assert {f"--{parameter.replace('_', '-')}" for parameter in READING_PARAMETERS} <= flags, name

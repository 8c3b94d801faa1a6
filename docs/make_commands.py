"""Write the reference of all commands into docs/commands.md, from what the command line itself says.

python docs/make_commands.py            # after a command or flag was added or changed
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mmfeat.cli.main import app

PAGE = Path(__file__).parent / "commands.md"
WIDTH = 118
MANY = "[]."  # around and behind the name of an argument: [RUN]...
BEGIN = "<!-- made by docs/make_commands.py: do not edit below -->"


def commands() -> dict[str, Any]:
    """Name ("cache ls") -> command, in the order of `mmfeat --help`."""
    return dict(_walk(typer.main.get_command(app), ""))


def flags(command: Any) -> list[Any]:
    """The options of a command but --help, in the order of its help."""
    return [each for each in command.params if each.param_type_name == "option"]


def spelled(option: Any) -> str:
    """`--group/--no-group`, `--seeds`."""
    return "/".join([*option.opts, *option.secondary_opts])


def page(before: str) -> str:
    """The page: what stands `before` the marker, then every command."""
    parts = [before.rstrip() + f"\n\n{BEGIN}\n"]
    for name, command in commands().items():
        parts.append(_section(name, command))
    return "\n".join(parts)


def _walk(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _walk(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def _section(name: str, command: Any) -> str:
    purpose, _, example = inspect.cleandoc(command.help or "").partition("\b\n")
    lines = [
        f"### mmfeat {name}",
        "",
        *textwrap.wrap(" ".join(purpose.split()), WIDTH),
        "",
        "```console",
        example.strip(),
        "```",
        "",
    ]
    lines += ["| flag | meaning | default |", "| --- | --- | --- |"]
    for each in command.params:
        lines.append(f"| {_named(each)} | {_cell(_meaning(each))} | {_default(each)} |")
    return "\n".join(lines) + "\n"


def _named(each: Any) -> str:
    if each.param_type_name == "argument":
        return f"`{(each.metavar or each.name.upper()).strip(MANY)}`"
    return f"`{spelled(each)}`"


def _meaning(each: Any) -> str:
    return re.sub(r"\s*\[default: .*\]", "", getattr(each, "help", None) or "")


def _default(each: Any) -> str:
    told = re.search(r"\[default: (.*)\]", getattr(each, "help", None) or "")
    if told:
        return _cell(told.group(1))
    if each.required:
        return "needed"
    if each.default is None or each.default is False:
        return "no" if each.default is False else ""
    if each.default is True:
        return "yes"
    return f"`{each.default}`" if str(each.default) else "none"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text().partition(BEGIN)[0]))
    print(f"wrote {PAGE}")

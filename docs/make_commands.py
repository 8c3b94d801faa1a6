"""Write the reference of all commands into docs/commands.md, from the help texts of the command line, and the terms of
the report into docs/glossary.md.

python docs/make_commands.py            # after a command, flag or term was added or changed
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mmfeat.cli.main import app

PAGE = Path(__file__).parent / "commands.md"
GLOSSARY = PAGE.with_name("glossary.md")
TERMS = PAGE.parent.parent / "mmfeat/report/templates/glossary.json"
WIDTH = 118
MANY = "[]."  # characters around and after the name of an argument, as in [RUN]...
SHARED = 2  # commands with equal rows of a flag, which then stand in one table
SHARED_TITLE = "Flags of several commands"
TABLE = ["| flag | meaning | default |", "| --- | --- | --- |"]
BEGIN = "<!-- made by docs/make_commands.py: do not edit below -->"


def commands() -> dict[str, Any]:
    """Map names such as "cache ls" to commands, in the order of `mmfeat --help`."""
    return dict(_walk(typer.main.get_command(app), ""))


def flags(command: Any) -> list[Any]:
    """Return the options of a command, without --help, in the order of its help."""
    return [parameter for parameter in command.params if parameter.param_type_name == "option"]


def spelled(option: Any) -> str:
    """Return the name of an option with its opposite, as in `--group/--no-group`."""
    return "/".join([*option.opts, *option.secondary_opts])


def page(before: str) -> str:
    """Return the page: the text `before` the marker, then a section for every command."""
    rows = {name: [_row(each) for each in command.params] for name, command in commands().items()}
    counts = Counter(row for each in rows.values() for row in each)
    often = sorted((row for row in counts if counts[row] >= SHARED), key=counts.__getitem__)
    usual = {row.split(" | ")[0]: row for row in often}  # of a flag with several meanings the most frequent one
    shared = [row for row in counts if row in usual.values()]
    parts = [before.rstrip() + f"\n\n{BEGIN}\n", f"### {SHARED_TITLE}\n", *TABLE, *shared, ""]
    for name, command in commands().items():
        parts += [*_opening(name, command), *_flags(rows[name], shared), ""]
    return "\n".join(parts)


def glossary(before: str) -> str:
    """Return the page: the text `before` the marker, then every term that the report explains."""
    terms = json.loads(TERMS.read_text(encoding="utf-8")).items()
    lines = [textwrap.fill(f"- **{term}**: {meaning}", WIDTH, subsequent_indent="  ") for term, meaning in terms]
    return "\n".join([before.rstrip() + f"\n\n{BEGIN}\n", *lines, ""])


def _walk(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _walk(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def _opening(name: str, command: Any) -> list[str]:
    purpose, _, example = inspect.cleandoc(command.help or "").partition("\b\n")
    wrapped = textwrap.wrap(" ".join(purpose.split()), WIDTH)
    return [f"### mmfeat {name}", "", *wrapped, "", "```console", example.strip(), "```", ""]


def _flags(rows: list[str], shared: list[str]) -> list[str]:
    """The table of the rows that few commands have, and the names of the others."""
    own = [row for row in rows if row not in shared]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows if row in shared]
    link = f"[{SHARED_TITLE[0].lower()}{SHARED_TITLE[1:]}](#{SHARED_TITLE.lower().replace(' ', '-')})"
    others = textwrap.wrap(f"And {link}: {', '.join(names)}", WIDTH, break_on_hyphens=False) if names else []
    return [*(TABLE if own else []), *own, *([""] if own and names else []), *others]


def _row(parameter: Any) -> str:
    return f"| {_named(parameter)} | {_cell(_meaning(parameter))} | {_default(parameter)} |"


def _named(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name.upper()).strip(MANY)}`"
    return f"`{spelled(parameter)}`"


def _meaning(parameter: Any) -> str:
    return re.sub(r"\s*\[default: .*\]", "", getattr(parameter, "help", None) or "")


def _default(parameter: Any) -> str:
    if written := re.search(r"\[default: (.*)\]", getattr(parameter, "help", None) or ""):
        return _cell(written.group(1))
    if parameter.required:
        return "needed"
    if isinstance(parameter.default, bool):
        return "yes" if parameter.default else "no"
    if parameter.default is None:
        return ""
    return f"`{parameter.default}`" if str(parameter.default) else "none"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for path, write in ((PAGE, page), (GLOSSARY, glossary)):
        path.write_text(write(path.read_text().partition(BEGIN)[0]))
        print(f"wrote {path}")

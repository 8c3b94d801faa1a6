"""A command as a user types it, in this process, which has imported what the command needs."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner, Result

from mmfeat.cli.main import _global_flags_first, app


def invoke(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(app, _global_flags_first([*map(str, arguments)]), **options)

"""Trials: one set of settings of one head, as the two files `PATH.json` and `PATH.safetensors`."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmfeat.errors import RunError
from mmfeat.system.files import canonical_json, file_sha256, read_json


def read_trial(path: Path) -> dict[str, Any]:
    """Read `PATH.json`, all of a trial but its logits. Raises `RunError` if either file is not what was saved."""
    file = path.with_name(f"{path.name}.safetensors")
    with whole_trial(path):
        values: dict[str, Any] = read_json(path.with_name(f"{path.name}.json"))
        if values.pop("sha256") != trial_checksum(values, file):
            raise ValueError(f"it or {file.name} is not what was saved")
        return values


@contextlib.contextmanager
def whole_trial(path: Path) -> Iterator[None]:
    """Raise any error in reading the trial `path` as a `RunError`."""
    try:
        yield
    except Exception as error:  # safetensors has no exception for a damaged file
        raise RunError(f"{path}.json: not a whole trial ({error}); delete it and run mmfeat heads again") from error


def trial_checksum(record: Mapping[str, Any], file: Path) -> str:
    """SHA-256 of a trial's record and the file of its logits together."""
    return hashlib.sha256(f"{canonical_json(record)}{file_sha256(file)}".encode()).hexdigest()

"""The identity of weights: equal for two copies of a model, in whatever folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmfeat.errors import EncoderError, HubError
from mmfeat.system.files import file_sha256
from mmfeat.system.wording import counted

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
ROOTS = ("config.json", "open_clip_config.json")  # the files of which a repository has one or both
_ASIDE = (".md", ".png", ".jpg")  # any other file of a model folder may change a vector
MODULES = "modules.json"  # a checkpoint with this file has a pooling of its own, by sentence-transformers
_LFS = b"version https://git-lfs"
_SHAPES = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)")
_UNKNOWN = re.compile(r"model type `(\S+)` but Transformers does not recognize")
CUT = "a file is cut short, or of another format than its name says"
# What safetensors and torch say of a file that is cut short or of another format.
_BROKEN = (
    "deserializing header",
    "PytorchStreamReader",
    "HeaderTo",
    "MetadataIncomplete",
    "InvalidHeader",
    "out of input",
)
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})/")


def path_identity(path: Path, deep: bool = False) -> str:
    """`sha256:...` of a local weights file, or of all model files of a folder; `deep` counts inner folders, too."""
    if path.is_file():
        _check_present(path)
        return f"sha256:{file_sha256(path)}"
    entries = {file: file.relative_to(path).parts for file in (path.rglob("*") if deep else path.iterdir())}
    files = sorted(
        file
        for file, parts in entries.items()
        if file.suffix not in _ASIDE and file.is_file() and not any(part.startswith(".") for part in parts)
    )
    if not any(file.suffix in _WEIGHTS for file in files):
        others = any(file.suffix in (".h5", ".msgpack") for file in files)
        remedy = "those of TensorFlow and Flax are not read" if others else "name a model folder"
        raise EncoderError(f"{path}: no weights (*.safetensors, *.bin, *.pt) in this folder; {remedy}")
    digest = hashlib.sha256()
    for file in files:
        _check_present(file)
        digest.update(f"{'/'.join(entries[file])}\0{file_sha256(file)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _check_present(file: Path) -> None:
    """Raise `EncoderError` for a file that stands for another one, and for a list of parts that lacks a part."""
    with file.open("rb") as opened:
        start = opened.read(len(_LFS))
    if start == _LFS:
        raise EncoderError(f"{file}: a pointer of Git LFS and not the file itself; run git lfs pull in its folder")
    if file.name.endswith(".index.json"):
        with contextlib.suppress(ValueError, AttributeError, TypeError):  # no list of parts of weights
            parts = sorted({str(part) for part in json.loads(file.read_bytes())["weight_map"].values()})
            if lost := [part for part in parts if not (file.parent / part).is_file()]:
                raise EncoderError(
                    f"{file.parent}: {len(lost)} of {len(parts)} files of weights are missing, the first is {lost[0]}; "
                    "copy all of them"
                )


def checkpoint_json(variant: str, name: str) -> Any:
    """The content of a JSON file of a checkpoint, a local folder or a hub name; None where there is no such file."""
    path = _checkpoint_file(variant, name)
    try:
        return None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path}: not JSON ({error}); use a complete checkpoint") from error


def has_file(variant: str, name: str) -> bool:
    """Whether a checkpoint, a local folder or a hub name, has this file."""
    return _checkpoint_file(variant, name) is not None


def _checkpoint_file(variant: str, name: str) -> Path | None:
    folder = local_path(variant)
    path = folder / name if folder else hub_file(variant, name)
    return path if path is not None and path.is_file() else None


def checkpoint_modules(variant: str) -> list[dict[str, str]]:
    """The modules of a checkpoint of sentence-transformers, [] for another one.

    Raises `EncoderError` for a damaged list and for a module whose path leaves the checkpoint.
    """
    modules = checkpoint_json(variant, MODULES) or []
    try:
        for module in modules:
            path = PurePosixPath(module["path"])
            if not isinstance(module["type"], str) or path.is_absolute() or ".." in path.parts:
                raise ValueError(module["path"])
    except (TypeError, KeyError, ValueError) as error:
        raise EncoderError(
            f"{variant}: {MODULES} is no list of modules ({error}); use a complete checkpoint"
        ) from error
    return list(modules)


def downloaded_identity(path: str) -> str:
    """The identity of a file that a hub client downloaded: its resolved revision, else its hash."""
    match = _SNAPSHOT.search(Path(path).as_posix())
    return f"revision:{match[1]}" if match else path_identity(Path(path))


def hub_revision(name: str, file: str = "config.json") -> str:
    """The commit that a Hugging Face model name stands for now; without the hub, the cached commit."""
    path = hub_file(name, file)
    if path and (match := _SNAPSHOT.search(path.as_posix())):
        return match[1]
    raise HubError(f"{name}: {path} tells no revision; name a local folder instead, FAMILY:FOLDER")


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A small file of a Hugging Face model, from its cache or downloaded; None where the model has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub_errors(name):
        try:
            return Path(hf_hub_download(name, file, revision=revision))
        except LocalEntryNotFoundError:  # without the hub, a model of which other files are cached has no such file
            if file == "config.json" or not any(cached_files(name, ROOTS, revision)):
                raise
        except EntryNotFoundError:
            pass
    return None


def cached_files(name: str, files: Iterable[str], revision: str | None = None) -> Iterator[Path]:
    """Those of the files of a Hugging Face model that are in the cache of the hub."""
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(name, file, revision=revision) for file in files)
    return (Path(path) for path in paths if isinstance(path, str))


def load_reason(error: Exception) -> str:
    """The reason of a failed load, short and in one line, of the many errors of the libraries."""
    text = str(error)
    if "state_dict" in text:
        return _apart(text)
    if "TorchScript" in text:
        return "a TorchScript archive, whose code is not run; save its state_dict to a file"
    if "weights_only" in text:  # torch advises to load the file unsafely
        return "not a plain state dict, or not whole"
    if "trust_remote_code" in text:
        return "it needs code of the checkpoint"
    if unknown := _UNKNOWN.search(text):
        return f"transformers has no model type {unknown[1]}; a newer one may have it"
    if any(mark in text for mark in _BROKEN):
        return CUT
    if isinstance(error, KeyError):
        return f"there is no {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error, 240)


def one_line(error: Exception, longest: int = 160) -> str:
    """The text of an error in one line, else its kind."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def _apart(text: str) -> str:
    """How weights differ from a model, from torch's long list."""
    reasons = []
    for mark, fault in (("Missing key", "missing"), ("Unexpected key", "not of this model")):
        names = [name for line in text.splitlines() if mark in line for name in re.findall(r'"([^"]+)"', line)]
        reasons += [f"{counted(len(names), 'tensor')} {fault}, the first is {names[0]}"] if names else []
    if shapes := _SHAPES.findall(text):
        name, given, wanted = shapes[0]
        reasons.append(f"{counted(len(shapes), 'tensor')} of another shape, the first is {name}: {given} for {wanted}")
    return "; ".join(reasons) or " ".join(text.split())[:240]


def load_errors(asked: str, is_local: bool = True) -> contextlib.AbstractContextManager[None]:
    """One line for the error of a load, from local files or from the hub."""
    return _file_errors(asked) if is_local else hub_errors(asked)


@contextlib.contextmanager
def _file_errors(asked: str) -> Iterator[None]:
    """Raise a one-line `EncoderError` for weights that do not fit their model or cannot be read; keep warnings away."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except EncoderError:
        raise
    except Exception as error:  # each file format has errors of its own
        raise EncoderError(
            f"{asked}: cannot be loaded ({load_reason(error)}); check the path and that the weights are complete"
        ) from error


@contextlib.contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """The messages that a library's logger gives inside the context, from INFO on, in place of printing them."""
    logger, lines, handler = logging.getLogger(name), list[str](), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


@contextlib.contextmanager
def hub_errors(asked: str) -> Iterator[None]:
    """Turn any error of a hub client into a one-line `HubError` that names a remedy."""
    reachable = _use_local_hub_files_if_unreachable()
    try:
        yield
    except EncoderError:
        raise
    except Exception as error:  # each file format has errors of its own
        plain = isinstance(error, OSError | RuntimeError | ValueError) and "state_dict" not in str(error)
        reason = load_reason(error)
        if not plain or reason == CUT:
            raise EncoderError(f"{asked}: cannot be loaded ({reason}); use a complete checkpoint") from error
        reason = reason[:160] if reachable else "it cannot be reached and has not been cached"
        raise HubError(
            f"{asked}: the model hub gave no weights ({reason}); connect, or name a local folder or file "
            "instead (FAMILY:PATH), or use the built-in encoders: --encoders hashing,hog"
        ) from error


@functools.cache
def _use_local_hub_files_if_unreachable() -> bool:
    """Whether the hub answers; if not, its clients are set offline, because they retry for a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        constants.HF_HUB_OFFLINE = True
        return False


def local_path(variant: str) -> Path | None:
    """The local file or folder that `variant` names, or None for a hub name.

    Raises `EncoderError` for a variant that can only be a path and does not exist.
    """
    path = Path(variant).expanduser()
    if variant and os.path.exists(path):  # False for a name too long to be one, too
        return path
    if variant.startswith((".", "/", "~")):
        raise EncoderError(f"{variant}: no such weights file or folder; check the path after the encoder's family")
    return None

"""Code that a checkpoint brings along: it runs only where the user says so, each time anew."""

from __future__ import annotations

from typing import Any

from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.weights import checkpoint_json
from mmfeat.errors import EncoderError
from mmfeat.system.trust import is_trusted

_FILES = ("config.json", "tokenizer_config.json")


def own_code(asked: str, variant: str, folder: str = "") -> int:
    """1 where code of a checkpoint will run, 0 where the library's own code or none is needed.

    `folder` is the place of `config.json` in the checkpoint, "" or a name and a slash. Raises `EncoderError` where code
    is needed that the user does not trust, or that lies in another repository.
    """
    settings = {name: checkpoint_json(variant, f"{folder}{name}") for name in _FILES}
    references = {name: found for name in settings if (found := _references(settings[name]))}
    if not references:
        return 0
    named = [reference for found in references.values() for reference in found]
    elsewhere = [reference.partition("--")[0] for reference in named if "--" in reference]
    if is_trusted() and not elsewhere:
        return 1
    kind, tokenizer = _entry(settings["config.json"], "model_type"), _entry(settings[_FILES[1]], "tokenizer_class")
    if all(_is_known(name, kind, tokenizer) for name in references):
        return 0
    if elsewhere:
        raise EncoderError(
            f"{asked}: its code is in another repository, {elsewhere[0]}, and may change there; copy its .py files "
            "beside the weights, and name them in auto_map without the repository"
        )
    raise needed(asked, f"{named[0].partition('.')[0]}.py")


def needed(asked: str, code: str) -> EncoderError:
    """The error for code that the user does not trust."""
    return EncoderError(f"{asked}: the checkpoint needs code of its own, {code}; read it, then add --trust-remote-code")


def runs_code(asked: str, spec: EncoderSpec) -> bool:
    """Whether a load may run code of the checkpoint. Raises `EncoderError` for a spec that needs it without consent."""
    if spec.remote_code and not is_trusted():
        raise needed(asked, "*.py")
    return bool(spec.remote_code)


def _references(settings: Any) -> list[str]:
    """The classes in files of the checkpoint that one of its settings files names."""
    named = settings.get("auto_map") if isinstance(settings, dict) else None
    values = list(named.values()) if isinstance(named, dict) else [named]
    flat = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    return [entry for entry in flat if isinstance(entry, str)]


def _entry(settings: Any, name: str) -> str:
    value = settings.get(name) if isinstance(settings, dict) else ""
    return value if isinstance(value, str) else ""


def _is_known(file: str, model_type: str, tokenizer_class: str) -> bool:
    """Whether transformers itself has what a settings file names code for."""
    from mmfeat.encoders.bert import quiet_transformers

    models = quiet_transformers().CONFIG_MAPPING
    if file == "tokenizer_config.json":
        from transformers.models.auto import tokenization_auto as auto

        has_class = bool(tokenizer_class) and auto.tokenizer_class_from_name(tokenizer_class) is not None
        return model_type in auto.TOKENIZER_MAPPING_NAMES or has_class
    return model_type in models

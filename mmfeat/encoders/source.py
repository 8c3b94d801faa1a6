"""A checkpoint that transformers loads: where it lies, what its load needs, and why it cannot be encoded with.

Code that a checkpoint brings along runs only where the user says so, each time anew.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmfeat.encoders.names import remedy_for
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.weights import (
    checkpoint_json,
    checkpoint_modules,
    hub_revision,
    load_errors,
    local_path,
    logged,
    path_identity,
)
from mmfeat.errors import EncoderError
from mmfeat.system.trust import is_trusted

# A row of its report, where layers with the same fault share one: encoder.layer.{0, 1}.output.bias | MISSING
_LACKING = re.compile(r"^(?:\x1b\[\S*?m)*(\w[\w.{, }]*?)\s*\|.*?(MISSING|MISMATCH)", re.MULTILINE)
# An attention of transformers that lies in a repository of the hub, by whichever entry of a config.json names it.
_KERNEL = re.compile(r'implementation\w*": (?:\{[^}]*: )?"([^"]*/[^"]*)"')
_CODE_FILES = ("config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint of transformers: `variant` is a local folder or a name on the hub."""

    family: str
    variant: str

    @property
    def name(self) -> str:
        """The request that names the checkpoint."""
        return f"{self.family}:{self.variant}"

    @property
    def place(self) -> str:
        """The first argument of `from_pretrained`: a folder or a hub name."""
        return str(local_path(self.variant) or self.variant)

    def identity(self, deep: bool) -> dict[str, Any]:
        """The `variant` and the `weights` of a spec; `deep` counts the files of inner folders of a folder, too."""
        folder = local_path(self.variant)
        if folder is None:
            return {"variant": self.variant, "weights": f"revision:{hub_revision(self.variant)}"}
        return {"variant": folder.resolve().name, "weights": path_identity(folder, deep)}

    def pinned(self, spec: EncoderSpec) -> dict[str, Any]:
        """Arguments of every `from_pretrained`: the revision in the spec, and whether the checkpoint's code may run.

        Raises `EncoderError` for a spec that needs such code without the user's consent.
        """
        if spec.remote_code and not is_trusted():
            raise needed(self.name, "*.py")
        kind, _, revision = spec.weights.partition(":")
        revisions = {"revision": revision} if kind == "revision" else {}
        return {"trust_remote_code": bool(spec.remote_code), **revisions}

    def load_errors(self) -> contextlib.AbstractContextManager[None]:
        return load_errors(self.name, is_local=local_path(self.variant) is not None)

    def read_config(self, folder: str = "") -> dict[str, Any]:
        """The content of `config.json`, {} where there is none."""
        config = checkpoint_json(self.variant, f"{folder}config.json")
        return config if isinstance(config, dict) else {}

    def kind_of(self, config: Mapping[str, Any]) -> str:
        """transformers' name for the kind of model. Raises `EncoderError` for a configuration without one."""
        if not isinstance(kind := config.get("model_type"), str):
            remedy = remedy_for(self.variant, self.family) or "; name a folder as save_pretrained writes it"
            raise EncoderError(f"{self.name}: no config.json of transformers, with a model_type, is here{remedy}")
        return kind

    def check_form(self, folder: str = "") -> None:
        """Raise `EncoderError` for an adapter, quantised weights, a configuration without a model type, and code of the
        hub for its attention.

        `folder` is the place of `config.json` in the checkpoint, "" or a name and a slash.
        """
        if isinstance(adapter := checkpoint_json(self.variant, f"{folder}adapter_config.json"), dict):
            kind, base = adapter.get("peft_type", "LORA"), adapter.get("base_model_name_or_path") or "another model"
            raise EncoderError(
                f"{self.name}: an adapter ({kind}) and no model: merge it into {base} by peft's merge_and_unload, save "
                "that with its tokenizer, and name the new folder"
            )
        config = self.read_config(folder)
        if self.family != "st" or not checkpoint_modules(self.variant):
            self.kind_of(config)
        if kernel := _KERNEL.search(json.dumps(config)):
            raise EncoderError(
                f"{self.name}: its config.json would run code of {kernel[1]} on the hub; remove the entry that names it"
            )
        if isinstance(quantised := config.get("quantization_config"), dict):
            method = quantised.get("quant_method", "some method")
            raise EncoderError(
                f"{self.name}: its weights are quantised ({method}); name the checkpoint that they were made of"
            )

    def of_pictures(self, kind: str) -> EncoderError:
        return EncoderError(f"{self.name}: {kind} is a model of pictures and no text encoder; name hf:{self.variant}")

    def check_complete(self, missing: list[str], mismatched: Any, remedy: str = "") -> None:
        """Raise `EncoderError` where weights are missing or of another shape, so that they would be random."""
        for reason, names in (("lack", missing), ("are of another shape than config.json says:", mismatched)):
            if keys := sorted({name if isinstance(name, str) else name[0] for name in names}):
                raise EncoderError(
                    f"{self.name}: the weights {reason} {', '.join(keys[:3])}; use a complete checkpoint{remedy}"
                )

    @contextlib.contextmanager
    def refuse_random(self) -> Iterator[None]:
        """Raise `EncoderError` where transformers makes up weights inside the context, of which it only warns."""
        try:
            with logged("transformers.modeling_utils") as lines:
                yield
        finally:  # the library reports before it raises
            found = [match for line in lines for match in _LACKING.findall(line)]
            missing = [name for name, fault in found if fault == "MISSING" and not name.startswith("pooler.")]
            self.check_complete(missing, [name for name, fault in found if fault == "MISMATCH"])


def own_code(asked: str, variant: str, folder: str = "") -> int:
    """1 where code of a checkpoint will run, 0 where the library's own code or none is needed.

    `folder` is the place of `config.json` in the checkpoint, "" or a name and a slash. Raises `EncoderError` where code
    is needed that the user does not trust, or that lies in another repository.
    """
    settings = {name: checkpoint_json(variant, f"{folder}{name}") for name in _CODE_FILES}
    references = {name: found for name in settings if (found := _references(settings[name]))}
    if not references:
        return 0
    named = [reference for found in references.values() for reference in found]
    elsewhere = [reference.partition("--")[0] for reference in named if "--" in reference]
    if is_trusted() and not elsewhere:
        return 1
    kind, tokenizer = _entry(settings["config.json"], "model_type"), _entry(settings[_CODE_FILES[1]], "tokenizer_class")
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

"""Text checkpoints that cannot be encoded with as they are: each is refused in one line before anything is loaded."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from mmfeat.encoders.weights import checkpoint_json
from mmfeat.errors import EncoderError

# A row of its report, where layers with the same fault share one: encoder.layer.{0, 1}.output.bias | MISSING
_LACKING = re.compile(r"^(?:\x1b\[\S*?m)*(\w[\w.{, }]*?)\s*\|.*?(MISSING|MISMATCH)", re.MULTILINE)


def check_form(asked: str, variant: str, folder: str = "") -> None:
    """Raise `EncoderError` for an adapter and for quantised weights.

    `folder` is the place of `config.json` in the checkpoint, "" or a name and a slash.
    """
    if isinstance(adapter := checkpoint_json(variant, f"{folder}adapter_config.json"), dict):
        kind, base = adapter.get("peft_type", "LORA"), adapter.get("base_model_name_or_path") or "another model"
        raise EncoderError(
            f"{asked}: an adapter ({kind}) and no model: merge it into {base} by peft's merge_and_unload, save that "
            "with its tokenizer, and name the new folder"
        )
    config = checkpoint_json(variant, f"{folder}config.json")
    if not isinstance(config, dict):
        return
    if isinstance(quantised := config.get("quantization_config"), dict):
        method = quantised.get("quant_method", "some method")
        raise EncoderError(f"{asked}: its weights are quantised ({method}); name the checkpoint that they were made of")


def check_reads(asked: str, config: Any) -> None:
    """Raise `EncoderError` for a configuration of transformers whose model takes pictures."""
    from mmfeat.encoders.names import takes_pictures

    if takes_pictures(config.model_type):
        remedy = f"name hf:{asked.partition(':')[2]}"
        raise EncoderError(f"{asked}: {config.model_type} is a model of pictures and no text encoder; {remedy}")


def check_complete(asked: str, missing: list[str], mismatched: Any, remedy: str = "") -> None:
    """Raise `EncoderError` where weights are missing or of another shape: they would be random, as their vectors."""
    for reason, names in (("lack", missing), ("are of another shape than config.json says:", mismatched)):
        if keys := sorted({name if isinstance(name, str) else name[0] for name in names}):
            raise EncoderError(
                f"{asked}: the weights {reason} {', '.join(keys[:3])}; use a complete checkpoint{remedy}"
            )


@contextlib.contextmanager
def refuse_random(asked: str) -> Iterator[None]:
    """Raise `EncoderError` where transformers makes up weights inside the context, of which it only warns."""
    logger, lines = logging.getLogger("transformers.modeling_utils"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        found = [match for line in lines for match in _LACKING.findall(line)]
        missing = [name for name, fault in found if fault == "MISSING" and not name.startswith("pooler.")]
        check_complete(asked, missing, [name for name, fault in found if fault == "MISMATCH"])

"""Tokenizers of checkpoints of transformers and sentence-transformers."""

from __future__ import annotations

import json
from typing import Any

from mmfeat.encoders.weights import checkpoint_json, checkpoint_modules, has_file

PROBE = "Capital"


def is_cased(variant: str) -> bool:
    """Whether capitals of a text reach the model of a hub name or local folder, by its tokenizer files alone.

    A checkpoint that leaves this open counts as cased: to keep capitals changes nothing where the tokenizer drops them.
    """
    modules = checkpoint_modules(variant)
    folder = f"{modules[0]['path']}/" if modules and modules[0]["path"] else ""
    if _setting(variant, f"{folder}sentence_bert_config.json"):
        return False
    if _setting(variant, f"{folder}tokenizer_config.json") is False:
        return True
    if tokenizer := checkpoint_json(variant, f"{folder}tokenizer.json"):
        return not isinstance(tokenizer, dict) or not _lowers(tokenizer.get("normalizer"))
    # The vocabulary of BERT alone: its tokenizer drops capitals by default. Those with codes of their own keep them.
    return not has_file(variant, f"{folder}vocab.txt") or has_file(variant, f"{folder}bpe.codes")


def _setting(variant: str, file: str) -> Any:
    settings = checkpoint_json(variant, file)
    return settings.get("do_lower_case") if isinstance(settings, dict) else None


def _lowers(normalizer: Any) -> bool:
    """Whether the normalizer of a `tokenizer.json` makes capitals small; False for one that cannot be read."""
    import tokenizers

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    try:
        alone = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "normalizer": normalizer, "model": empty}))
    except Exception:  # the library raises plain exceptions, and loading the tokenizer will say more
        return False
    return alone.normalizer is not None and alone.normalizer.normalize_str(PROBE).islower()

"""Text encoders through transformers' AutoModel. Variants: a hub name or a local folder."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmfeat.encoders.spec import Encoder, EncoderOptions, EncoderSpec
from mmfeat.encoders.torch_tower import load_errors, to_numpy
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.encoders.weights import hub_errors, hub_revision, local_path, path_identity
from mmfeat.errors import EncoderError
from mmfeat.texts import CLEANING

DEFAULT_VARIANT = "bert-base-uncased"


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of the one text tower."""
    variant = variant or DEFAULT_VARIANT
    folder = local_path(variant)
    return [
        EncoderSpec(
            family="bert",
            modality="text",
            variant=folder.resolve().name if folder else variant,
            weights=path_identity(folder) if folder else f"revision:{hub_revision(variant)}",
            cleaning=options.cleaning,
            pooling=options.pooling,
            max_length=options.max_length,
            arithmetic=options.dtype,
            storage=options.storage,
        )
    ]


def load(variant: str, specs: list[EncoderSpec], device: str) -> list[Encoder]:
    """Tokenizer and model by `from_pretrained`; a batch is padded to its own longest text."""
    (spec,) = specs
    tokenizer, model = _from_pretrained(variant or DEFAULT_VARIANT, spec)
    clean = CLEANING[spec.cleaning]
    model = model.eval().requires_grad_(False)

    import torch

    model.to(device=device, dtype=getattr(torch, spec.arithmetic))

    def prepare(text: str) -> dict[str, Any]:
        return dict(tokenizer(clean(text), truncation=True, max_length=spec.max_length))

    def embed(batch: list[dict[str, Any]]) -> np.ndarray:
        inputs = tokenizer.pad(batch, return_tensors="pt").to(device)
        with torch.inference_mode():
            return to_numpy(pool(model(**inputs), inputs["attention_mask"], spec.pooling))

    return [Encoder(spec, prepare, embed)]


def pool(output: Any, mask: Any, pooling: str) -> Any:
    """(B, D) from a model output: mean over the (B, T) mask, first token, or the model's pooler."""
    if pooling == "pooler":
        return output.pooler_output
    hidden = output.last_hidden_state.float()
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).float()
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _from_pretrained(variant: str, spec: EncoderSpec) -> tuple[Any, Any]:
    import_torchvision()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind, _, revision = spec.weights.partition(":")
    pinned = {"revision": revision} if kind == "revision" else {}
    folder = local_path(variant)
    name = str(folder or variant)
    with load_errors(f"bert:{variant}") if folder else hub_errors(f"bert:{variant}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **pinned)
        model, info = transformers.AutoModel.from_pretrained(name, output_loading_info=True, **pinned)
        _check_complete(variant, spec, info["missing_keys"])
        _check_options(variant, spec, tokenizer, model)
    return tokenizer, model


def _check_options(variant: str, spec: EncoderSpec, tokenizer: Any, model: Any) -> None:
    """What the model cannot do is refused before the first text, not in the middle."""
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", spec.max_length))
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if not shortest <= spec.max_length <= longest:
        raise EncoderError(f"bert:{variant}: --max-length {spec.max_length} is not from {shortest} to {longest}")
    if spec.pooling == "pooler" and getattr(model, "pooler", None) is None:
        raise EncoderError(f"bert:{variant}: this model has no pooler; use --pooling mean or cls")


def _check_complete(variant: str, spec: EncoderSpec, missing: Any) -> None:
    """Weights that the files lack are random, and random vectors must never be cached."""
    missing = [key for key in missing if spec.pooling == "pooler" or not key.startswith("pooler.")]
    if missing:
        raise EncoderError(
            f"bert:{variant}: the weights lack {', '.join(sorted(missing)[:3])}; use a complete checkpoint"
            + (" or --pooling mean" if spec.pooling == "pooler" else "")
        )

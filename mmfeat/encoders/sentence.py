"""Text encoders through sentence-transformers, by all that a checkpoint says: pooling, Dense, prompts, length.

Variants: a hub name or a local folder. A checkpoint without `modules.json` has mean pooling, as the library has it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.bert import model_layers, quiet_transformers
from mmfeat.encoders.layers import Network, Point, check_layers
from mmfeat.encoders.source import Source, needed, own_code
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.tokenizer import Text, check_files, check_fit, cuts_of, text_folder, tokenizer_errors, watch_cuts
from mmfeat.encoders.torch_tower import TorchTower, without_padding
from mmfeat.encoders.weights import MODULES, checkpoint_json, checkpoint_modules
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.samples.contents import CLEANING
from mmfeat.system.files import canonical_json
from mmfeat.system.trust import is_trusted

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

LIBRARY = "sentence_transformers."  # a module of any other name is code of the checkpoint
NO_PROMPT = "none"


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of the one text tower; only the settings of the checkpoint are read, no weights."""
    if not variant:
        raise EncoderError("st: name a checkpoint, as in st:sentence-transformers/all-MiniLM-L6-v2 or st:FOLDER")
    source = Source("st", variant)
    source.check_form(text_folder(variant))
    code = _own_code(variant)
    prompt = _prompt(variant, options.prompt, checkpoint_json(variant, "config_sentence_transformers.json") or {})
    recipe = {"prompt": prompt, "truncate_dim": options.truncate_dim}
    return [
        EncoderSpec(
            family="st",
            modality="text",
            **source.identity(deep=True),
            preprocessing=canonical_json({name: value for name, value in recipe.items() if value}),
            cleaning=options.cleaning,
            max_length=int(options.max_length),
            **options.of_model,
            remote_code=code,
        )
    ]


def open_towers(variant: str, specs: list[EncoderSpec]) -> list[TorchTower]:
    """The model by `SentenceTransformer`, which tokenizes and pads each batch itself."""
    import torch

    spec = next((spec for spec in specs if spec.output == "pooled"), specs[0])
    model, clean = _model(variant, spec), CLEANING[spec.cleaning]
    length = _counted(getattr(model[0], "tokenizer", None))
    check, cuts = _check_tokenizer(variant, model), watch_cuts(getattr(model[0], "tokenizer", None))
    recipe = json.loads(spec.preprocessing or "{}")
    prompt, width = recipe.get("prompt") or None, recipe.get("truncate_dim")
    constants = {name: value for name, value in _tokenized(model, [""], prompt).items() if not hasattr(value, "shape")}
    layers = model_layers(model.transformers_model) if model.transformers_model is not None else []

    def prepare(text: str) -> Text:
        text = clean(text)
        check(text)
        prepared = Text(text)
        prepared.length = length(text)
        return prepared

    def collate(texts: list[Text]) -> dict[str, Tensor]:
        tokenized = _tokenized(model, list(map(str, texts)), prompt)
        for text, cut in zip(texts, cuts, strict=False):
            text.cut = cut
        return {name: value for name, value in tokenized.items() if name not in constants}

    tokens = torch.nn.Identity()  # the library calls no module whose output would be the tokens

    def forward(inputs: Mapping[str, Tensor]) -> Tensor:
        features = model({**inputs, **constants})
        if "token_embeddings" in features:
            tokens(features["token_embeddings"] if spec.layers == 1 else features["all_layer_embeddings"][-1])
        return features["sentence_embedding"][:, :width]

    def keep(inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs.get("attention_mask")
        return inputs["input_ids"] != model.tokenizer.pad_token_id if mask is None else mask.bool()

    tower = TorchTower(
        tuple(specs),
        model,
        Network(forward, layers, Point(tokens)),
        prepare,
        collate,
        keep=keep,
        stand_in=lambda mask: {"input_ids": mask.new_zeros(mask.shape).long(), "attention_mask": mask.long()},
        length=lambda text: text.length,
    )
    return [without_padding(f"st:{variant}", tower)]


def read_cuts(variant: str, spec: EncoderSpec) -> Callable[[str], int]:
    """`Tokens.cut` of a text, by the checkpoint's own modules, whose weights are loaded with them."""
    model, prompt = _model(variant, spec), json.loads(spec.preprocessing or "{}").get("prompt") or None
    tokenizer = getattr(model[0], "tokenizer", None)
    return cuts_of(tokenizer, lambda text: _tokenized(model, [text], prompt), spec)


def reference(variant: str, spec: EncoderSpec) -> Callable[[str], np.ndarray]:
    model, clean = _model(variant, spec), CLEANING[spec.cleaning]
    recipe = json.loads(spec.preprocessing or "{}")

    def encode(text: str) -> np.ndarray:
        asked = {"prompt": recipe.get("prompt"), "truncate_dim": recipe.get("truncate_dim")}
        if spec.output == "tokens":
            return model.encode(clean(text), output_value="token_embeddings", **asked).numpy()
        return model.encode(clean(text), **asked)

    return encode


def _counted(tokenizer: Any) -> Callable[[str], int]:
    """The number of tokens of a text, by which texts are sorted; of letters where the tokenizer is a slow one.

    It has a tokenizer of its own, since readers count while the library tokenizes a batch.
    """
    backend = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", None))
    if backend is None:
        return len
    backend.no_truncation()
    backend.no_padding()
    return lambda text: len(backend.encode(text))


def _tokenized(model: SentenceTransformer, texts: list[str], prompt: str | None) -> dict[str, Any]:
    return dict(model.preprocess(texts, prompt=prompt))


def _model(variant: str, spec: EncoderSpec) -> SentenceTransformer:
    """The checkpoint in float32 on the CPU, with the text length of the spec."""
    quiet_transformers()
    import torch
    from sentence_transformers import SentenceTransformer

    source, exact = Source("st", variant), {"dtype": torch.float32}
    pinned = source.pinned(spec)
    pinned["local_files_only"] = "revision" not in pinned
    with source.load_errors(), tokenizer_errors(source.name, variant, text_folder(variant)), source.refuse_random():
        model = SentenceTransformer(source.place, device="cpu", model_kwargs=exact, **pinned)
    if "text" not in model.modalities:
        raise source.of_pictures("this")
    asked, width = json.loads(spec.preprocessing or "{}").get("truncate_dim"), model.get_embedding_dimension()
    if asked and width and asked > width:
        raise EncoderError(f"st:{variant}: --truncate-dim {asked} is more than the {width} dimensions of its vectors")
    longest = model.max_seq_length
    if spec.max_length and longest and spec.max_length > longest:
        raise EncoderError(f"st:{variant}: --max-length {spec.max_length} is more than the checkpoint's {longest}")
    if spec.max_length:
        model.max_seq_length = spec.max_length
    if spec.layers > 1:
        model = _of_layers(variant, spec, model)
    return model.float().eval().requires_grad_(False)


def _of_layers(variant: str, spec: EncoderSpec, model: SentenceTransformer) -> SentenceTransformer:
    """The checkpoint with the library's own mean of the last hidden states behind its transformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling

    first, *rest = list[Any](model)
    body = getattr(first, "model", None)
    if not rest or body is not model.transformers_model or body is None:
        raise EncoderError(f"--layers {spec.layers}: st:{variant} has no pooling behind a transformer; leave it out")
    count = len(model_layers(body))
    check_layers(spec, count)
    body.config.output_hidden_states = True
    mean = WeightedLayerPooling(first.get_embedding_dimension(), count, count + 1 - spec.layers)
    whole = SentenceTransformer(modules=[first, mean, *rest], device="cpu")
    whole.prompts, whole.default_prompt_name = model.prompts, model.default_prompt_name
    return whole


def _check_tokenizer(variant: str, model: SentenceTransformer) -> Callable[[str], None]:
    """Check the tokenizer; returns the check of a text of `check_fit`."""
    body, tokenizer = model.transformers_model, getattr(model[0], "tokenizer", None)
    if not hasattr(tokenizer, "get_vocab"):
        return lambda text: None
    names = getattr(tokenizer, "vocab_files_names", {}).values()
    check_files(f"st:{variant}", variant, names, text_folder(variant))
    return check_fit(f"st:{variant}", tokenizer, model[0] if body is None else body)


def _own_code(variant: str) -> int:
    """1 where code of the checkpoint will run, for a module or inside one of transformers."""
    modules = checkpoint_modules(variant)
    others = [f"{module['type']} in {MODULES}" for module in modules if not module["type"].startswith(LIBRARY)]
    for file in (f"{module['path']}/config.json" for module in modules if module["type"].endswith(".Dense")):
        activation = str((checkpoint_json(variant, file) or {}).get("activation_function", "torch."))
        others += [] if activation.startswith("torch.") else [f"{activation} in {file}"]  # the library takes another
    if others and not is_trusted():
        raise needed(f"st:{variant}", others[0])
    return 1 if others else own_code(f"st:{variant}", variant, text_folder(variant))


def _prompt(variant: str, name: str, settings: Mapping[str, Any]) -> str:
    """The text of the prompt called `name`, or of the checkpoint's default prompt."""
    prompts = settings.get("prompts") or {}
    name = name or settings.get("default_prompt_name") or NO_PROMPT
    if name == NO_PROMPT:
        return ""
    if name not in prompts:
        if not prompts:
            raise ConfigError(f"--prompt {name}: st:{variant} has no prompts; leave it out")
        known = ", ".join([*prompts, NO_PROMPT])
        raise ConfigError(f"--prompt {name}: st:{variant} has no prompt of that name; use one of {known}")
    return str(prompts[name])

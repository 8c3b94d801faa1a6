"""Text encoders through transformers' AutoModel. Variants: a hub name or a local folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from mmfeat.encoders.layers import Network, Point, check_layers
from mmfeat.encoders.names import takes_pictures
from mmfeat.encoders.source import Source, own_code
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.tokenizer import check_files, cuts_of, preparing, tokenizer_errors
from mmfeat.encoders.torch_tower import TorchTower, without_padding
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.encoders.weights import checkpoint_json, checkpoint_modules
from mmfeat.errors import EncoderError
from mmfeat.samples.contents import CLEANING

DEFAULT_VARIANT = "bert-base-uncased"
DEFAULT_LENGTH = 128  # tokens
DECODERS = ("ForCausalLM", "GPT2LMHeadModel", "OpenAIGPTLMHeadModel")  # how their architectures are called
POSITIONS_ASIDE = 8  # most positions that a model keeps for itself, as RoBERTa does two
ST_POOLINGS = {"cls": "cls", "max": "max", "mean": "mean", "lasttoken": "last"}


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    variant = variant or DEFAULT_VARIANT
    source = Source("bert", variant)
    source.check_form()
    code = own_code(source.name, variant)
    return [
        EncoderSpec(
            family="bert",
            modality="text",
            **source.identity(deep=bool(code)),  # code may lie in folders inside the folder
            cleaning=options.cleaning,
            pooling=_own_pooling(variant) if options.pooling == "auto" else options.pooling,
            max_length=int(options.max_length) or DEFAULT_LENGTH,
            **options.of_model,
            remote_code=code,
        )
    ]


def _own_pooling(variant: str) -> str:
    """The one pooling in the checkpoint's files; where they have none, the last token of a decoder, else the mean."""
    paths = [module["path"] for module in checkpoint_modules(variant) if module["type"].endswith(".Pooling")]
    if paths:
        settings = checkpoint_json(variant, f"{paths[0]}/config.json")
        settings = settings if isinstance(settings, dict) else {}
        named = settings.get("pooling_mode") or [
            name for name in settings if "pooling_mode_" in name and settings[name]
        ]
        modes = [named] if isinstance(named, str) else list(named)
        plain = [re.sub("pooling_mode_|_tokens?$", "", str(mode)) for mode in modes]  # earlier pooling_mode_mean_tokens
        if len(plain) != 1 or plain[0] not in ST_POOLINGS:
            raise EncoderError(
                f"bert:{variant}: its pooling is {', '.join(map(str, modes)) or 'unknown'}; name st:{variant}"
            )
        return ST_POOLINGS[plain[0]]
    config = checkpoint_json(variant, "config.json") or {}
    names = config.get("architectures") or [""]
    return "last" if config.get("is_decoder") or names[0].endswith(DECODERS) else "mean"


def open_towers(variant: str, specs: list[EncoderSpec]) -> list[TorchTower]:
    """The model and its tokenizer by `from_pretrained`; a batch is padded to its longest text."""
    spec = specs[0]  # all outputs of a tower come from one forward pass over the same tokens
    tokenizer, model = _from_pretrained(variant or DEFAULT_VARIANT, specs)
    # Positions count from the first column, so only padding behind a text leaves its vector unchanged.
    tokenizer.padding_side = "right"
    pooled = next((spec for spec in specs if spec.output == "pooled"), replace(spec, pooling="mean", layers=1))
    asked = {"output_hidden_states": True} if pooled.layers > 1 else {}
    model.float().eval().requires_grad_(False)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(tokenizer.pad(batch, return_attention_mask=True, return_tensors="pt"))

    def forward(inputs: dict[str, Any]) -> Any:
        taken = {name: value for name, value in inputs.items() if name in tokenizer.model_input_names}
        return pool(model(**taken, **asked), inputs["attention_mask"], pooled)

    tower = TorchTower(
        tuple(specs),
        model,
        Network(forward, model_layers(model), Point(model)),
        preparing(f"bert:{variant}", tokenizer, model, spec, return_attention_mask=True),
        collate,
        keep=lambda inputs: inputs["attention_mask"].bool(),
        stand_in=lambda mask: {"input_ids": mask.new_zeros(mask.shape).long(), "attention_mask": mask.long()},
        length=lambda inputs: len(inputs["input_ids"]),
    )
    return [without_padding(f"bert:{variant}", tower)]


def read_cuts(variant: str, spec: EncoderSpec) -> Callable[[str], int]:
    """`Tokens.cut` of a text, by the tokenizer alone."""
    source = Source("bert", variant or DEFAULT_VARIANT)
    with source.load_errors():
        tokenizer = _tokenizer(quiet_transformers(), source, spec)
    return cuts_of(tokenizer, lambda text: tokenizer(text, truncation=True, max_length=spec.max_length), spec)


def reference(variant: str, spec: EncoderSpec) -> Callable[[str], np.ndarray]:
    """transformers' own call for one text, in float32."""
    transformers = quiet_transformers()
    import torch

    variant = variant or DEFAULT_VARIANT
    source = Source("bert", variant)
    with source.load_errors():
        tokenizer = _tokenizer(transformers, source, spec)
        model = _encoder(transformers, source, spec)[0].float().eval()

    def encode(text: str) -> np.ndarray:
        text = CLEANING[spec.cleaning](text)
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=spec.max_length)
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True)
        if spec.output == "prefix":
            return output.hidden_states[-1 - spec.layer][0].numpy()
        if spec.output == "tokens":
            return output.last_hidden_state[0].numpy()
        if spec.pooling == "pooler":
            return output.pooler_output[0].numpy()
        tokens = _states(output, spec.layers)[0]
        pooled = {"cls": tokens[0], "last": tokens[-1], "max": tokens.amax(0), "mean": tokens.mean(0)}
        return pooled[spec.pooling].numpy()

    return encode


def pool(output: Any, mask: Any, spec: EncoderSpec) -> Any:
    """(B, D) from a model output: mean or maximum over tokens of the (B, T) mask, first or last of them, or pooler."""
    pooling = spec.pooling
    if pooling == "pooler":
        return output.pooler_output
    hidden = _states(output, spec.layers).float()
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":  # padding is behind the text
        rows = mask.sum(1).sub(1).clamp(min=0).long()
        return hidden.take_along_dim(rows[:, None, None].expand(-1, 1, hidden.shape[-1]), 1).squeeze(1)
    weights = mask.unsqueeze(-1).float()
    if pooling == "max":
        return hidden.masked_fill(weights == 0, float("-inf")).amax(1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _states(output: Any, layers: int) -> Any:
    """(B, T, D): the last hidden states of a model output, or the mean of those of the last `layers`."""
    import torch

    return output.last_hidden_state if layers == 1 else torch.stack(output.hidden_states[-layers:]).mean(0)


def model_layers(model: Any) -> list[Any]:
    """The list with as many layers as the configuration says; empty where layers share their weights."""
    import torch

    count = getattr(model.config, "num_hidden_layers", 0)
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return next((list(layers) for layers in lists if len(layers) == count), [])


def _from_pretrained(variant: str, specs: list[EncoderSpec]) -> tuple[Any, Any]:
    """Tokenizer and model, checked for the outputs and options in `specs`."""
    transformers = quiet_transformers()
    source = Source("bert", variant)
    with source.load_errors():
        with tokenizer_errors(source.name, variant):
            tokenizer = _tokenizer(transformers, source, specs[0])
        check_files(source.name, variant, tokenizer.vocab_files_names.values())
        model, info = _encoder(transformers, source, specs[0])
        for spec in specs:
            pooler = spec.pooling == "pooler"
            missing = [key for key in info["missing_keys"] if pooler or not key.startswith("pooler.")]
            remedy = " or --pooling mean" if pooler else ""
            source.check_complete(missing, info["mismatched_keys"], remedy)
            _check_options(variant, spec, tokenizer, model)
    return tokenizer, model


def _encoder(transformers: Any, source: Source, spec: EncoderSpec) -> tuple[Any, dict[str, Any]]:
    """The model, of an encoder-decoder its encoder, and what its files lack. Raises `EncoderError` for image models."""
    pinned = source.pinned(spec)
    config = transformers.AutoConfig.from_pretrained(source.place, **pinned)
    if takes_pictures(config.model_type):
        raise source.of_pictures(config.model_type)
    encoder = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    alone = encoder is not None and encoder.__name__.endswith("EncoderModel")
    loader = transformers.AutoModelForTextEncoding if alone else transformers.AutoModel
    wanted = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `check_complete` refuses them
    model, info = loader.from_pretrained(source.place, **wanted, **pinned)
    return (model.get_encoder() if config.is_encoder_decoder and not alone else model), info


def _tokenizer(transformers: Any, source: Source, spec: EncoderSpec) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.place, **source.pinned(spec))
    if tokenizer.pad_token is None:  # the mask hides padding, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def quiet_transformers() -> Any:
    """The library `transformers`, without its progress bars, advice and questions."""
    import_torchvision()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # An error at once, where the library would ask at the terminal whether to run code of a checkpoint.
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    return transformers


def _check_options(variant: str, spec: EncoderSpec, tokenizer: Any, model: Any) -> None:
    """Raise `EncoderError` for an option that the model cannot follow."""
    positions = getattr(model.config, "max_position_embeddings", 0) or 0
    longest = min(tokenizer.model_max_length, positions if positions > 0 else spec.max_length)  # XLNet says -1
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if not shortest <= spec.max_length <= longest:
        raise EncoderError(f"bert:{variant}: --max-length {spec.max_length} is not from {shortest} to {longest}")
    if spec.max_length > longest - POSITIONS_ASIDE:
        _check_positions(variant, spec, tokenizer, model)
    if spec.layers > 1:
        check_layers(spec, len(model_layers(model)))
    if spec.pooling == "pooler" and spec.layers > 1:
        raise EncoderError(f"bert:{variant}: --pooling pooler is of the last layer; leave out --layers {spec.layers}")
    if spec.pooling == "pooler" and getattr(model, "pooler", None) is None:
        raise EncoderError(f"bert:{variant}: this model has no pooler; use --pooling mean or cls")


def _check_positions(variant: str, spec: EncoderSpec, tokenizer: Any, model: Any) -> None:
    """Encode a text of the longest length: some models keep a few positions for themselves."""
    import torch

    padding = {tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None)}
    word = next(number for number in range(len(padding) + 1) if number not in padding)
    ids = torch.full((1, spec.max_length), word)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError) as error:
        raise EncoderError(
            f"bert:{variant}: --max-length {spec.max_length} is more than its positions hold; name a smaller one"
        ) from error

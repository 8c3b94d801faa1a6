"""Class names: their texts, and their vectors by the text tower of the model that made the vectors of the photos."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mmfeat.cache.features import Features
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.errors import ConfigError, HeadError
from mmfeat.extraction.extract import ExtractSettings, extract_samples
from mmfeat.runs.entry import RunConfig
from mmfeat.samples.dataset import Sample, SampleSet
from mmfeat.system.wording import Progress

# Values of --templates -> the sentences that open_clip puts a class name into; `none` takes the text as it is.
TEMPLATES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES", "none": ""}


def class_texts(classes: Sequence[str], given: Mapping[str, str], templates: str) -> dict[str, str]:
    """Class -> the text that stands for it: the one in `given`, else the name itself with blanks for `_` and `-`.

    Raises `ConfigError` for a text of no class, an empty text, a label that is a mere number, and unknown templates.
    """
    if templates not in TEMPLATES:
        raise ConfigError(f"--templates {templates}: use one of {', '.join(TEMPLATES)}")
    for name in given:
        if name not in classes:
            close = difflib.get_close_matches(name, classes, 1, cutoff=0.0)
            raise ConfigError(f"--class-names {name}=...: no such label; did you mean {close[0]}?")
    texts = {name: given.get(name, re.sub("[_-]+", " ", name)).strip() for name in classes}
    if empty := [name for name, text in texts.items() if not text]:
        raise ConfigError(f"--class-names {empty[0]}=: an empty text; write what a photo of this label shows")
    if numbers := [name for name in classes if name.isdecimal() and name not in given]:
        raise ConfigError(
            f"label {numbers[0]}: a number tells no model what to look for; write what a photo of it shows, "
            f"as in --class-names {numbers[0]}='a happy photo'"
        )
    return texts


def two_towers(towers: Sequence[Tower]) -> dict[str, Tower]:
    """Cache folder of a tower of pooled vectors -> the text tower of the same model, whose vectors share its space.

    The text tower cleans no text: a class name is no tweet. Empty where no model has both towers.
    """
    whole = [tower for tower in towers if _is_whole(tower.spec)]
    texts = {_model(tower): tower for tower in whole if tower.spec.modality == "text"}
    models = {_model(tower) for tower in whole if tower.spec.modality == "image"} & set(texts)
    return {
        tower.spec.folder_name: replace(text, spec=replace(text.spec, cleaning="none"))
        for tower in whole
        if _model(tower) in models and (text := texts[_model(tower)])
    }


def _is_whole(spec: EncoderSpec) -> bool:
    """Whether the vector is that of the model itself, in the space that both towers share."""
    return (spec.output, spec.view, spec.pooling, spec.layers) == ("pooled", "none", "tower", 1)


def _model(tower: Tower) -> tuple[str, ...]:
    return tower.request, tower.spec.family, tower.spec.variant, tower.spec.weights


def with_class_vectors(
    features: Features, config: RunConfig, towers: Sequence[Tower], device: str, progress: Progress
) -> Features:
    """The features with the vectors of the class names of a run, for each block that a model with two towers made.

    As open_clip's `build_zero_shot_classifier`: the mean of the normalised vectors of a class over all templates,
    normalised. What the cache lacks is encoded, and kept there beside the vectors of the data set.
    """
    texts, makers = config.class_names or {}, _makers(config.templates or "none")
    named = {name: text for name, text in two_towers(towers).items() if name in features.widths}
    needed = list({tower.spec: tower for tower in named.values()}.values())
    prompts = [make(text) for text in texts.values() for make in makers]
    samples = tuple(Sample(f"class name {number}", text=prompt) for number, prompt in enumerate(prompts, 1))
    asked, settings = SampleSet(config.dataset, "class names", samples), ExtractSettings(device)
    extract_samples(asked, needed, cache=config.cache, settings=settings, progress=progress)
    blocks = Cache(config.cache, config.dataset).load(samples, [tower.spec for tower in needed]).blocks
    vectors: dict[EncoderSpec, np.ndarray] = {}
    for tower, block in zip(needed, blocks, strict=True):
        if not block.mask.all():
            raise HeadError(f"{tower.spec.name}: cannot encode the class name {prompts[int(block.mask.argmin())]!r}")
        parts = _unit(block.vectors.astype(np.float64)).reshape(len(texts), len(makers), -1)
        vectors[tower.spec] = _unit(parts.mean(1)).astype(np.float32)
    classes = {name: vectors[tower.spec] for name, tower in named.items()}
    for name, given in classes.items():
        if features.widths[name] not in (0, given.shape[1]):
            raise HeadError(
                f"{name}: its vectors are {features.widths[name]} wide, those of class names {given.shape[1]}"
            )
    return replace(features, classes=classes)


def _makers(templates: str) -> list[Callable[[str], str]]:
    """The functions that make a sentence of a class name, open_clip's own."""
    if not TEMPLATES[templates]:
        return [str]
    import_torchvision()
    from open_clip import zero_shot_metadata

    return list(getattr(zero_shot_metadata, TEMPLATES[templates]))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def parse_class_names(text: str) -> dict[str, str]:
    """Read `LABEL=TEXT,...`; a text may hold commas, and stand in double quotes where it holds `,NAME=` as well.

    Raises `ConfigError` for anything else.
    """
    names: dict[str, str] = {}
    for label, value in _pairs(text):
        if label in names:
            raise ConfigError(f"--class-names {label}=...: named twice; write each label once")
        names[label] = value
    return names


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    quoted, plain = r'"[^"]*"', r"[^,=]*"
    pair = re.compile(rf'\s*({quoted}|[^=,"]+?)\s*=\s*({quoted}|.*?)\s*(?:$|,(?=\s*(?:{quoted}|{plain})=))', re.DOTALL)
    position = 0
    while position < len(text):
        match = pair.match(text, position)
        if match is None:
            raise ConfigError(f"--class-names {text}: write LABEL=TEXT,..., as in positive='a happy photo'")
        yield _unquoted(match[1]), _unquoted(match[2])
        position = match.end()

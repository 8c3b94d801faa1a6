"""The spec of an encoder: all that changes a vector, and its fingerprint.

What does not change a vector (the folder a model lies in, the device, the batch size, library versions)
is no part of it; the model's own name is, for people, so a renamed model is encoded again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from mmfeat.errors import ConfigError
from mmfeat.files import canonical_json
from mmfeat.hardware import DTYPES
from mmfeat.texts import CLEANING

POOLINGS = ("mean", "cls", "pooler")
VISION_TRANSFORMERS = ("vit", "deit", "beit", "eva")


@dataclass(frozen=True)
class EncoderSpec:
    """One tower, completely described. Vectors of equal specs are comparable."""

    family: str  # "bert"
    modality: str  # "text" or "image"
    variant: str  # hub name, model/weights, or the last part of a local path
    weights: str  # "sha256:...", "revision:..." or "builtin:N"
    arithmetic: str  # dtype of the forward pass
    storage: str  # dtype on disk
    preprocessing: str = ""  # canonical JSON of what turns a file into numbers
    cleaning: str = "none"  # a name in texts.CLEANING
    pooling: str = "tower"  # "mean", "cls", "pooler", or "tower": the model's own
    max_length: int = 0  # tokens; 0 where there are none
    layer: int = 0  # 0 is the last, n the n-th before it
    view: str = "none"  # or an augmentation policy and its seed

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()

    @property
    def name(self) -> str:
        """For people: `bert:all-MiniLM-L6-v2`, `clip.text:ViT-B-32/openai`, `hog`."""
        tower = f"{self.family}.{self.modality}" if self.family == "clip" else self.family
        return f"{tower}:{self.variant}" if self.variant else tower

    @property
    def folder_name(self) -> str:
        """The cache folder of this spec: a readable name and the first 8 digits of the fingerprint."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.name)[:80].strip('-.')}-{self.fingerprint[:8]}"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EncoderSpec:
        """The spec in `values`; raises `ConfigError` on missing or unknown fields."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ConfigError(f"not an encoder spec: fields {sorted(set(values) ^ names)} are missing or unknown")
        return cls(**values)

    def differences(self, other: EncoderSpec) -> list[str]:
        """Names of the fields in which two specs differ."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class EncoderOptions:
    """What a user may choose about all encoders of a call.

    `convolutional_dtype` is the arithmetic of convolutional models where `auto` chose another one for them.
    """

    dtype: str = "auto"
    cleaning: str = "tweet"
    pooling: str = "mean"
    max_length: int = 128
    convolutional_dtype: str = ""

    def __post_init__(self) -> None:
        _check("dtype", self.dtype, DTYPES)
        _check("cleaning", self.cleaning, tuple(CLEANING))
        _check("pooling", self.pooling, POOLINGS)
        if self.max_length < 1:
            raise ConfigError(f"--max-length {self.max_length}: at least 1 token is needed")

    def for_model(self, architecture: str) -> EncoderOptions:
        """The same options for this architecture: image models that are no plain ViT count as convolutional."""
        if architecture.lower().startswith(VISION_TRANSFORMERS):
            return self
        return replace(self, dtype=self.convolutional_dtype or self.dtype)

    @property
    def storage(self) -> str:
        """Half-precision arithmetic is stored in float16: HDF5 has no bfloat16."""
        return "float32" if self.dtype == "float32" else "float16"


@dataclass(frozen=True)
class Encoder:
    """A loaded tower.

    `prepare` turns one text or one RGB PIL image into a model input on the CPU and may run in
    several threads; `embed` turns B such inputs into a (B, D) float32 array.
    """

    spec: EncoderSpec
    prepare: Callable[[Any], Any]
    embed: Callable[[list[Any]], np.ndarray]


def _check(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"--{flag} {value}: use one of {', '.join(allowed)}")

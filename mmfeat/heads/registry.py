"""The registry of heads: every name that `--fusion` and `--baselines` take. torch loads only with a fusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mmfeat.heads.settings import HeadSettings

if TYPE_CHECKING:
    from mmfeat.heads.stack import FusionType


__all__ = ["BASELINES", "FUSIONS", "HEADS", "NEEDS_TOKENS", "TWINS", "HeadSettings", "load_fusion"]

NEEDS_TOKENS = "cross-attention"
TWINS = {"film-concat": "film"}  # on one modality the first is the second


def _late() -> FusionType:
    from mmfeat.heads.fusions import Late

    return Late


def _concat() -> FusionType:
    from mmfeat.heads.fusions import Concat

    return Concat


def _gated() -> FusionType:
    from mmfeat.heads.fusions import Gated

    return Gated


def _film() -> FusionType:
    from mmfeat.heads.fusions import Film

    return Film


def _film_concat() -> FusionType:
    from mmfeat.heads.fusions import FilmConcat

    return FilmConcat


def _cross_attention() -> FusionType:
    from mmfeat.heads.fusions import CrossAttention

    return CrossAttention


FUSIONS: dict[str, Callable[[], FusionType]] = {
    "late": _late,
    "concat": _concat,
    "gated": _gated,
    "film": _film,
    "film-concat": _film_concat,
    NEEDS_TOKENS: _cross_attention,
}
# Their functions are in mmfeat/baselines, which needs NumPy: these names are for `mmfeat --help` too.
BASELINES = ("prior", "knn", "ridge", "logistic", "svm", "forest", "boosting")
HEADS: tuple[str, ...] = (*FUSIONS, *BASELINES)


def load_fusion(name: str) -> FusionType:
    """The class of a fusion; torch is imported only now."""
    return FUSIONS[name]()

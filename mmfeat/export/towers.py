"""Encoder graphs: torch towers and the head behind them as one module, from pixels and token ids to a decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmfeat.encoders.clip import text_network
from mmfeat.encoders.pixels import Pixels
from mmfeat.encoders.registry import FAMILIES, open_towers
from mmfeat.encoders.torch_tower import TorchTower, stack
from mmfeat.export.build import Port
from mmfeat.export.graph import HeadGraph

if TYPE_CHECKING:
    from mmfeat.encoders.registry import Tower


Axes = dict[int, str]


@dataclass(frozen=True)
class TowerInput:
    """An encoder of the graph: what its inputs are called, their free axes, and how a content becomes them.

    `prepare` and `collate` are mmfeat's own; `preprocessing` says for JSON what they do.
    """

    port: Port
    names: tuple[str, ...]
    keys: tuple[str, ...]  # in the mapping that a tokenizer gives; none for a single tensor
    axes: tuple[Axes, ...]
    prepare: Callable[[Any], Any]
    collate: Callable[[list[Any]], Any]
    preprocessing: dict[str, Any]

    def inputs(self, contents: Sequence[Any]) -> list[Tensor]:
        """The tensors of a batch of texts or RGB pictures."""
        batch = self.collate([self.prepare(content) for content in contents])
        return [batch[key] for key in self.keys] if self.keys else [batch]


class TowerPart(nn.Module):
    """One encoder: its inputs -> (B, D) vectors in float32."""

    def __init__(self, tower: TorchTower, network: Any, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.keys = tower.module, keys
        self.run = network.forward

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.run(dict(zip(self.keys, inputs, strict=True)) if self.keys else inputs[0]).float()


class ModelGraph(nn.Module):
    """Encoders and head: the inputs of each encoder and its mask in turn -> probabilities, chosen, and the vectors."""

    def __init__(self, parts: Sequence[TowerPart], counts: Sequence[int], head: HeadGraph) -> None:
        super().__init__()
        self.parts, self.counts, self.head = nn.ModuleList(parts), list(counts), head

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        given, vectors, place = [], [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            found = part(inputs[place : place + count])
            vectors.append(found)
            given += [found, inputs[place + count]]
            place += count + 1
        return (*self.head(given), *vectors)


def why_no_model(ports: Sequence[Port]) -> str:
    """Why the encoders behind some ports cannot be in a graph; "" where they can."""
    for port in ports:
        spec = port.tower.spec
        if spec.view != "none":
            return f"the head looks at augmented views of {spec.tower}, which no graph makes"
        if spec.output != "pooled":
            return f"the head reads {spec.output} of {spec.tower}"
        if FAMILIES.get(spec.family, FAMILIES["resnet50"]).open_towers is None:
            return f"{spec.tower} is no torch model"
    return ""


def build_model(ports: Sequence[Port], head: HeadGraph) -> tuple[ModelGraph, list[TowerInput]]:
    """The graph from contents to decision, in float32."""
    parts, inputs = [], []
    for port in ports:
        part, given = _opened(port)
        parts.append(part)
        inputs.append(given)
    return ModelGraph(parts, [len(each.names) for each in inputs], head).eval(), inputs


def _opened(port: Port) -> tuple[TowerPart, TowerInput]:
    tower = _plain(port.tower)
    spec = port.tower.spec
    if spec.modality == "image":
        batch: Axes = {0: "batch"}
        given = TowerInput(port, (f"{port.name}_pixels",), (), (batch,), tower.prepare, tower.collate, _pixels(tower))
        return TowerPart(tower, tower.network, ()), given
    told = {"cleaning": spec.cleaning, "max_length": spec.max_length, "tokenizer": spec.model}
    if spec.tower == "clip.text":  # the whole width: what follows the end token is looked at by nobody
        network = text_network(tower.module)
        told["padding"] = "to 77 columns with zeros, as open_clip's tokenizer does"
        names, axes = (f"{port.name}_ids",), ({0: "batch"},)
        return TowerPart(tower, network, ()), TowerInput(port, names, (), axes, tower.prepare, stack, told)
    keys = tuple(tower.collate([tower.prepare("a b")]))
    told["padding"] = "on the right, to the longest of the batch"
    named = tuple(f"{port.name}_{key}" for key in keys)
    free = tuple({0: "batch", 1: f"{port.name}_tokens"} for _ in keys)
    given = TowerInput(port, named, keys, free, tower.prepare, tower.collate, told)
    return TowerPart(tower, tower.network, keys), given


def _plain(tower: Tower) -> TorchTower:
    """The torch model with attention written out, which the exporter can follow."""
    (opened,) = [each for each in open_towers(tower) if tower.spec in each.specs]
    module: Any = opened.module
    if hasattr(module, "set_attn_implementation"):  # of transformers
        module.set_attn_implementation("eager")
    return opened


def _pixels(tower: TorchTower) -> dict[str, Any]:
    """What turns a picture into the graph's input."""
    if not isinstance(tower.prepare, Pixels):
        library = {"transform": tower.specs[0].transform}
        return {"input": "float32 (B, 3, H, W): the library's own evaluation transform", **library}
    from PIL import Image

    pixels = tower.prepare
    return {
        "input": "uint8 (B, H, W, 3): RGB, resized and cropped; scaling is in the graph",
        "resize": pixels.resize,
        "resample": Image.Resampling(pixels.resample).name,
        "crop": pixels.crop,
    }

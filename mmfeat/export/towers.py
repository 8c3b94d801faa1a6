"""Encoder graphs: torch towers and the head behind them as one module, from pixels and token ids to a decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmfeat.encoders.clip import TextTower
from mmfeat.encoders.pixels import Pixels
from mmfeat.encoders.registry import is_torch, open_towers
from mmfeat.encoders.runtime import TowerPart
from mmfeat.encoders.torch_tower import ByLength, TorchTower, stack
from mmfeat.errors import RunError
from mmfeat.export.build import Port
from mmfeat.export.graph import HeadGraph

if TYPE_CHECKING:
    from mmfeat.encoders.registry import Tower


Axes = dict[int, str]


@dataclass(frozen=True)
class TowerInput:
    """The inputs of an encoder in the graph: `names`, free `axes`, and the functions that make the inputs.

    `prepare` and `collate` are the functions of the encoder; `preprocessing` describes both functions for JSON.
    """

    port: Port
    names: tuple[str, ...]
    keys: tuple[str, ...]  # keys of the tokenizer's mapping; empty for a single tensor
    axes: tuple[Axes, ...]
    prepare: Callable[[Any], Any]
    collate: Callable[[list[Any]], Any]
    preprocessing: dict[str, Any]

    def inputs(self, contents: Sequence[Any]) -> list[Tensor]:
        """The input tensors of a batch of texts or RGB pictures."""
        batch = self.collate([self.prepare(content) for content in contents])
        return [batch[key] for key in self.keys] if self.keys else [batch]


class ModelGraph(nn.Module):
    """Encoders and head in one graph: (inputs, mask) of each encoder in turn -> probabilities, chosen, vectors."""

    def __init__(self, parts: Sequence[TowerPart], counts: Sequence[int], head: HeadGraph) -> None:
        super().__init__()
        self.parts, self.counts, self.head = nn.ModuleList(parts), list(counts), head

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        head_inputs, vectors, start = [], [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            vectors.append(part(inputs[start : start + count]))
            head_inputs += [vectors[-1], inputs[start + count]]
            start += count + 1
        return (*self.head(head_inputs), *vectors)


def why_no_model(ports: Sequence[Port]) -> str:
    """The reason why the encoders of these ports cannot be in a graph; "" where all of them can."""
    for port in ports:
        spec = port.tower.spec
        if spec.view != "none":
            return f"the head looks at augmented views of {spec.tower}, which no graph makes"
        if spec.output != "pooled":
            return f"the head reads {spec.output} of {spec.tower}"
        if spec.modality == "image" and "max_num_patches" in spec.preprocessing:
            return f"{spec.tower} takes photos in any shape, as a free number of patches"
        if not is_torch(port.tower.request):
            return f"{spec.tower} is no torch model"
    return ""


def build_model(ports: Sequence[Port], head: HeadGraph) -> tuple[ModelGraph, list[TowerInput]]:
    """The graph from contents to decision in float32, and the inputs of each encoder."""
    parts, inputs = [], []
    for port in ports:
        part, tower_input = _opened(port)
        parts.append(part)
        inputs.append(tower_input)
    return ModelGraph(parts, [len(tower_input.names) for tower_input in inputs], head).eval(), inputs


def _opened(port: Port) -> tuple[TowerPart, TowerInput]:
    tower = _plain(port.tower)
    spec = port.tower.spec
    if spec.modality == "image":
        batch: Axes = {0: "batch"}
        given = TowerInput(port, (f"{port.name}_pixels",), (), (batch,), tower.prepare, tower.collate, _pixels(tower))
        return TowerPart(tower, tower.network, ()), given
    if isinstance(tower.network.forward, ByLength):
        raise RunError(f"{spec.name}: no graph of this encoder, whose vectors padding changes; add --no-model")
    facts = {"cleaning": spec.cleaning, "max_length": spec.max_length, "tokenizer": spec.model}
    if spec.tower == "clip.text":  # all 77 columns: the network ignores columns after the end token
        network = TextTower(tower.module).network()
        facts["padding"] = "to 77 columns with zeros, as open_clip's tokenizer does"
        names, axes = (f"{port.name}_ids",), ({0: "batch"},)
        return TowerPart(tower, network, ()), TowerInput(port, names, (), axes, tower.prepare, stack, facts)
    keys = tuple(tower.collate([tower.prepare("a b")]))
    fixed = "max_length" in spec.preprocessing
    facts["padding"] = f"to {spec.max_length} tokens" if fixed else "on the right, to the longest of the batch"
    named = tuple(f"{port.name}_{key}" for key in keys)
    free = tuple({0: "batch", 1: f"{port.name}_tokens"} for _ in keys)
    given = TowerInput(port, named, keys, free, tower.prepare, tower.collate, facts)
    return TowerPart(tower, tower.network, keys), given


def _plain(tower: Tower) -> TorchTower:
    """The torch model with attention in plain operations, which the exporter can trace."""
    (opened,) = [part for part in open_towers(tower) if tower.spec in part.specs]
    module: Any = opened.module
    if hasattr(module, "set_attn_implementation"):  # a transformers model
        module.set_attn_implementation("eager")
    return opened


def _pixels(tower: TorchTower) -> dict[str, Any]:
    """The description, for JSON, of how a picture becomes the input of the graph."""
    spec = tower.specs[0]
    decoding = {"decoding": asdict(spec.decoding)}
    if not isinstance(tower.prepare, Pixels):
        library = {"transform": spec.transform}
        return {"input": "float32 (B, 3, H, W): the library's own evaluation transform", **library, **decoding}
    from PIL import Image

    pixels = tower.prepare
    return {
        "input": "uint8 (B, H, W, 3): RGB, resized and cropped; scaling is in the graph",
        "resize": pixels.resize,
        "resample": Image.Resampling(pixels.resample).name,
        "crop": pixels.crop,
        **decoding,
    }

"""The graph of an entry, as a torch module, with its input ports and the tensors of the ports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmfeat.baselines.fit import restore
from mmfeat.baselines.kernel import KernelHead
from mmfeat.baselines.linear import LinearHead
from mmfeat.baselines.neighbours import NeighbourHead
from mmfeat.baselines.zero_shot import ZeroShot
from mmfeat.cache.features import Block, Features, MappedBlock
from mmfeat.encoders.registry import Tower
from mmfeat.errors import RunError
from mmfeat.export.graph import (
    Blend,
    EntryPart,
    FusionPart,
    HeadGraph,
    HeadPorts,
    KernelPart,
    LinearPart,
    NeighbourPart,
    PriorPart,
    ZeroShotPart,
)
from mmfeat.finetune.settings import EARLY
from mmfeat.heads.data import HeadData
from mmfeat.heads.registry import BASELINES, NEEDS_TOKENS, load_fusion
from mmfeat.heads.stack import stack_of
from mmfeat.prediction.final_heads import head_features, load_final, members, table_of
from mmfeat.runs.entry import TOGETHER, Entry, Rule
from mmfeat.runs.run import Run

NOT_EXPORTABLE = {
    "forest": "decision trees cannot be written as an ONNX graph here",
    "boosting": "decision trees cannot be written as an ONNX graph here",
    EARLY: "it reads the pixels of photos itself",
}


@dataclass(frozen=True)
class Port:
    """An input of the graph: vectors (B, D), or tokens (B, T, D), of one encoder, and the mask of present rows."""

    name: str
    tower: Tower
    width: int

    @property
    def mask(self) -> str:
        """Name of the (B,) or (B, T) bool input, True where a vector is present."""
        return f"{self.name}_there"

    @property
    def is_tokens(self) -> bool:
        return self.tower.spec.output == "tokens"


@dataclass
class Ports:
    """All ports of a graph, one for each encoder and output, in the order of first use."""

    towers: Mapping[str, Tower]  # cache folder -> encoder
    by_block: dict[str, Port] = field(default_factory=dict)

    def number(self, block: Block | MappedBlock) -> int:
        """The index of the port of a block."""
        if block.name not in self.by_block:
            tower = self.towers[block.name]
            self.by_block[block.name] = Port(self._free_name(tower), tower, block.width)
        return list(self.by_block).index(block.name)

    def _free_name(self, tower: Tower) -> str:
        spec = tower.spec
        view = "" if spec.view == "none" else f" {spec.view}"
        plain = re.sub(r"\W+", "_", f"{spec.tower}{' tokens' if spec.output == 'tokens' else ''}{view}").strip("_")
        taken = {port.name for port in self.by_block.values()}
        return next(name for name in [plain, *(f"{plain}_{n}" for n in range(2, 1000))] if name not in taken)


def why_not_exportable(run: Run, entry: Entry) -> str:
    """The reason why an entry cannot be a graph; "" where it can."""
    if table_of(run, entry):
        return "it reads columns of a table, which no graph takes yet"
    for member in members(run, entry):
        if reason := NOT_EXPORTABLE.get(member.head):
            inside = f"{member.label} is in it, and " if member is not entry else ""
            return f"{inside}{reason}"
    return ""


def build_graph(run: Run, entry: Entry, towers: Sequence[Tower], features: Features) -> tuple[HeadGraph, list[Port]]:
    """The graph of an entry and its ports; `features` are vectors of any samples by `towers`."""
    ports = Ports({tower.spec.folder_name: tower for tower in towers})
    decision = entry.decision
    if entry.modalities == TOGETHER:
        used = members(run, entry)
        rule = entry.rule or Rule()
        if rule.weights is not None:
            rule = replace(rule, weights=tuple(weight for weight in rule.weights if weight > 0))
        scaled: nn.Module = Blend([_entry_part(run, member, features, ports) for member in used], rule, decision)
    else:
        scaled = _entry_part(run, entry, features, ports)
    return HeadGraph(scaled, decision).eval(), list(ports.by_block.values())


def inputs_of(ports: Sequence[Port], features: Features) -> list[Tensor]:
    """Vectors and mask of each port in turn, with zeros for a missing vector."""
    blocks: dict[str, Block | MappedBlock] = {block.name: block for block in features.blocks}
    blocks |= {block.name: block for block in features.mapped}
    tensors = []
    for port in ports:
        block = blocks[port.tower.spec.folder_name]
        if isinstance(block, Block):
            values, mask = np.nan_to_num(block.vectors.astype(np.float32)), block.mask
        else:
            values, mask = block.batch(np.arange(len(block)))
            if not port.is_tokens:  # a pooled vector is read as one token
                values, mask = values[:, 0], block.mask
        tensors += [torch.from_numpy(np.array(values, np.float32)), torch.from_numpy(np.array(mask, bool))]
    return tensors


def _entry_part(run: Run, entry: Entry, features: Features, ports: Ports) -> EntryPart:
    """The final heads of one entry: one stack where all heads see the same blocks, else one stack for each head."""
    head, classes = entry.fused_by, len(run.classes)
    attend = run.config.attend if head == NEEDS_TOKENS else ""
    finals = [(record, load_final(run, entry, record)) for record in entry.final]
    alone = any(final.towers for final in entry.final) or head in BASELINES
    groups = [[final] for final in finals] if alone else [finals]
    parts = []
    for group in groups:
        record = group[0][0]
        data = HeadData(head_features(run, entry, record, features), entry.modalities, "cpu", attend)
        head_ports = _head_ports(data, ports)
        if head in BASELINES:
            parts.append(_baseline(run, head, record.config, group[0][1], head_ports, data.width))
        else:
            fusion = stack_of(load_fusion(head), classes, data, [tensors for _, tensors in group])
            parts.append(FusionPart(head_ports, fusion, len(group)))
    return EntryPart(parts, entry.decision)


def _head_ports(data: HeadData, ports: Ports) -> HeadPorts:
    vectors = {
        name: [[ports.number(block) for block in source.blocks] for source in sources]
        for name, sources in data.sources.items()
    }
    tokens = {}
    if data.attend == "tokens":
        tokens = {name: [ports.number(block) for block in blocks] for name, blocks in data.token_blocks.items()}
    return HeadPorts(vectors, tokens, data.attend)


def _baseline(
    run: Run, head: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], ports: HeadPorts, width: int
) -> nn.Module:
    model = restore(head, dict(config), dict(tensors)).model
    if isinstance(model, LinearHead):
        return LinearPart(ports, model)
    if isinstance(model, KernelHead):
        return KernelPart(ports, model)
    if isinstance(model, NeighbourHead):
        return NeighbourPart(ports, model)
    if isinstance(model, ZeroShot):
        return ZeroShotPart(ports, model, width)
    if head == "prior":
        return PriorPart(model.logits(None, np.zeros(1, np.int64))[0])  # type: ignore[arg-type]
    raise RunError(f"{run.folder}: {head} cannot be exported; {NOT_EXPORTABLE.get(head, 'no graph of it is known')}")

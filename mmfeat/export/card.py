"""The model card: the header of Hugging Face, then facts for readers; all numbers come from the run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mmfeat.evaluation.decisions import Decision
from mmfeat.export.build import Port
from mmfeat.prediction.final_heads import members
from mmfeat.runs.entry import TOGETHER, Entry
from mmfeat.runs.run import Run
from mmfeat.system.wording import interval
from mmfeat.version import __version__

_MARKS = re.compile(r"[\\`*_{}\[\]<>#|~$!&]")

BEGINNING = "---\nlibrary_name: mmfeat\n"  # of the header, by which an export knows its own card
ONNX_EXAMPLE = """\
import json
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession("head.onnx", providers=["CPUExecutionProvider"])
about = json.load(open("head.json"))
known = {port.name: port for port in session.get_inputs()}
feed = {}
for port in about["inputs"]:  # zeros stand for your vectors; the mask says which samples have one
    tokens = [1] if len(known[port["name"]].shape) == 3 else []
    feed[port["name"]] = np.zeros((2, *tokens, port["width"]), np.float32)
    feed[port["mask"]] = np.ones((2, *tokens), bool)
probabilities, chosen = session.run(None, {name: value for name, value in feed.items() if name in known})
print([[name for name, there in zip(about["classes"], row) if there] for row in chosen])
"""
MMFEAT_EXAMPLE = """\
import mmfeat
model = mmfeat.load(RUN, head={head!r}, modalities={modalities!r})  # RUN is the folder of the run
print(model.classes, model.predict_proba(["what a day", "never again"], [None, None]))
"""


def model_card(
    run: Run, entry: Entry, ports: Sequence[Port], facts: Mapping[str, Any], no_model: str,
    model_difference: float | None,
) -> str:  # fmt: skip
    """The model card as Markdown."""
    parts = [
        _header(run, entry, ports),
        f"# {_plain(run.name)}: {entry.label}",
        _use(run, entry, ports),
        f"## How to use\n\nWith onnxruntime, in this folder:\n\n```python\n{ONNX_EXAMPLE}```",
        "With mmfeat, from the run folder `RUN`; a photo is a path, bytes, a PIL image or None:\n\n"
        f"```python\n{MMFEAT_EXAMPLE.format(head=entry.head, modalities=entry.modalities)}```",
        _data(run),
        _scores(run, entry),
        _limits(run, entry, ports),
        _encoders(ports),
        "## Licence\n\nUnknown: mmfeat does not know the licences of the data and of the encoders' weights. Look them "
        "up before you share this, and write yours at the top of this file.",
        _files(facts, no_model, model_difference),
    ]
    return "\n\n".join(parts) + "\n"


def _header(run: Run, entry: Entry, ports: Sequence[Port]) -> str:
    """The header in YAML; JSON strings are YAML strings."""
    text = partial(json.dumps, ensure_ascii=False)
    metrics = "".join(
        f"      - type: {kind}\n        name: {text(name)}\n        value: {entry.score(score).value:.4f}\n"
        for kind, name, score in (
            ("f1", "macro-F1, out of fold", "macro_f1"),
            *([("f1", "micro-F1", "micro_f1")] if entry.micro_f1 else []),
            ("accuracy", entry.titles["accuracy"], "accuracy"),
        )
    )
    name, dataset = text(run.name), text(str(run.config.dataset))
    specs = {port.tower.spec: None for port in ports}
    kinds = [f"{modality}-classification" for modality in sorted({spec.modality for spec in specs})]
    tags = "".join(f"- {tag}\n" for tag in ("onnx", *(["multimodal"] if len(kinds) > 1 else []), *kinds))
    of_hub = [spec.variant for spec in specs if spec.weights.startswith("revision:") and spec.variant.count("/") == 1]
    bases = "".join(f"- {text(base)}\n" for base in dict.fromkeys(of_hub))
    bases = bases and f"base_model:\n{bases}"
    return (
        f"{BEGINNING}license: unknown\n{bases}tags:\n{tags}model-index:\n  - name: {name}\n    results:\n    - task:\n"
        f"        type: {text(run.config.task + '-classification')}\n      dataset:\n        name: {dataset}\n"
        f"        type: {dataset}\n      metrics:\n{metrics}---"
    )


def _use(run: Run, entry: Entry, ports: Sequence[Port]) -> str:
    sees = " and ".join(sorted({port.tower.spec.modality for port in ports}))
    what = "any number of" if run.config.is_multilabel else "one of"
    made = ""
    if entry.modalities == TOGETHER:
        named = ", ".join(member.label for member in members(run, entry))
        made = f" It blends {named}."
    classes = ", ".join(map(_plain, run.classes))
    return (
        f"A classifier for samples with {sees}: it gives {what} {classes}, and a calibrated probability "
        f"of each.{made} Intended for data like that which it was trained on; it was tested on nothing else."
    )


def _plain(text: str) -> str:
    """A text with the special characters of Markdown escaped."""
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def _data(run: Run) -> str:
    total = run.results.labelled
    rows = "".join(f"| {_plain(name)} | {n:,} | {n / total:.1%} |\n" for name, n in run.results.class_counts.items())
    return (
        f"## Data\n\n{_plain(run.config.dataset)}: {total:,} labelled samples, "
        f"hash `{run.config.data_hash[:16]}`.\n\n"
        f"| class | samples | share |\n| --- | ---: | ---: |\n{rows}"
    ).rstrip()


def _scores(run: Run, entry: Entry) -> str:
    folds = f"{len(run.config.folds)} folds" if len(run.config.folds) > 1 else "one holdout"
    overall = "".join(
        f"| {entry.titles[name]} | {interval(entry.score(name)) or 'not defined'} |\n" for name in entry.score_names
    )
    classes = "".join(
        f"| {_plain(name)} | {interval(row.f1)} | {row.support:,} |\n" for name, row in entry.classes.items()
    )
    decision = entry.decision
    return (
        f"## Scores\n\nOf {entry.samples:,} samples that the scored heads did not see ({folds}), with 95 % "
        f"intervals.\n\n| score | value |\n| --- | --- |\n{overall}\n"
        f"| class | F1 | samples |\n| --- | --- | ---: |\n{classes}\n"
        f"Probabilities are calibrated with one temperature ({decision.temperature:.3f}) and one bias a class, "
        f"fitted out of fold; "
        f"`chosen` takes {_adjustment(decision)}."
    )


def _adjustment(decision: Decision) -> str:
    if decision.multilabel:
        return "a threshold for each class into account"
    if decision.cuts is not None:
        return "the expected number of the class, cut for the best kappa"
    return f"a logit adjustment of strength {decision.strength:g} into account: not always the most probable"


def _limits(run: Run, entry: Entry, ports: Sequence[Port]) -> str:
    lines = [
        "Intervals tell how scores would move with other samples of the same kind, not with other data.",
        "A sample without a text or a photo is still classified, from what there is; of one with "
        "neither the answer says nothing.",
        "What the encoders learned, biases included, is in their vectors; nothing here removes it.",
    ]
    if entry == run.leaderboard[0] and len(run.leaderboard) > 1:
        lines.append(
            f"It is the best of {len(run.leaderboard)} entries by the scores above, so these are a little too good."
        )
    if any(member.head == "knn" for member in members(run, entry)):
        lines.append("Vectors and labels of training samples are inside the graph: share it as you would share those.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _encoders(ports: Sequence[Port]) -> str:
    rows = "".join(
        f"| `{port.name}` | {_plain(port.tower.spec.name)} | {port.tower.spec.modality} | {port.width} | "
        f"`{port.tower.spec.weights[:27]}` | `{port.tower.spec.fingerprint[:16]}` | {port.tower.spec.arithmetic} |\n"
        for port in ports
    )
    return (
        "## Encoders\n\nFrozen; the vectors must come from exactly these.\n\n| input | encoder | sees | width | "
        f"weights | fingerprint | arithmetic |\n| --- | --- | --- | ---: | --- | --- | --- |\n{rows}"
    ).rstrip()


def _files(facts: Mapping[str, Any], no_model: str, model_difference: float | None) -> str:
    checked = facts["checked"]
    lines = [
        f"`head.onnx`: vectors and masks to probabilities and choices; onnxruntime agrees with mmfeat within "
        f"{checked['largest_difference']:.1e} on {checked['rows']:,} samples.",
        "`head.json`: its inputs and classes.",
    ]
    if no_model:
        lines.append(f"There is no `model.onnx` with the encoders: {_plain(no_model)}.")
    else:
        lines.append(
            f"`model.onnx`: encoders (float32) and head; onnxruntime agrees with torch within {model_difference:.1e}."
        )
        lines.append("`model.json`: what turns texts and photos into its inputs; tokenizers are not included.")
    made = f"Made by mmfeat {__version__} from the run {_plain(facts['run'])}."
    return "## Files\n\n" + "\n".join(f"- {line}" for line in lines) + f"\n\n{made}"

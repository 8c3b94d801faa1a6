"""Training of one cell of stage 2 (a fold with a seed, or all labelled samples with a seed), and its checkpoints.

Random numbers are drawn on the CPU from the entropy of the cell. A checkpoint is one safetensors file with parameters,
optimiser, stopping, the best state so far and the position in the order of samples, so a killed training ends in the
same weights as one that was never interrupted.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfeat.errors import HeadError, RunError
from mmfeat.evaluation.splits import Fold
from mmfeat.extraction.reader import prefetch
from mmfeat.finetune.inputs import FRESH_VIEWS, PartialInputs
from mmfeat.finetune.model import HEAD, TunableModel
from mmfeat.finetune.processes import Execution
from mmfeat.finetune.settings import FinetuneSettings
from mmfeat.heads.registry import HeadSettings
from mmfeat.heads.stack import epoch_steps, validation_scores
from mmfeat.heads.training import Draws, StackedLoss, Stopper, class_weights, draw_pieces
from mmfeat.samples.labels import Targets
from mmfeat.system.files import write_atomic
from mmfeat.system.wording import Advance

AHEAD = 4  # most steps whose inputs are read ahead of the running step
Step = tuple[Tensor, "Tensor | None", "Tensor | None", Tensor]  # rows, views, dropped, keep


def save(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    from safetensors.torch import save as to_bytes

    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(record)
    write_atomic(path, to_bytes(whole, metadata={"record": text, "xxh3": _checksum(whole, text)}))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the record of a file of `save`, None without the file. Raises `RunError` for a file that was
    changed or cut."""
    from safetensors import safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["xxh3"] != _checksum(tensors, metadata["record"]):
            raise ValueError("it is not what was saved")
        return tensors, json.loads(metadata["record"])
    except Exception as error:  # a damaged header raises many kinds of errors
        raise RunError(f"{path}: not whole ({error}); delete it and run mmfeat finetune again") from error


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    import xxhash

    digest = xxhash.xxh3_128(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class TrainingSetup:
    """Settings, rows and first weights of a cell. `start` holds the tensors of the stage-1 head, None for a random
    head. A cell without validation rows trains for len(replay) epochs, with `replay` as scales of the learning rate."""

    settings: HeadSettings
    finetune: FinetuneSettings
    rows: Fold
    entropy: tuple[int, ...]
    start: Mapping[str, Tensor] | None
    replay: tuple[float, ...] | None = None


@dataclass
class TrainingState:
    """The state of a training between two steps, of which `step` are done in the running epoch. The order of samples
    was drawn from the random generator in the state `order`, after the rows `waiting` from the epoch before."""

    epoch: int = 0
    step: int = 0
    updates: int = 0
    loss: float = 0.0
    scale: float = 1.0  # the factor of the learning rates at the last update
    seconds: float = 0.0
    order: dict[str, Any] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    stopper: dict[str, Any] = field(default_factory=dict)


class Training:
    """The training of one cell, epoch by epoch, from its checkpoint if there is one."""

    def __init__(
        self, model: TunableModel, setup: TrainingSetup, targets: Targets, execution: Execution, checkpoint: Path
    ):
        self.model, self.setup, self.targets, self.team = model, setup, targets, execution.team
        self.checkpoint, self.every, self.saved = checkpoint, execution.checkpoint_seconds, time.monotonic()
        self.since = self.saved
        settings, train = setup.settings, setup.rows.train
        self.settings = replace(settings, batch_size=min(settings.batch_size, len(train)))
        self.start = start_state(model, setup)
        model.load(self.start)
        self.draws = Draws(setup.entropy, train, self.settings, model.head.units)
        self.stopper = Stopper(self.settings, setup.replay)
        self.steps = epoch_steps(len(train), self.settings.batch_size)
        self.weights = class_weights(targets.take(train), settings.class_weights)
        self.loss = StackedLoss([self.settings], [self.weights], targets.multilabel, model.data.device)
        self.labels = torch.from_numpy(targets.matrix.astype(np.float32)).to(model.data.device)
        self.optimiser = torch.optim.AdamW(self._groups(), weight_decay=settings.weight_decay, foreach=True)
        self.scaler = torch.amp.GradScaler(torch.device(model.data.device).type, enabled=model.amp == "float16")
        # The sum of the epoch's losses stays on the device: reading it as a float would wait for the GPU.
        self.total = torch.zeros((), device=model.data.device)
        self.best: dict[str, Tensor] = {}
        self.state = TrainingState()
        self._note_order()
        self._resume()

    def run(self, advance: Advance) -> dict[str, Tensor]:
        """Train to the end and return the best state; `advance` receives the number of steps done."""
        while not self.stopper.done:
            self._epoch(advance)
        return self.best

    def _epoch(self, advance: Advance) -> None:
        state = self.state
        self._unfreeze(state.epoch)
        self.model.head.train()
        steps = itertools.islice(self._drawn(), state.step, None)
        for step, parts in prefetch(lambda step: (step, self._read(step)), steps, 1, AHEAD):
            self.total += self._step(step, parts)
            state.step += 1
            advance(1)
            if state.step < self.steps and state.step % self.setup.finetune.accumulate == 0:
                self._save_if_due()
        self._finish_epoch()

    def _note_order(self) -> None:
        """Note the state of the draws at the start of an epoch, from which a resumed training draws the epoch again."""
        self.state.order = dict(self.draws.random.bit_generator.state)
        self.state.waiting = self.draws.waiting.tolist()

    def _drawn(self) -> Iterator[Step]:
        """Draw the steps of this epoch: rows, views, dropped and keep, each (1, B, ...).

        They stay in memory, since asking a GPU for the rows to read ahead would wait for all steps before.
        """
        data = self.model.data
        views = FRESH_VIEWS if self.setup.finetune.augment else data.views
        for piece in draw_pieces([self.draws], self.steps, views, len(data.sources), "cpu"):
            yield from piece.steps()

    def _read(self, step: Step) -> list[PartialInputs]:
        rows, views = step[0][0].numpy(), step[1]
        return self.model.read(rows, np.zeros(len(rows), np.int64) if views is None else views[0].numpy())

    def _step(self, step: Step, parts: list[PartialInputs]) -> Tensor:
        """Add the gradient of a step, and update the parameters after every `accumulate` steps; returns the loss."""
        device = self.model.data.device
        rows, keep = (x.to(device, non_blocking=True) for x in (step[0], step[3]))
        views, dropped = (None if x is None else x.to(device, non_blocking=True) for x in step[1:3])
        accumulate, number = self.setup.finetune.accumulate, self.state.step
        scaled_keep = keep * (1 / (1 - self.settings.dropout))
        cached_views = None if self.setup.finetune.augment else views  # fresh views have no cached vectors
        logits = self.model.logits(parts, rows, cached_views, dropped, scaled_keep)
        loss = self.loss(logits, self.labels[rows])[0]
        self.scaler.scale(loss / min(accumulate, self.steps - (number - number % accumulate))).backward()
        if (number + 1) % accumulate == 0 or number + 1 == self.steps:
            self._update()
        return loss.detach()

    def _update(self) -> None:
        finetune = self.setup.finetune
        self._set_rates()
        moving = [p for p in self.model.encoder_parameters().values() if p.requires_grad]
        for parameter in moving if self.team.size > 1 else ():
            if parameter.grad is None:  # no sample in this process's part of the batch has the modality
                parameter.grad = torch.zeros_like(parameter)
        self.team.add([parameter.grad for parameter in moving if parameter.grad is not None])
        self.scaler.unscale_(self.optimiser)
        if finetune.clip_norm:
            torch.nn.utils.clip_grad_norm_(list(self.model.parameters().values()), finetune.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        self.state.updates += 1

    def _groups(self) -> list[dict[str, Any]]:
        finetune, slow = self.setup.finetune, self.model.head.attention_parameters()
        depths = {f"{n}.{name}": d for n, tower in enumerate(self.model.towers) for name, d in tower.depths.items()}

        def rate(name: str) -> float:
            if name in depths:
                return finetune.lr_encoder * finetune.layer_decay ** depths[name]
            return finetune.lr_attention if name.removeprefix(HEAD) in slow else finetune.lr_head

        by_rate: dict[float, list[str]] = {}
        for name in self.model.parameters():
            by_rate.setdefault(rate(name), []).append(name)
        parameters = self.model.parameters()
        return [{"params": [parameters[name] for name in names], "lr": r, "rate": r} for r, names in by_rate.items()]

    def _set_rates(self) -> None:
        """Set the learning rates of the next update: a linear warmup times the schedule."""
        finetune, done = self.setup.finetune, self.state.updates
        total = finetune.epochs * -(-self.steps // finetune.accumulate)
        warm = finetune.warmup * total
        scale = min(1.0, (done + 1) / warm) if warm else 1.0
        if finetune.schedule == "cosine":
            scale *= 0.5 * (1 + math.cos(math.pi * min(1.0, done / total)))
        elif finetune.schedule == "plateau":
            scale *= self.stopper.scale
        self.state.scale = scale
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * scale

    def _unfreeze(self, epoch: int) -> None:
        """Unfreeze gradually (Howard and Ruder, ACL 2018): one more layer in each epoch, the last layers first."""
        if self.setup.finetune.gradual:
            for tower in self.model.towers:
                for name, parameter in tower.parameters.items():
                    parameter.requires_grad_(tower.depths[name] <= epoch)

    def _finish_epoch(self) -> None:
        """Validate, record the epoch, keep the best state, and save a checkpoint if one is due."""
        state, loss = self.state, float(self.total) / self.steps
        scores = self._validate()
        if self.team.size > 1:
            self.model.load(self.team.shared(self.model.state()))
        if not np.isfinite([loss, *scores.values()]).all():
            finetune = self.setup.finetune
            raise HeadError(
                f"training diverged; lower --lr-encoder ({finetune.lr_encoder:g}) or --lr-head ({finetune.lr_head:g})"
            )
        scale = self.stopper.scale if self.setup.finetune.schedule == "plateau" else state.scale
        state.history.append({"epoch": state.epoch, "loss": loss, **scores, "scale": scale})
        by_loss = self.settings.monitor == "loss"
        score = -scores.get("validation_loss", 0.0) if by_loss else scores.get("validation_macro_f1", 0.0)
        if self.stopper.update(state.epoch, score):
            self.best = self.model.state()
        state.epoch, state.step = state.epoch + 1, 0
        self.total.zero_()
        self._note_order()
        self._save_if_due()

    def _validate(self) -> dict[str, float]:
        rows = self.setup.rows.validation
        if not len(rows):
            return {}
        scores = validation_scores(self.model.predict(rows), self.targets.take(rows), self.weights)
        return dict(zip(scores, self.team.agreed(list(scores.values())), strict=True))

    def _save_if_due(self) -> None:
        if self.team.leads and time.monotonic() - self.saved >= self.every and not self.stopper.done:
            self.save()

    def save(self) -> None:
        """Write the checkpoint atomically."""
        names = {id(parameter): name for name, parameter in self.model.parameters().items()}
        tensors = {f"model.{name}": value for name, value in self.model.state().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for parameter, values in self.optimiser.state.items():
            name = names[id(parameter)]
            tensors |= {f"optimiser.{key}.{name}": value for key, value in values.items()}
        self.state.loss, self.state.seconds, self.since = float(self.total), self.seconds, time.monotonic()
        stopper = asdict(self.stopper)
        self.state.stopper = {key: stopper[key] for key in stopper if key not in ("settings", "replay")}
        save(self.checkpoint, tensors, {**asdict(self.state), "scaler": self.scaler.state_dict()})
        self.saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training in this call and, up to their last checkpoints, in calls that were interrupted."""
        return self.state.seconds + time.monotonic() - self.since

    def _resume(self) -> None:
        if (checkpoint := load(self.checkpoint)) is None:
            return
        tensors, record = checkpoint
        parameters = self.model.parameters()
        self.model.load(tensors_under("model.", tensors))
        self.best = tensors_under("best.", tensors)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            for name, value in tensors_under(f"optimiser.{key}.", tensors).items():
                parameter = parameters[name]
                self.optimiser.state[parameter][key] = value if key == "step" else value.to(parameter.device)
        self.scaler.load_state_dict(record.pop("scaler"))
        self.state = TrainingState(**record)
        self.total.fill_(self.state.loss)
        for key, value in self.state.stopper.items():
            setattr(self.stopper, key, value)
        self.draws.random.bit_generator.state = self.state.order
        self.draws.waiting = np.array(self.state.waiting, np.int64)


def start_state(model: TunableModel, setup: TrainingSetup) -> dict[str, Tensor]:
    """The first weights of a cell: the stage-1 head, or a head drawn from the cell's entropy, behind towers with their
    weights from before any training."""
    if setup.start is not None:
        return {**model.first, **{HEAD + name: value[None] for name, value in setup.start.items()}}
    model.load(model.first)  # another cell may have trained this model
    seed = int(np.random.SeedSequence(setup.entropy).generate_state(1, np.uint64)[0] >> 1)
    model.head.reset_head(0, torch.Generator().manual_seed(seed))
    computed = model.data.statistics(np.union1d(setup.rows.train, setup.rows.validation), model.head.unit)
    statistics = {modality: list(pairs) for modality, pairs in computed.items()}
    for tower in model.towers:
        if tower.normed:
            statistics[tower.slot.modality][tower.slot.number] = (torch.zeros(tower.width), torch.ones(tower.width))
    model.head.standardise(0, statistics)
    return model.state()


def tensors_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, named without the prefix."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

"""The sweep: every head x modality over the same folds and seeds, scored out of fold, ranked with intervals.

Nothing is selected on the data it is scored on: early stopping and settings look at validation parts of the training
folds, thresholds and ensembles at the other folds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfeat.baselines.trees import NEEDS_LIGHTGBM
from mmfeat.encoders.names import listed
from mmfeat.encoders.registry import Tower
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, HeadError
from mmfeat.evaluation.protocol import GIVEN, Protocol
from mmfeat.extraction.arithmetic import resolve_encoders
from mmfeat.extraction.requests import Request, extraction_of
from mmfeat.heads.registry import (
    BASELINES,
    DEFAULTS,
    FUSIONS,
    LINEAR,
    NEEDS_TOKENS,
    ON_REQUEST,
    TWINS,
    ZERO_SHOT,
    HeadSettings,
    Plan,
    flag,
    is_fusion,
)
from mmfeat.runs.entry import RunConfig
from mmfeat.runs.leaderboard import AUTO, BOTH, MODALITY_SETS
from mmfeat.runs.record import Maker, written_call
from mmfeat.runs.run import ABLATION, RUN_FILE, Run, read_run, reuse_run
from mmfeat.samples.corrections import Rare, without_labels
from mmfeat.samples.dataset import Data, SampleSource, name_of
from mmfeat.samples.labels import MULTICLASS, ORDINAL, REGRESSION, TASKS
from mmfeat.samples.table_columns import TABLE
from mmfeat.sweep.class_names import class_texts, two_towers, with_class_vectors
from mmfeat.sweep.problem import LabelledData, read_labelled
from mmfeat.system.hardware import ENGINES, resolve_device, resolve_products
from mmfeat.system.notebook import Cells, Shown, Titled, usual_progress
from mmfeat.system.remote import absolute
from mmfeat.system.wording import Progress, duration, head_label
from mmfeat.version import install_command

if TYPE_CHECKING:
    from mmfeat.runs.compare import Partitions


def usable_towers(towers: Sequence[Tower]) -> list[Tower]:
    """Towers of pooled vectors, views included, and of tokens; prefixes are for fine-tuning."""
    usable = [tower for tower in towers if tower.spec.output in ("pooled", "tokens")]
    return [tower for tower in usable if tower.spec.output == "pooled" or tower.spec.view == "none"]


def needed_towers(towers: Sequence[Tower], pairs: Sequence[tuple[str, str]], attend: str) -> list[Tower]:
    """Towers whose outputs some head reads: tokens only for heads that read them, modalities that a head sees."""
    reads_tokens = attend == "tokens" and any(head == NEEDS_TOKENS for head, _ in pairs)
    seen = {modality for _, modality in pairs}
    needed = [tower for tower in towers if tower.spec.output == "pooled" or reads_tokens]
    # A run on a table alone names all encoders, so that it can be trained again.
    return [tower for tower in needed if {BOTH, tower.spec.modality} & seen] or needed


def choose_pairs(
    fusion: Sequence[str],
    baselines: Sequence[str],
    modalities: Sequence[str],
    towers: Sequence[Tower],
    attend: str,
    extraction: Callable[[], str],
    has_table: bool = False,
) -> list[tuple[str, str]]:
    """Each (head, modality set) to train; on one modality a head that equals another one there is left out.

    `extraction` writes the command that extracts token states.
    """
    present = {tower.spec.modality for tower in towers} | ({TABLE} if has_table else set())
    sets = _checked_modalities(modalities, present)
    heads = _checked_heads(fusion, FUSIONS, "--fusion") + _checked_heads(baselines, BASELINES, "--baselines")
    if not heads:
        raise HeadError("no head was asked for; name one with --fusion or --baselines")
    trees = [head for head in heads if head in NEEDS_LIGHTGBM]
    if trees and find_spec("lightgbm") is None:
        raise HeadError(f"--baselines {','.join(trees)} needs LightGBM; {install_command('boosting')}")
    pairs = [(head, m) for m in sets for head in heads if m == BOTH or TWINS.get(head) not in heads]
    if NEEDS_TOKENS not in heads or attend == "pooled":
        return pairs
    have = {tower.spec.modality for tower in towers if tower.spec.output == "tokens"} | {TABLE}
    lacking = [(head, m) for head, m in pairs if head == NEEDS_TOKENS and not (present if m == BOTH else {m}) <= have]
    if lacking and NEEDS_TOKENS in fusion:
        raise HeadError(
            f"--fusion {head_label(*lacking[0])} needs token states; run {extraction()} first, or let it attend to "
            "pooled vectors with --attend pooled"
        )
    return [pair for pair in pairs if pair not in lacking]


def _checked_heads(names: Sequence[str], known: Collection[str], flag: str) -> list[str]:
    """Names without repetition; `all` stands for every known one but those on request, and `none` for nothing."""
    everything = [name for name in known if name not in ON_REQUEST]
    wanted = [head for name in names for head in (everything if name == "all" else [name]) if head != "none"]
    if unknown := [name for name in wanted if name not in known and not (known is FUSIONS and is_fusion(name))]:
        hint = "; early fusion needs pixels: mmfeat finetune --fusion early" if "early" in unknown else ""
        raise HeadError(f"{flag} {','.join(unknown)}: use all, none, or some of {', '.join(known)}{hint}")
    return list(dict.fromkeys(wanted))


def _checked_modalities(names: Sequence[str], present: set[str]) -> list[str]:
    """The modality sets that the modalities `present` can serve; with one there is no `both`. AUTO stands for all."""
    names = MODALITY_SETS if [*names] == [AUTO] else names
    if not {*names} <= {*MODALITY_SETS}:
        raise HeadError(f"--modalities {','.join(names)}: use {AUTO}, or some of {', '.join(MODALITY_SETS)}")
    usable = [name for name in dict.fromkeys(names) if name in present or (name == BOTH and len(present) > 1)]
    if not usable:
        table = "" if TABLE in present or TABLE not in names else f"; --columns {TABLE}=... names columns"
        raise HeadError(f"--modalities {','.join(names)}: the encoders give {', '.join(sorted(present))} only{table}")
    return usable


CHEAP_BASELINES = ("prior", "knn", "ridge", "logistic", "svm", "kernel")
OF_NUMBERS = ("prior", "knn", "ridge", "kernel", "forest", "boosting")  # baselines of a regression
# Settings that no number has:
OF_CLASSES = ("label_smoothing", "class_weights", "loss", "focal_gamma", "monitor", "init")
NAMED_HEADS = 3  # heads in the name of a run folder; more names would be too long to read


@dataclass(frozen=True, repr=False)
class Sweep(Shown):
    """A run, whether it was there already, the folder of new splits for later runs, notes for the user, and how its
    scores stand to those on further partitions, if there are any."""

    run: Run
    reused: bool
    seconds: float
    new_splits: Path | None = None
    notes: tuple[str, ...] = ()
    partitions: Partitions | None = None

    def facts(self) -> list[str]:
        return [*self.run.facts(), "trained before" if self.reused else f"trained in {duration(self.seconds)}"]

    def cells(self) -> Cells:
        return self.run.cells()


def train_heads(
    data: Data,
    encoders: str | Sequence[str],
    *,
    cache: str | Path = "cache",
    out: str | Path = "heads",
    options: EncoderOptions | None = None,
    columns: Mapping[str, str] | None = None,
    fusion: str | Sequence[str] = ("all",),
    baselines: str | Sequence[str] = CHEAP_BASELINES,
    modalities: str | Sequence[str] = (AUTO,),
    protocol: Protocol | None = None,
    fold_seeds: int = 1,
    plan: Plan | None = None,
    ensembles: bool = True,
    task: str = MULTICLASS,
    order: Sequence[str] = (),
    rare: str | Rare = "",
    attend: str = "tokens",
    class_names: Mapping[str, str] | None = None,
    templates: str = "openai",
    products: str = "auto",
    engine: str = "local",
    ray_address: str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
    command: str = "",
) -> Sweep:
    """Train and rank heads on cached vectors; no finished step is repeated. Raises `CacheMissError` without them.

    With `fold_seeds` above 1, as many partitions into folds are compared, each a run of its own; the first is returned.
    """
    given = {**locals(), "data": name_of(data)}  # a frame has a name, by which the run records it
    first, *others = partitions_of(given)
    call = command or written_call(train_heads, given)
    sweep = _train_one(first, Maker(call, split_dir=first["protocol"].split_dir))
    if not others:
        return sweep
    from mmfeat.runs.compare import keep_partitions

    sweeps = [sweep]
    for other in others:
        sweeps.append(_train_one(other, Maker(call)))
        os.utime(sweep.run.folder / RUN_FILE)  # the newest run, which other commands take
    reused, seconds = all(one.reused for one in sweeps), sum(one.seconds for one in sweeps)
    return replace(sweep, reused=reused, seconds=seconds, partitions=keep_partitions([one.run for one in sweeps]))


def partitions_of(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of `train_heads` for each partition into folds, whose seeds follow that of the protocol."""
    count, first = given["fold_seeds"], given["protocol"] or Protocol()
    if count < 1:
        raise ConfigError(f"--fold-seeds {count}: at least 1 is needed")
    if count > 1 and first.split_dir:
        raise ConfigError(f"--fold-seeds {count}: draws other folds than those of --split-dir; leave out one of both")
    progress = given["progress"] or usual_progress()
    lists = {name: listed(given[name]) for name in ("encoders", "fusion", "baselines", "modalities", "order")}
    return [
        {
            **given,
            **lists,
            "protocol": replace(first, seed=first.seed + number),
            "progress": Titled(progress, f"partition {number + 1} of {count}: ") if number else progress,
        }
        for number in range(count)
    ]


def _train_one(given: Mapping[str, Any], maker: Maker) -> Sweep:
    """Train the heads of one partition."""
    work, device, attend = prepare_sweep(given), given["device"], given["attend"]
    labelled, notes = work.labelled, work.labelled.notes
    if work.is_done:
        return Sweep(reuse_run(work.folder, work.config), True, maker.seconds, labelled.new_splits, notes)
    from mmfeat.sweep.train_all import make_engine, train_run

    maker = replace(maker, device=resolve_device(device))
    features, lacking = labelled.load([tower.spec for tower in work.config.encoders])
    if work.config.class_names:
        features = with_class_vectors(features, work.config, work.towers, device, work.progress)
    places = given["workers"], given["ray_address"]
    runner = make_engine(given["engine"], features, labelled.targets, maker.device, attend, *places)
    run = train_run(
        labelled, features, runner, work.config.pairs or (), work.plan, work.config, work.folder, maker, work.progress
    )
    return Sweep(run, False, maker.seconds, labelled.new_splits, (*notes, *lacking))


@dataclass(frozen=True)
class SweepWork:
    """What a sweep is about to do: the labelled samples, all towers of the encoders, the run and its folder."""

    labelled: LabelledData
    towers: Sequence[Tower]
    config: RunConfig
    plan: Plan
    folder: Path
    progress: Progress

    @property
    def is_done(self) -> bool:
        """Whether the run is there already, and needs nothing."""
        return (self.folder / RUN_FILE).exists() and _is_done(read_run(self.folder), self.plan)


def prepare_sweep(given: Mapping[str, Any]) -> SweepWork:
    """Read the samples and choose the heads, by the arguments of a partition (`partitions_of`)."""
    data, progress = name_of(given["data"]), given["progress"]
    encoders, cache, columns, device = given["encoders"], given["cache"], given["columns"], given["device"]
    plan, protocol = given["plan"] or Plan(HeadSettings(), race=True), given["protocol"]
    task, order, attend, fusion = given["task"], given["order"], given["attend"], given["fusion"]
    baselines = _check(task, order, attend, given["engine"], device, given["baselines"], plan)
    asked = given["options"] or EncoderOptions()
    resolved = resolve_encoders(encoders, asked, SampleSource(data, without_labels(columns)), cache, device)
    options, described = resolved.options, resolved.towers
    towers, pairs = _choose(
        described, fusion, baselines, given["modalities"], attend, data, columns, encoders, options, cache
    )
    labelled = read_labelled(data, columns, cache, task, protocol, progress, order, given["rare"])
    if given["fold_seeds"] > 1 and labelled.protocol.kind == GIVEN:
        raise ConfigError(f"--fold-seeds {given['fold_seeds']}: the data have one split; --protocol kfold draws folds")
    config = RunConfig(
        **labelled.recorded,
        encoders=tuple(towers),
        options=options,
        attend=attend,
        pairs=tuple(pairs),
        ensembles=given["ensembles"],
        protocol=replace(labelled.protocol, split_dir=None),
        **(plan := _raced(plan, pairs, protocol)).recorded,
        products=resolve_products(given["products"], device),
        modalities=AUTO if [*given["modalities"]] == [AUTO] and BOTH in {m for _, m in pairs} else None,
        **_class_names(pairs, plan, described, labelled.targets.classes, given["class_names"], given["templates"]),
    )
    folder = Path(given["out"]) / config.name(_label(pairs))
    return SweepWork(labelled, described, config, plan, folder, progress)


def _for_numbers(baselines: Sequence[str], plan: Plan) -> Sequence[str]:
    """The baselines that predict numbers; those for classes are left out of the default and of `all`. Raises
    `ConfigError` for others, and for settings that only classes have."""
    varied = {name: plan.space.get(name, ()) or getattr(plan.settings, name) for name in OF_CLASSES}
    if wrong := next((name for name, value in varied.items() if value != getattr(DEFAULTS, name)), None):
        raise ConfigError(f"{flag(wrong)}: a setting for classes; leave it out with --task {REGRESSION}")
    if plan.adjustment is not None:
        raise ConfigError(f"--logit-adjustment: chooses among classes; leave it out with --task {REGRESSION}")
    if "all" in baselines or {"prior", "logistic", "svm"} <= {*baselines}:  # as in the default
        return [name for name in (BASELINES if "all" in baselines else CHEAP_BASELINES) if name in OF_NUMBERS]
    if wrong := next((name for name in baselines if name in BASELINES and name not in OF_NUMBERS), None):
        raise ConfigError(f"--baselines {wrong}: chooses among classes; for numbers there are {', '.join(OF_NUMBERS)}")
    return baselines


def _raced(plan: Plan, pairs: Sequence[tuple[str, str]], protocol: Protocol) -> Plan:
    """The plan, with a race only where heads can differ in the number of their seeds; a search uses all of them."""
    several = protocol.seeds > 1 and len(pairs) > 1 and any(is_fusion(head) for head, _ in pairs)
    return replace(plan, race=plan.race and several and not plan.space)


def _class_names(
    pairs: Sequence[tuple[str, str]],
    plan: Plan,
    towers: Sequence[Tower],
    classes: Sequence[str],
    given: Mapping[str, str] | None,
    templates: str,
) -> dict[str, Any]:
    """The fields of a `RunConfig` about class names; none where no head reads them."""
    heads = {head for head, _ in pairs}
    starts = ZERO_SHOT in (plan.settings.init, *_choices(plan, "init"))
    if starts and LINEAR not in heads:
        raise ConfigError(f"--init {ZERO_SHOT}: only the linear head starts from class names; add --fusion {LINEAR}")
    if not starts and ZERO_SHOT not in heads:
        if given:
            head = f"--baselines {ZERO_SHOT}, or --fusion {LINEAR} --init {ZERO_SHOT}"
            raise ConfigError(f"--class-names: no head reads them; add {head}")
        return {}
    if not two_towers(towers):
        flag = f"--init {ZERO_SHOT}" if starts else f"--baselines {ZERO_SHOT}"
        raise HeadError(f"{flag}: no encoder here has an image and a text tower; add one, such as clip, to --encoders")
    return {"class_names": class_texts(classes, given or {}, templates), "templates": templates}


def _choices(plan: Plan, name: str) -> Sequence[Any]:
    values = plan.space.get(name, ())
    return values if isinstance(values, Sequence) else ()


def _choose(
    towers: list[Tower],
    fusion: Sequence[str],
    baselines: Sequence[str],
    modalities: Sequence[str],
    attend: str,
    data: str,
    columns: Mapping[str, str] | None,
    encoders: Sequence[str],
    options: EncoderOptions,
    cache: str | Path,
) -> tuple[list[Tower], list[tuple[str, str]]]:
    """The pairs of head and modality that these towers allow, and the towers that they need."""

    def extraction() -> str:
        with_tokens = replace(options, outputs=("pooled", "tokens"))
        return extraction_of(Request(absolute(data), dict(columns or {}), list(encoders), with_tokens), cache)

    usable = usable_towers(towers)
    pairs = choose_pairs(fusion, baselines, modalities, usable, attend, extraction, TABLE in (columns or {}))
    return needed_towers(usable, pairs, attend), pairs


def _check(
    task: str, order: Sequence[str], attend: str, engine: str, device: str, baselines: Sequence[str], plan: Plan
) -> Sequence[str]:
    """The baselines for the task. Raises `ConfigError` for a value that a flag does not take."""
    if device not in ("auto", "cpu"):  # which need no torch
        resolve_device(device)
    for name, value, known in (
        ("--task", task, TASKS),
        ("--attend", attend, ("tokens", "pooled")),
        ("--engine", engine, ENGINES),
    ):
        if value not in known:
            raise ConfigError(f"{name} {value}: use one of {', '.join(known)}")
    if order and task != ORDINAL:
        raise ConfigError(f"--order {','.join(order)}: only classes of --task {ORDINAL} have an order")
    return _for_numbers(baselines, plan) if task == REGRESSION else baselines


def _is_done(run: Run, plan: Plan) -> bool:
    """Whether a finished run needs nothing: its files are whole, no search was cut short by time, and no more trials
    are asked for than before."""
    before = run.config.trials
    enough = not plan.space or before is None or (plan.trials is not None and plan.trials <= before)
    return enough and all(entry.search_over is not False for entry in run.leaderboard) and run.is_whole(ABLATION)


def _label(pairs: Sequence[Sequence[str]]) -> str:
    """The heads in the name of a run folder."""
    heads = list(dict.fromkeys(head for head, _ in pairs))
    return "-".join(heads) if len(heads) <= NAMED_HEADS else f"{len(heads)}-heads"

"""The sweep: every head x modality over the same folds and seeds, scored out of fold, ranked with intervals.

Nothing is selected on the data it is scored on: early stopping and settings look at validation parts of the training
folds, thresholds and ensembles at the other folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmfeat.encoders.registry import Tower, describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError
from mmfeat.evaluation.protocol import Protocol
from mmfeat.extraction.requests import resolve_options
from mmfeat.heads.settings import HeadSettings
from mmfeat.runs.config import RunConfig
from mmfeat.runs.record import Maker, written_call
from mmfeat.runs.run import ABLATION, LEADERBOARD, RUN_FILE, Run, finals_are_whole, read_run, reuse_run
from mmfeat.sweep.choice import MODALITY_SETS, choose_pairs, needed_towers, usable_towers
from mmfeat.sweep.problem import read_labelled
from mmfeat.sweep.search import METHODS, Plan
from mmfeat.system.hardware import resolve_device
from mmfeat.system.progress import Progress, Silent
from mmfeat.system.ray_cluster import ENGINES
from mmfeat.version import __version__

TASKS = ("multiclass", "multilabel")
CHEAP_BASELINES = ("prior", "knn", "ridge", "logistic", "svm")
NAMED_HEADS = 3  # of a run folder; the names of more would be too long to read
IN_MEMORY = 1 << 30  # bytes of pooled vectors; more stay on disk and are read batch by batch


@dataclass(frozen=True)
class Sweep:
    """A run, whether it was there already, where splits were written for later runs, and what a user should be told."""

    run: Run
    reused: bool
    seconds: float
    new_splits: Path | None = None
    notes: tuple[str, ...] = ()


def train_heads(
    data: str | Path,
    encoders: Sequence[str],
    *,
    cache: str | Path = "cache",
    out: str | Path = "heads",
    options: EncoderOptions | None = None,
    columns: Mapping[str, str] | None = None,
    fusion: Sequence[str] = ("all",),
    baselines: Sequence[str] = CHEAP_BASELINES,
    modalities: Sequence[str] = MODALITY_SETS,
    protocol: Protocol | None = None,
    plan: Plan | None = None,
    ensembles: bool = True,
    task: str = "multiclass",
    attend: str = "tokens",
    engine: str = "local",
    ray_address: str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
    command: str = "",
) -> Sweep:
    """Train and rank heads on the cached vectors of the labelled samples of `data`.

    The same configuration on the same data and vectors gives the same run folder: it is not trained twice, and what an
    interrupted call finished is not done again. `command` is recorded. Raises `CacheMissError` where vectors miss.
    """
    maker = Maker(command or written_call(train_heads, locals()), split_dir=protocol.split_dir if protocol else None)
    protocol, plan, progress = protocol or Protocol(), plan or Plan(HeadSettings()), progress or Silent()
    _check(task, attend, plan, engine)
    options = resolve_options(options or EncoderOptions(), device)
    towers, pairs = _choose(describe_encoders(list(encoders), options), fusion, baselines, modalities, attend)
    labelled = read_labelled(data, columns, cache, task, protocol, progress)
    config = RunConfig(
        version=__version__,
        columns=dict(columns or {}),
        **labelled.recorded,
        encoders=tuple(towers),
        options=options,
        task=task,
        attend=attend,
        pairs=tuple(pairs),
        ensembles=ensembles,
        protocol=replace(protocol, split_dir=None),
        plan=_plan_record(plan),
        trials=plan.trials,
    )
    folder = Path(out) / config.name(_label(pairs))
    if (folder / RUN_FILE).exists() and _is_done(read_run(folder), plan):
        return Sweep(reuse_run(folder, config), True, maker.seconds, labelled.new_splits, labelled.notes)
    from mmfeat.sweep.engine import make_engine
    from mmfeat.sweep.train_all import train_run

    features = labelled.store.load(labelled.labelled, [tower.spec for tower in towers], labelled.keys, IN_MEMORY)
    maker = replace(maker, device=resolve_device(device))
    runner = make_engine(engine, features, labelled.targets, maker.device, attend, workers, ray_address)
    run = train_run(labelled, features, runner, pairs, plan, config, folder, maker, progress)
    return Sweep(run, False, maker.seconds, labelled.new_splits, labelled.notes)


def _choose(
    towers: list[Tower], fusion: Sequence[str], baselines: Sequence[str], modalities: Sequence[str], attend: str
) -> tuple[list[Tower], list[tuple[str, str]]]:
    """The pairs of head and modality that these towers allow, and the towers that they need."""
    usable = usable_towers(towers)
    pairs = choose_pairs(fusion, baselines, modalities, usable, attend)
    return needed_towers(usable, pairs, attend), pairs


def _check(task: str, attend: str, plan: Plan, engine: str) -> None:
    for flag, value, known in (
        ("--task", task, TASKS),
        ("--attend", attend, ("tokens", "pooled")),
        ("--search", plan.method, METHODS),
        ("--engine", engine, ENGINES),
    ):
        if value not in known:
            raise ConfigError(f"{flag} {value}: use one of {', '.join(known)}")


def _is_done(run: Run, plan: Plan) -> bool:
    """Whether a finished run needs nothing: its files are whole, no search was cut short by time, and no more trials
    are asked for than then."""
    before = run.config.trials
    enough = not plan.space or before is None or (plan.trials is not None and plan.trials <= before)
    files = [run.folder / f"{LEADERBOARD}.csv", run.folder / f"{LEADERBOARD}.json", run.folder / ABLATION]
    return (
        enough
        and all(entry.search_over is not False for entry in run.leaderboard)
        and all(file.is_file() for file in files)
        and all(finals_are_whole(run.head_folder(entry), entry.final) for entry in run.leaderboard)
    )


def _plan_record(plan: Plan) -> dict[str, Any]:
    """For JSON; how long a search may take is no part of what it does: it can be prolonged."""
    record = {**asdict(plan), "time_limit": None, "trials": None}
    return {**record, "space": {name: _values(values) for name, values in plan.space.items()}}


def _values(values: Any) -> Any:
    return list(values) if isinstance(values, Sequence) else asdict(values)


def _label(pairs: Sequence[Sequence[str]]) -> str:
    """What a run folder is called after."""
    heads = list(dict.fromkeys(head for head, _ in pairs))
    return "-".join(heads) if len(heads) <= NAMED_HEADS else f"{len(heads)}-heads"

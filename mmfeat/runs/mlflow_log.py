"""MLflow: log a finished run to a tracking server or a local database, with MLflow's own client.

Each run becomes one MLflow run of the same name, with its settings as parameters, the scores of the best entry as
metrics, the scores of every entry as `HEAD-MODALITIES.SCORE`, the record as tags, and the tables as artifacts.
"""

from __future__ import annotations

import itertools
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from mmfeat.errors import ConfigError
from mmfeat.runs.compare import flat_settings
from mmfeat.runs.leaderboard import LEADERBOARD
from mmfeat.runs.run import ABLATION, RUN_FILE, Run
from mmfeat.system.trust import keep_private
from mmfeat.system.wording import without_passwords
from mmfeat.version import install_command

EXPERIMENT = "mmfeat"
ARTIFACTS = (f"{LEADERBOARD}.csv", f"{LEADERBOARD}.json", ABLATION, "report.html")
SQLITE = "sqlite:///"
LONGEST = 5000  # characters of a parameter or tag
SAME = ("mmfeat.run", "mmfeat.started")  # the tags that identify a run which was logged before
AT_ONCE = 100  # parameters or metrics in one call
_REFUSED = re.compile(r"[^\w\-. :]")  # and the slash, which MLflow accepts in some names only


def log_run(run: Run, uri: str) -> str:
    """Log a run to MLflow at `uri` (http://HOST:5000, sqlite:///mlflow.db); returns the id of its MLflow run.

    A run with the name and record of one that is logged already is not logged again. The artifacts of a local database
    go into a folder beside it. Raises `ConfigError` where MLflow is missing, and whatever its client raises.
    """
    keep_private()  # nothing is sent but to `uri`
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default 7 wait minutes for a dead server
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ConfigError(f"--mlflow needs MLflow's client; {install_command('mlflow')}") from error
    client = MlflowClient(tracking_uri=uri)
    experiment_id = _experiment(client, uri)
    tags = tags_of(run)
    for logged in client.search_runs([experiment_id], f"tags.`mmfeat.data_hash` = '{run.config.data_hash}'"):
        if logged.info.status == "FINISHED" and all(logged.data.tags.get(name, "") == tags[name] for name in SAME):
            return str(logged.info.run_id)
    id = client.create_run(experiment_id, run_name=run.folder.name, tags=tags, start_time=_started(run)).info.run_id
    status = "FAILED"
    try:
        _log_values(client, id, run)
        for name in ARTIFACTS:
            if (run.folder / name).is_file():
                client.log_artifact(id, str(run.folder / name))
        client.log_text(id, without_passwords((run.folder / RUN_FILE).read_text()), RUN_FILE)
        status = "FINISHED"
    finally:
        client.set_terminated(id, status)
    return str(id)


def tags_of(run: Run) -> dict[str, str]:
    """Return the tags of a run: command, data, fingerprints, parent, and the recorded versions and machine."""
    record = run.record
    tags = {name: str(getattr(record, name) or "") for name in ("command", "started", "parent")}
    tags |= {"data_hash": run.config.data_hash, "splits_hash": run.config.splits_hash, "run": run.folder.name}
    tags["fingerprints"] = ", ".join(sorted(run.fingerprints))
    for kind in ("versions", "machine"):
        tags |= {f"{kind}.{name}": str(value) for name, value in getattr(record, kind).items()}
    return {f"mmfeat.{name}": value[:LONGEST] for name, value in tags.items()}


def metrics_of(run: Run) -> dict[str, float]:
    """Return the metrics of a run: the scores of all entries, and those of the best one with interval and by class."""
    best, metrics = run.leaderboard[0], {}
    for entry, name in itertools.product(run.leaderboard, best.score_names):
        score = entry.score(name)
        if score.value is not None:
            metrics[_accepted(f"{entry.name}.{name}")] = score.value
            if entry is best:
                metrics |= {name: score.value, **{f"{name}_{end}": getattr(score, end) for end in ("low", "high")}}
    for label, row in best.classes.items():
        name = _accepted(f"f1_{label}")
        while name in metrics:  # two classes differ only in characters that MLflow refuses
            name += "_"
        metrics[name] = row.f1.value
    return metrics


def _log_values(client: Any, id: str, run: Run) -> None:
    from mlflow.entities import Metric, Param

    best = run.leaderboard[0]
    settings = {**flat_settings(run.config), "best.head": best.head, "best.modalities": best.modalities}
    params = [Param(_accepted(name), value[:LONGEST]) for name, value in settings.items()]
    moment = _started(run) or 0
    metrics = [Metric(name, value, moment, 0) for name, value in metrics_of(run).items()]
    for start in range(0, max(len(params), len(metrics)), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        client.log_batch(id, metrics=metrics[part], params=params[part])


def _experiment(client: Any, uri: str) -> str:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return str(experiment.experiment_id)
    location = {}
    if uri.startswith(SQLITE):  # MLflow would write artifacts into the working folder
        database = Path(uri.removeprefix(SQLITE)).absolute()
        location["artifact_location"] = (database.parent / f"{database.stem}-artifacts").as_uri()
    return str(client.create_experiment(EXPERIMENT, **location))


def _started(run: Run) -> int | None:
    """Return the recorded start of the training in milliseconds since 1970."""
    started = run.record.started
    return int(datetime.fromisoformat(started).timestamp() * 1000) if started else None


def _accepted(name: str) -> str:
    """Replace the characters of a name that MLflow refuses, and cut it to a length that MLflow accepts."""
    return _REFUSED.sub("_", name)[:250]

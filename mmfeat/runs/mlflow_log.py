"""MLflow: a finished run told to a tracking server or a local database, by MLflow's own client.

One MLflow run for each mmfeat run, called alike, with the settings as parameters, the scores of the best entry as
metrics, those of every entry under `HEAD-MODALITIES.SCORE`, what the record says as tags, and its tables as artifacts.
"""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from mmfeat.errors import ConfigError
from mmfeat.runs.compare import flat_settings
from mmfeat.runs.leaderboard import LEADERBOARD, SCORES
from mmfeat.runs.run import ABLATION, RUN_FILE, Run
from mmfeat.system.wording import without_passwords

EXPERIMENT = "mmfeat"
ARTIFACTS = (f"{LEADERBOARD}.csv", f"{LEADERBOARD}.json", ABLATION, "report.html")
SQLITE = "sqlite:///"
LONGEST = 5000  # characters of a parameter or tag
SAME = ("mmfeat.run", "mmfeat.started")  # tags by which a run is known again
AT_ONCE = 100  # parameters or metrics of a call
_ODD = re.compile(r"[^\w\-. :]")  # MLflow takes a slash, too, but not everywhere in a name


def log_run(run: Run, uri: str, experiment: str = EXPERIMENT) -> str:
    """Tell MLflow at `uri` (http://HOST:5000, sqlite:///mlflow.db) of a run; returns the id of its MLflow run.

    A run that is there already, of the same name and record, is not told again. Files of a local database go into a
    folder beside it. Raises `ConfigError` where MLflow is missing, and whatever its client raises.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a run is told where the user says, nowhere else
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its 7 make a dead server a wait of minutes
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ConfigError("--mlflow needs MLflow's client; pip install 'mmfeat[mlflow]'") from error
    client = MlflowClient(tracking_uri=uri)
    place = _experiment(client, uri, experiment)
    tags = tags_of(run)
    for found in client.search_runs([place], f"tags.`mmfeat.data_hash` = '{run.config.data_hash}'"):
        told = found.data.tags
        if found.info.status == "FINISHED" and all(told.get(name, "") == tags[name] for name in SAME):
            return str(found.info.run_id)
    id = client.create_run(place, run_name=run.folder.name, tags=tags, start_time=_started(run)).info.run_id
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
    """Command, data, fingerprints, parent, versions and machine, as far as the run has a record."""
    record = run.record
    tags = {name: str(getattr(record, name) or "") for name in ("command", "started", "parent")}
    tags |= {
        "data_hash": run.config.data_hash,
        "splits_hash": run.config.splits_hash,
        "run": run.folder.name,
    }
    tags["fingerprints"] = ", ".join(sorted(run.fingerprints))
    for kind in ("versions", "machine"):
        tags |= {f"{kind}.{name}": str(value) for name, value in getattr(record, kind).items()}
    return {f"mmfeat.{name}": value[:LONGEST] for name, value in tags.items()}


def metrics_of(run: Run) -> dict[str, float]:
    """Scores of the best entry with their intervals, and of all entries."""
    found = {}
    for number, entry in enumerate(run.leaderboard):
        name = entry.name
        for score in SCORES:
            value = entry.score(score).value
            if value is not None:
                found[_known(f"{name}.{score}")] = value
                if number == 0:
                    found[score] = value
                    found |= {f"{score}_{end}": getattr(entry.score(score), end) for end in ("low", "high")}
    for label, row in run.leaderboard[0].classes.items():
        name = _known(f"f1_{label}")
        while name in found:  # of a class whose name differs only in what MLflow does not take
            name += "_"
        found[name] = float(row.f1.value)
    return found


def _log_values(client: Any, id: str, run: Run) -> None:
    from mlflow.entities import Metric, Param

    best = run.leaderboard[0]
    settings = {**flat_settings(run.config), "best.head": best.head, "best.modalities": best.modalities}
    params = [Param(_known(name), value[:LONGEST]) for name, value in settings.items()]
    moment = _started(run) or 0
    metrics = [Metric(name, value, moment, 0) for name, value in metrics_of(run).items()]
    for start in range(0, max(len(params), len(metrics)), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        client.log_batch(id, metrics=metrics[part], params=params[part])


def _experiment(client: Any, uri: str, name: str) -> str:
    """Its id; made if it is new."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    beside = {}
    if uri.startswith(SQLITE):  # MLflow would write into the working folder
        database = Path(uri.removeprefix(SQLITE)).absolute()
        beside["artifact_location"] = (database.parent / f"{database.stem}-artifacts").as_uri()
    return str(client.create_experiment(name, **beside))


def _started(run: Run) -> int | None:
    """Milliseconds since 1970."""
    started = run.record.started
    return int(datetime.fromisoformat(started).timestamp() * 1000) if started else None


def _known(name: str) -> str:
    """A name that MLflow takes."""
    return _ODD.sub("_", name)[:250]

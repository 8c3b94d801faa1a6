"""Where jobs run, and how many heads are stacked, changes nothing about the heads."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfeat.cache.features import Features
from mmfeat.errors import ConfigError, HeadError, RunError
from mmfeat.evaluation.blending import mean_logits
from mmfeat.evaluation.decisions import fit_decision
from mmfeat.evaluation.splits import make_folds
from mmfeat.heads import jobs
from mmfeat.heads.data import HeadData
from mmfeat.heads.jobs import Engine, Job, LocalEngine, Workbench, restore_heads, run_job
from mmfeat.heads.registry import BASELINES, FUSIONS, NEEDS_TOKENS, HeadSettings
from mmfeat.heads.stack import Member, epoch_steps
from mmfeat.prediction.final_heads import EntryPredictor
from mmfeat.runs.entry import FinalHead, convert
from mmfeat.samples.labels import Targets
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.train_all import make_engine
from mmfeat.sweep.trials import HeadTrainer, Outcome, save_finals
from mmfeat.system.wording import ignore
from tests.heads.toy_features import (
    MULTILABEL,
    SAMPLES,
    TARGETS,
    TRAIN,
    VALIDATION,
    features,
    on_disk,
    with_tokens,
)
from tests.sweep.small_sweeps import made_up_entry, run_of, toy_task

SETTINGS = [HeadSettings(epochs=2, batch_size=16), HeadSettings(epochs=2, batch_size=16, learning_rate=3e-3)]
EVERYTHING = np.arange(SAMPLES)
IDS = tuple(map(str, EVERYTHING))


def trials(engine: Engine, head: str = "concat", settings: list[HeadSettings] = SETTINGS) -> list[Outcome]:
    """Two folds with two seeds of each setting."""
    splits = make_folds(TARGETS, IDS, EVERYTHING, folds=2, seed=5, repeats=2)
    task = Problem(IDS, TARGETS, splits, 2, 5)
    return HeadTrainer(task, engine, head, "both").run(settings, ignore)


def local(workers: int = 0, seen: Features | None = None) -> LocalEngine:
    return LocalEngine(seen or features(missing=0.2), TARGETS, "cpu", "", workers)


def assert_equal(first: list[Outcome], second: list[Outcome]) -> None:
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)
        np.testing.assert_array_equal(one.scores, other.scores)
        assert one.histories == other.histories
        assert one.best_epochs == other.best_epochs
        assert one.chosen == other.chosen


@pytest.mark.parametrize("head", ["concat", "ridge"])
def test_the_number_of_workers_does_not_matter(head: str) -> None:
    assert_equal(trials(local(1), head), trials(local(4), head))


@pytest.mark.parametrize("head", ["gated", "film-concat"])
def test_the_number_of_workers_matters_to_rounding_at_most(head: str) -> None:
    """It decides how heads are stacked, and a product with a single column sums in another order then."""
    for one, other in zip(trials(local(1), head), trials(local(4), head), strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(one.scores, other.scores)


def test_how_heads_are_stacked_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = trials(local())
    for size in (1, 2, 8):
        monkeypatch.setattr(jobs, "CPU_STACK", (size, size))
        for one, other in zip(usual, trials(local()), strict=True):
            np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-3)
            assert one.best_epochs == other.best_epochs


def test_tokens_count_in_what_a_head_needs() -> None:
    """At least as they are in a batch, and normed; a stack that is too large ends a sweep."""
    seen = with_tokens(features(), width=64, longest=50)
    needs = [
        jobs.training_bytes(NEEDS_TOKENS, HeadData(seen, "both", "cpu", attend), 3, 128)
        for attend in ("tokens", "pooled")
    ]
    assert needs[0] - needs[1] > 2 * 4 * 128 * 2 * 50 * 64


def test_settings_that_heads_must_share_are_stacked_apart() -> None:
    """Of other batch size or loss; the outcomes keep the order of the settings."""
    mixed = [HeadSettings(epochs=1, batch_size=16), HeadSettings(epochs=1, batch_size=32), SETTINGS[1]]
    mixed.append(HeadSettings(epochs=1, batch_size=16, loss="focal"))
    found = trials(local(), settings=mixed)
    assert [outcome.settings for outcome in found] == mixed
    for number, outcome in enumerate(found):
        (alone,) = trials(local(), settings=[mixed[number]])
        np.testing.assert_allclose(alone.logits, outcome.logits, rtol=0, atol=1e-3)


def test_a_trial_has_logits_of_every_row_from_the_fold_that_tests_it() -> None:
    splits = make_folds(TARGETS, IDS, EVERYTHING, folds=2, seed=5, repeats=2)
    (outcome,) = trials(local(), settings=SETTINGS[:1])
    bench = Workbench(features(missing=0.2), TARGETS, "cpu", "")
    for fold in range(2):
        for repeat in range(2):
            rows = splits.fold(fold, repeat)
            most = max(len(splits.fold(f, r).train) for f in range(2) for r in range(2))
            steps = epoch_steps(most, SETTINGS[0].batch_size)
            whole = np.setdiff1d(EVERYTHING, rows.test)
            member = Member(SETTINGS[0], rows.train, rows.validation, (5, fold, repeat), steps, fold=whole)
            (fitted,) = run_job(Job("concat", "both", (member,), ((rows.test,),)), bench)
            np.testing.assert_allclose(outcome.logits[repeat, rows.test], fitted.logits[0], rtol=0, atol=1e-3)


def test_closing_stops_what_runs_at_its_next_epoch() -> None:
    engine, started = local(1), threading.Event()
    endless = HeadSettings(epochs=100_000, patience=100_000, batch_size=16)
    member = Member(endless, TRAIN, VALIDATION, (1,), 2)
    waiting = [Job("concat", "both", (member,), ((VALIDATION,),))] * 2
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(engine.run, waiting, lambda steps, note="": started.set())
        assert started.wait(60)
        engine.close()
        with pytest.raises(BaseException) as caught:  # noqa: PT011 - what it is, is asked below
            result.result(60)
    assert isinstance(caught.value, KeyboardInterrupt)


def test_a_failing_job_is_the_error_of_the_run() -> None:
    with pytest.raises(HeadError, match="diverged; lower --learning-rate"):
        trials(local(), settings=[HeadSettings(epochs=2, learning_rate=1e30)])


def test_unknown_engines_are_refused() -> None:
    with pytest.raises(ConfigError, match="--engine cloud: use one of local, ray"):
        make_engine("cloud", features(), TARGETS, "cpu", "")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A real cluster of this machine's, with two workers."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # workers, too, read the made-up vectors on disk
        ray.init(num_cpus=2, object_store_memory=80 * 2**20, **options)
    yield ray
    ray.shutdown()


def test_ray_gives_the_very_same_heads(ray_cluster: Any) -> None:
    """In memory and from disk, fusions and baselines, an error as the line it is; a cluster that was there stays."""
    seen = features(missing=0.2)
    engine = make_engine("ray", seen, TARGETS, "cpu", "")
    for head in ("concat", "ridge"):
        assert_equal(trials(engine, head), trials(local(), head))
    with pytest.raises(HeadError, match=r"^a head diverged; lower --learning-rate \(now 1e\+30\)$"):
        trials(engine, settings=[HeadSettings(epochs=2, learning_rate=1e30)])
    disk = make_engine("ray", on_disk(seen), TARGETS, "cpu", "")
    assert_equal(trials(disk, settings=SETTINGS[:1]), trials(local(), settings=SETTINGS[:1]))
    engine.close()
    assert ray_cluster.is_initialized()


def test_closing_ends_what_runs_on_a_cluster_that_stays(ray_cluster: Any) -> None:
    """Nobody waits for it: an hour of training is over in seconds."""
    engine = make_engine("ray", features(), TARGETS, "cpu", "")
    endless = [HeadSettings(epochs=10**7, patience=10**7, batch_size=16)]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(trials, engine, "concat", endless)
        while not engine._waiting:
            time.sleep(0.01)
        time.sleep(1)
        engine.close()
        assert isinstance(future.exception(60), ray_cluster.exceptions.RayError)
    assert ray_cluster.is_initialized()


@pytest.mark.parametrize(
    ("head", "targets"),
    [*((head, TARGETS) for head in (*FUSIONS, *BASELINES)), *((head, MULTILABEL) for head in FUSIONS)],
)
def test_saved_heads_predict_the_same(head: str, targets: Targets, tmp_path: Path) -> None:
    """With missing vectors and views, through JSON and safetensors alone; no pickle. A head that was trained on compact
    tokens reads those of the cache."""
    seen = with_tokens(features(missing=0.1, views=1), width=100)
    seen = replace(seen, classes={block.name: np.eye(3, block.width, dtype=np.float32) for block in seen.blocks})
    attend = "tokens" if head == NEEDS_TOKENS else ""
    fold = np.union1d(TRAIN, VALIDATION)
    member = Member(SETTINGS[0], TRAIN, VALIDATION, (1,), 4, fold=fold, parts=(VALIDATION,))
    job = Job(head, "both", (member,), ((EVERYTHING,),), keep=True)
    (fitted,) = run_job(job, Workbench(seen, targets, "cpu", attend))
    (final,) = (convert(json.loads(json.dumps(asdict(each))), FinalHead) for each in save_finals(tmp_path, [fitted]))
    from safetensors.numpy import load_file

    data = HeadData(seen, "both", "cpu", attend)
    (found,) = restore_heads(head, final.config, [load_file(tmp_path / final.file)], 3, data)(data)
    np.testing.assert_allclose(found, fitted.logits[0], rtol=0, atol=1e-5)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_an_entry_of_two_heads_predicts_their_mean_and_no_damaged_one(tmp_path: Path) -> None:
    seen = features(missing=0.1)
    members = tuple(Member(SETTINGS[0], TRAIN, VALIDATION, (1, number), 4) for number in range(2))
    job = Job("concat", "both", members, ((EVERYTHING,),) * 2, keep=True)
    fitted = run_job(job, Workbench(seen, TARGETS, "cpu", ""))
    logits = np.stack([each.logits[0] for each in fitted])
    decision = fit_decision(logits[0, VALIDATION], TARGETS.take(VALIDATION), TARGETS.prior, None, 0)
    folder = tmp_path / "concat-both"
    folder.mkdir()
    made_up = made_up_entry(toy_task(), "concat", 1.0).entry
    entry = replace(made_up, decision=decision, final=save_finals(folder, fitted))
    run = run_of(tmp_path, TARGETS, [entry])
    chosen, probabilities = EntryPredictor(run, entry).predict(seen)
    expected = np.mean([decision.probabilities(each) for each in logits], axis=0)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_array_equal(chosen, decision.choose(mean_logits(logits, decision)))
    weights = folder / "final-1.safetensors"
    whole = weights.read_bytes()
    for broken in (b"torn", whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(broken)
        with pytest.raises(
            RunError, match=r"not a whole head \(final-1.safetensors is not what was saved\); the same mmfeat heads"
        ):
            EntryPredictor(run, entry).predict(seen)

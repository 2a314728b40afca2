"""Hopeless runs of a sweep: the rule by hand, and the callback on curves written by hand."""

import json
import math
import types

import pytest

pytest.importorskip("optuna")

from diffusion_lab.callbacks import PruneHopeless, was_pruned
from diffusion_lab.callbacks.prune import hopeless, newest, read_curve
from diffusion_lab.loggers import CSVMetrics
from diffusion_lab.modules.diffusion import DiffusionModule

OTHERS = [{100: 4.0, 200: 2.0}, {100: 5.0, 200: 3.0}, {100: 6.0, 200: 4.0}]
RULE = {"percentile": 50.0, "min_runs": 3, "direction": "minimize"}


@pytest.mark.parametrize(
    ("curve", "changes", "expected"),
    [
        ({100: 5.1}, {}, True),
        ({100: 5.0}, {}, False),
        # at its own place of the clock, and its best so far
        ({100: 4.9, 200: 3.1}, {}, True),
        ({100: 2.9, 200: 9.0}, {}, False),
        ({100: 5.1}, {"min_runs": 4}, False),
        ({100: 5.1}, {"percentile": 100.0}, False),
        ({100: 6.1}, {"percentile": 100.0}, True),
        ({100: 5.1}, {"direction": "maximize"}, False),
        ({100: 4.9}, {"direction": "maximize"}, True),
        # a place that nobody has been at
        ({150: 99.0}, {}, False),
    ],
)
def test_the_median_rule(curve, changes, expected):
    assert hopeless(curve, OTHERS, **{**RULE, **changes}) is expected


class Run:
    """A stand-in for a trainer and its module, with a real metrics.csv."""

    def __init__(self, folder, callback, batch=50):
        self.logger = CSVMetrics(dirpath=str(folder))
        self.trainer = types.SimpleNamespace(
            loggers=[self.logger], is_global_zero=True, world_size=1, should_stop=False, callbacks=[callback]
        )
        self.module = types.SimpleNamespace(images_seen=0, global_batch_size=batch)
        self.callback, self.batch = callback, batch

    def step(self, **metrics):
        self.module.images_seen += self.batch
        if metrics:
            self.logger.log_metrics(metrics, step=self.module.images_seen)
        self.callback.on_step(self.trainer, self.module)
        return self.trainer.should_stop


@pytest.fixture
def curves(tmp_path):
    folder = tmp_path / "curves"
    folder.mkdir()
    for number, curve in enumerate(OTHERS):
        (folder / f"{number}.json").write_text(json.dumps({"ended": True, "curve": curve}))
    return folder


def callback(curves, **changes):
    given = {"every_images": 100, "warmup_images": 0, "folder": str(curves), "job": "mine"}
    return PruneHopeless(**{**given, **changes})


def test_a_run_is_compared_at_its_interval_and_ended_with_a_reason(curves, tmp_path):
    one = callback(curves)
    run = Run(tmp_path / "run", one)
    assert not run.step(loss=99.0), "not yet an interval"
    assert not run.step(loss=4.5) and read_curve(curves / "mine.json") == ({100: 4.5}, False)
    assert not run.step(loss=4.5)
    assert run.step(loss=3.5)
    assert was_pruned([one]) == one.reason
    assert one.reason == "its value 3.5 at 200 images: not among the best 50 % of 3 runs there"


def test_runs_that_have_not_come_to_their_end_do_not_count(curves, tmp_path):
    (curves / "2.json").write_text(json.dumps({"ended": False, "curve": OTHERS[2]}))
    (curves / "3.json").write_text("{")
    run = Run(tmp_path / "run", callback(curves))
    assert not run.step() and not run.step(loss=50.0), "two are less than min_runs"


def test_warm_up_a_stale_value_and_no_sweep(curves, tmp_path):
    run = Run(tmp_path / "a", callback(curves, warmup_images=100))
    assert not run.step() and not run.step(loss=50.0) and not run.step() and run.step(loss=49.0)
    # logged once, and never again: nothing to compare
    run = Run(tmp_path / "b", callback(curves, warmup_images=100))
    assert not any([run.step(loss=50.0), *(run.step() for _ in range(5))])
    run = Run(tmp_path / "c", PruneHopeless(every_images=100, warmup_images=0))
    assert not run.step() and not run.step(loss=50.0)


def test_no_number_ends_a_run_at_once(curves, tmp_path):
    one = callback(curves, warmup_images=10**6, min_runs=99)
    run = Run(tmp_path / "run", one)
    assert not run.step() and run.step(loss=math.nan)
    assert one.reason == "the metric is nan at 100 images"


def test_other_batch_sizes_meet_at_the_same_places(curves, tmp_path):
    run = Run(tmp_path / "run", callback(curves), batch=64)
    assert not run.step(loss=9.0) and run.step(loss=9.0)
    assert read_curve(curves / "mine.json")[0] == {100: 9.0}


def test_a_resumed_run_forgets_what_lies_beyond_its_checkpoint(curves, monkeypatch):
    (curves / "mine.json").write_text(json.dumps({"ended": False, "curve": {100: 3.0, 200: 2.5, 300: 2.0}}))
    one = callback(curves)
    module = object.__new__(DiffusionModule)
    object.__setattr__(module, "__dict__", {"images_seen": 230})
    one.on_train_start(types.SimpleNamespace(), module)
    assert one.curve == {100: 3.0, 200: 2.5}


def test_which_metric(tmp_path):
    log = CSVMetrics(dirpath=str(tmp_path))
    log.log_metrics({"loss": 1.0}, step=50)
    assert newest(log.path, None, 0) == 1.0 and newest(log.path, "fd", 0) is None
    log.log_metrics({"fd@500/x/ema": 7.0}, step=60)
    assert newest(log.path, None, 0) == 7.0 == newest(log.path, "fd", 0)
    assert newest(log.path, "loss", 0) == 1.0 and newest(log.path, "loss", 51) is None
    assert newest(tmp_path / "none.csv", None, 0) is None


@pytest.mark.parametrize(
    "given",
    [
        {"every_images": 0},
        {"percentile": 101.0},
        {"min_runs": 0},
        {"direction": "up"},
        {"folder": "x"},
        {"warmup_images": -1},
    ],
)
def test_what_makes_no_sense_is_refused(given):
    with pytest.raises(ValueError, match="PruneHopeless"):
        PruneHopeless(**given)

"""A run that was interrupted, twice, ends bitwise where the uninterrupted one ends."""

import shutil

import pytest
from tiny_training import BATCH, assert_equal, everything, fit

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.modules import find_resumable


class Crash(StepCallback):
    """Dies after the step that reaches `at` images, as a kill would: nothing is saved on the way out."""

    def __init__(self, at):
        self.at = at

    def on_step(self, trainer, module):
        if module.images_seen >= self.at:
            raise InterruptedError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, {a: everything(*fit(folder / str(a), 31 * BATCH, accumulate=a)) for a in (1, 2)}


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_two_crashes_leave_no_trace(tmp_path, whole, workers, accumulate):
    folder, states = whole
    options = {"workers": workers, "accumulate": accumulate}
    with pytest.raises(InterruptedError):
        fit(tmp_path, 31 * BATCH, extra=[Crash(9 * BATCH)], **options)
    first, _ = find_resumable(tmp_path / "checkpoints")
    assert first.name == "images-0000000040.ckpt"
    with pytest.raises(InterruptedError):
        fit(tmp_path, 31 * BATCH, resume=first, extra=[Crash(23 * BATCH)], **options)
    second, _ = find_resumable(tmp_path / "checkpoints")
    assert second.name == "images-0000000160.ckpt"
    module, trainer = fit(tmp_path, 31 * BATCH, resume=second, **options)
    assert_equal(everything(module, trainer), states[accumulate])
    for log in ("metrics.csv", "loss_by_noise_level.csv"):
        assert (tmp_path / log).read_text() == (folder / str(accumulate) / log).read_text()
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"images-{n:010d}.ckpt" for n in (200, 240, 248)]


def test_the_test_can_fail(tmp_path, whole):
    # losing the state of one part is noticed
    folder, states = whole
    shutil.copytree(folder / "1", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "images-0000000240.ckpt"
    module, trainer = fit(tmp_path / "run", 31 * BATCH, resume=checkpoint)
    assert_equal(everything(module, trainer), states[1])
    module, trainer = fit(tmp_path / "run", 31 * BATCH, resume=checkpoint, seed=5)
    with pytest.raises(AssertionError):
        assert_equal(everything(module, trainer), states[1])


def test_a_finished_run_resumed_trains_nothing_and_rewrites_nothing(tmp_path, whole):
    folder, states = whole
    shutil.copytree(folder / "1", tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "images-0000000248.ckpt"
    before = last.stat().st_mtime_ns, (tmp_path / "run" / "metrics.csv").read_text()
    module, trainer = fit(tmp_path / "run", 31 * BATCH, resume=last)
    assert_equal(everything(module, trainer), states[1])
    assert (last.stat().st_mtime_ns, (tmp_path / "run" / "metrics.csv").read_text()) == before

import os
import signal

import pytest
import torch
from tiny_training import BATCH, assert_equal, everything, fit, make_scores

from diffusion_lab.callbacks import FrechetDuringTraining, Preemption, SampleGrid, was_preempted
from diffusion_lab.callbacks.base import StepCallback


class Signal(StepCallback):
    def __init__(self, at, number):
        self.at, self.number = at, number

    def on_step(self, trainer, module):
        if module.images_seen == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_continues_exactly(tmp_path, number):
    before = signal.getsignal(number)
    module, trainer = fit(tmp_path / "run", 20 * BATCH, every=10**6, extra=[Signal(7 * BATCH, number)])
    assert module.images_seen == 7 * BATCH
    assert was_preempted(trainer.callbacks)
    assert signal.getsignal(number) == before
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "images-0000000056.ckpt"
    resumed = everything(*fit(tmp_path / "run", 20 * BATCH, every=10**6, resume=checkpoint))
    module, trainer = fit(tmp_path / "whole", 20 * BATCH, every=10**6)
    assert not was_preempted(trainer.callbacks)
    assert_equal(resumed, everything(module, trainer))


def test_a_signal_leaves_no_time_for_pictures_and_scores(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(SampleGrid, "draw", lambda *_: made.append("picture"))
    monkeypatch.setattr(FrechetDuringTraining, "measure", lambda *_: made.append("score"))
    scores = make_scores(tmp_path, every=10**6)
    fit(tmp_path / "run", 20 * BATCH, every=10**6, extra=[Signal(7 * BATCH, signal.SIGTERM), *scores])
    assert made == []
    fit(tmp_path / "whole", 7 * BATCH, every=10**6, extra=scores)
    assert sorted(made) == ["picture", "score"]


def test_handlers_are_put_back_after_an_error(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError):
        fit(tmp_path, 9 * BATCH, spoil=3 * BATCH)
    assert signal.getsignal(signal.SIGTERM) == before


def test_unknown_signal_is_refused():
    with pytest.raises(ValueError, match="SIGNOPE"):
        Preemption(signals=["SIGNOPE"])


def test_nothing_is_saved_twice(tmp_path):
    saved = []

    class Spy(StepCallback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved.append(checkpoint["global_step"])

    fit(tmp_path, 10 * BATCH, every=5 * BATCH, extra=[Spy()])
    assert saved == [5, 10]
    assert (
        torch.load(tmp_path / "checkpoints" / "images-0000000080.ckpt", weights_only=True)["global_step"]
        == 10
    )

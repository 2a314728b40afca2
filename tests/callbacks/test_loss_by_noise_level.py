import csv
import math

import pytest
import torch
from tiny_training import BATCH, fit

from diffusion_lab.callbacks import LossByNoiseLevel
from diffusion_lab.callbacks.base import StepCallback


class Terms(StepCallback):
    def __init__(self):
        self.logsnr, self.loss = [], []

    def on_step(self, trainer, module):
        self.logsnr += [t.logsnr for t in module.terms]
        self.loss += [t.per_example for t in module.terms]


def test_bins_hold_the_means_of_their_examples(tmp_path):
    spy = Terms()
    fit(tmp_path, 3 * BATCH, extra=[spy], accumulate=2)
    logsnr, loss = torch.cat(spy.logsnr), torch.cat(spy.loss).double()
    assert len(logsnr) == 3 * BATCH
    rows = list(csv.DictReader((tmp_path / "loss_by_noise_level.csv").open()))
    assert len(rows) == 5 and {row["images_seen"] for row in rows} == {"24"}
    assert sum(int(row["count"]) for row in rows) == 3 * BATCH
    for i, row in enumerate(rows):
        low, high = float(row["logsnr_from"]), float(row["logsnr_to"])
        assert (low, high) == (-15 + 6 * i, -9 + 6 * i)
        inside = (logsnr >= low) & (logsnr < high)
        assert int(row["count"]) == int(inside.sum())
        if inside.any():
            assert float(row["loss"]) == pytest.approx(float(loss[inside].mean()), rel=1e-12)
        else:
            assert math.isnan(float(row["loss"]))


def test_the_ends_are_open(tmp_path):
    narrow = LossByNoiseLevel(
        every_images=BATCH, bins=2, logsnr_min=-0.1, logsnr_max=0.1, dirpath=str(tmp_path / "n")
    )
    fit(tmp_path, BATCH, extra=[narrow])
    assert [row["count"] for row in narrow.last] and sum(row["count"] for row in narrow.last) == BATCH


@pytest.mark.parametrize(
    "options", [{"bins": 0}, {"logsnr_min": 3.0, "logsnr_max": 3.0}, {"every_images": -5}]
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ValueError, match="LossByNoiseLevel"):
        LossByNoiseLevel(**options)

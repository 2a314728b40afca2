import pytest
import torch
from tiny_training import BATCH, fit, make_module

from diffusion_lab.callbacks import Throughput
from diffusion_lab.callbacks.throughput import flop_per_example


def test_operations_of_a_linear_network_are_counted_by_hand():
    module = make_module()
    batch = {"x0": torch.randn(8, 1, 4, 4), "label": torch.zeros(8, dtype=torch.long)}
    # 17 -> 32 -> 16: 2 operations a weight forward, 2 for its gradient, 2 for the gradient of its input;
    # the embedding added to the first input makes that gradient necessary too
    forward = 2 * (17 * 32 + 32 * 16)
    assert flop_per_example(module.denoiser, batch) == 3 * forward
    assert all(p.grad is None for p in module.parameters())


def test_counting_changes_nothing_and_values_are_logged(tmp_path):
    from tiny_training import assert_equal, everything

    throughput = Throughput(every_images=3 * BATCH)
    counted = everything(*fit(tmp_path / "a", 12 * BATCH, extra=[throughput]))
    assert_equal(counted, everything(*fit(tmp_path / "b", 12 * BATCH)))
    header, *rows = (tmp_path / "a" / "metrics.csv").read_text().splitlines()
    columns = header.split(",")
    assert throughput.images_per_s > 0
    values = dict(zip(columns, rows[-1].split(","), strict=True))
    assert float(values["images_per_s"]) == throughput.images_per_s
    assert float(values["model_tflop_per_s"]) == pytest.approx(
        throughput.images_per_s * throughput.flop / 1e12
    )


def test_paused_time_does_not_count(tmp_path, monkeypatch):
    from diffusion_lab.callbacks import throughput as module
    from diffusion_lab.callbacks.base import StepCallback

    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    class Clock(StepCallback):
        """Each step takes one second; before every other one there is a pause of ten."""

        def on_step(self, trainer, m):
            now[0] += 1.0
            if m.step % 2:
                now[0] += 10.0
                m.paused_s += 10.0

    throughput = Throughput(every_images=4 * BATCH)
    fit(tmp_path, 12 * BATCH, extra=[Clock(), throughput])
    assert throughput.images_per_s == pytest.approx(BATCH)

from types import SimpleNamespace

import pytest
import torch
from tiny_training import BATCH, fit

from diffusion_lab.callbacks import GradientNorm, Progress
from diffusion_lab.callbacks.progress import clock


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    fit(tmp_path, 30 * BATCH, extra=[Progress(plain_s=1e-9)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training")]
    assert len(lines) == 31  # every step, and the end
    assert "240 / 240 (100%) images  loss 0." in lines[-1] and "images/s" in lines[-1]
    assert "left" in lines[5]


def test_few_lines_by_default(tmp_path, capsys):
    fit(tmp_path, 30 * BATCH, extra=[Progress()])
    assert capsys.readouterr().out.count("training") == 1


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    fit(tmp_path, 30 * BATCH, extra=[Progress(refresh_s=1e-9)])
    out = capsys.readouterr().out
    assert "240 / 240 (100%)" in out and "\x1b[" in out


def test_text():
    assert (
        Progress.line(500, 0.25, 100.0, 1000)
        == "500 / 1,000 (50%) images  loss 0.2500  100 images/s  0:00:05 left"
    )
    assert Progress.line(500, 0.25, 0.0, None) == "500 images  loss 0.2500  0 images/s"
    assert clock(3723.4) == "1:02:03"
    with pytest.raises(ValueError, match="positive"):
        Progress(refresh_s=0.0)


def test_with_several_processes_the_loss_is_that_of_all():
    module = SimpleNamespace(step_loss=lambda: torch.tensor(1.0))
    norm = GradientNorm()
    trainer = SimpleNamespace(world_size=2, callbacks=[norm])
    assert Progress._loss(trainer, module) == (1.0, "loss of process 0")
    norm.loss = torch.tensor(3.0)
    assert Progress._loss(trainer, module) == (3.0, "loss")
    trainer.world_size = 1
    assert Progress._loss(trainer, module) == (1.0, "loss")
    assert "loss of process 0 0.5000" in Progress.line(1, 0.5, 0.0, None, "loss of process 0")

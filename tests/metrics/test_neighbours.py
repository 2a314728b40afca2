"""Precision and recall where they can be counted by hand."""

import pytest
import torch

from diffusion_lab.metrics.precision_recall import precision_recall

D64 = torch.float64


def line(*values):
    return torch.tensor(values, dtype=D64)[:, None]


def test_counted_by_hand():
    real = line(0.0, 1.0, 2.0, 10.0)
    # with k = 1 the balls of the real points reach 1, 1, 1 and 8
    samples = line(0.5, 2.9, 3.2, 17.9, 18.1, -1.5)
    precision, recall = precision_recall(samples, real, k=1)
    # 0.5, 2.9, 3.2 (in the ball of 10) and 17.9 are inside
    assert precision == 4 / 6
    # samples' balls reach 2, .3, .3, .2, .2, 2: around 0.5 it covers 0, 1 and 2
    assert recall == 3 / 4


def test_the_same_set_has_both_whole_and_a_far_one_none():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=D64)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x + 1000.0, x) == (0.0, 0.0)


def test_one_of_two_modes_costs_recall_and_not_precision():
    draw = torch.Generator().manual_seed(0)
    modes = torch.tensor([[-20.0, 0.0], [20.0, 0.0]], dtype=D64)
    real = torch.randn(400, 2, generator=draw, dtype=D64) + modes[torch.arange(400) % 2]
    samples = torch.randn(400, 2, generator=draw, dtype=D64) + modes[0]
    precision, recall = precision_recall(samples, real)
    assert precision > 0.9 and 0.4 < recall < 0.52


def test_blocks_change_nothing(monkeypatch):
    x, y = (torch.randn(40, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    whole = precision_recall(x, y)
    monkeypatch.setattr("diffusion_lab.metrics.precision_recall.ROWS", 7)
    assert precision_recall(x, y) == whole


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="features"):
        precision_recall(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="k=3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(5, 2))

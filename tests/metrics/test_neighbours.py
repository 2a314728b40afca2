"""Precision, recall, density and coverage where they can be counted by hand."""

import pytest
import torch

from diffusion_lab.metrics import neighbours
from diffusion_lab.metrics.neighbours import distances, manifolds, nearest, precision_recall

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


def test_density_and_coverage_counted_by_hand():
    real = line(0.0, 1.0, 2.0, 10.0)
    # with k = 1 the real balls are [-1, 1], [0, 2], [1, 3] and [2, 18]
    samples = line(0.5, 0.5, 2.5, 30.0)
    found = manifolds(samples, real, k=1, k_density=1)
    assert found.density == (2 + 2 + 2 + 0) / 4
    assert found.coverage == 1.0  # 0.5 lies in the first two, 2.5 in the others
    assert found.precision == 3 / 4
    # with k = 2 they are [-2, 2], [0, 2], [0, 4], [1, 19]
    found = manifolds(samples, real, k=1, k_density=2)
    assert found.density == (3 + 3 + 2 + 0) / (2 * 4)
    found = manifolds(line(0.5, 30.0, 40.0), real, k=1, k_density=1)
    assert (found.coverage, found.density) == (2 / 4, 2 / 3)
    assert manifolds(line(30.0, 40.0, 60.0), real, k=1, k_density=1)[2:] == (0.0, 0.0)


def test_a_point_on_the_surface_is_inside_and_a_copy_is_at_distance_zero():
    x = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)) + 100.0
    assert nearest(x, x, 2)[:, 0].abs().max() == 0
    # every point lies in its own ball, and on the surface of the k-th balls that reach exactly to it
    found = manifolds(x, x, k=3, k_density=3)
    assert found == (1.0, 1.0, (30 + 3 * 30) / (3 * 30), 1.0)


def test_distances_are_those_of_the_definition_also_far_from_the_origin():
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(40, 6, generator=draw), torch.randn(50, 6, generator=draw)
    for shift in (0.0, 1e4):
        truth = torch.cdist(
            (a + shift).double(), (b + shift).double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        near = truth.sort(dim=1).values[:, :3]
        torch.testing.assert_close(nearest(a + shift, b + shift, 3), near, rtol=1e-9, atol=0)


def test_blocks_change_nothing(monkeypatch):
    x, y = (torch.randn(40, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    whole = manifolds(x, y), nearest(x, y, 4)
    monkeypatch.setattr(neighbours, "CELLS", 7 * 40)
    monkeypatch.setattr(neighbours, "COLUMNS", 9)
    assert manifolds(x, y) == whole[0]
    torch.testing.assert_close(nearest(x, y, 4), whole[1], rtol=1e-12, atol=0)
    assert [len(block.squares) for block in distances(x, y)] == [7] * 5 + [5]


def test_the_precision_and_recall_of_torch_fidelity():
    from torch_fidelity.metric_prc import prc_features_to_metric

    draw = torch.Generator().manual_seed(2)
    real, samples = torch.randn(300, 5, generator=draw), torch.randn(250, 5, generator=draw) * 0.7 + 0.2
    theirs = prc_features_to_metric(samples, real, prc_neighborhood=3, prc_batch_size=100, verbose=False)
    precision, recall = precision_recall(samples, real, k=3)
    assert 0.5 < recall < precision < 1
    assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="features"):
        precision_recall(torch.zeros(5, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="k=3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="k_density=5"):
        manifolds(torch.zeros(9, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="3 nearest"):
        nearest(torch.zeros(9, 2), torch.zeros(2, 2), 3)
    with pytest.raises(ValueError, match="there are none"):
        nearest(torch.zeros(0, 2), torch.zeros(2, 2), 1)

"""Bits per dimension by hand, and the interval against SciPy."""

import math

import pytest
import torch
from scipy import stats

from diffusion_lab.likelihood import bits_per_dim, interval

D64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=D64)


def test_a_staircase_by_hand():
    # two levels at -1 and 1, so bins [-2, 0) and [0, 2), w = 2; a density of 1/8 on the one and 3/8 on the other gives
    # P = 1/4 and 3/4: 2 bits, and log2(4/3)
    nll = -torch.log(tensor(1 / 8, 3 / 8))
    torch.testing.assert_close(bits_per_dim(nll, 1, 2.0), tensor(2.0, math.log2(4 / 3)))
    # three such pixels: the same a dimension
    torch.testing.assert_close(bits_per_dim(3 * nll, 3, 2.0), tensor(2.0, math.log2(4 / 3)))


@pytest.mark.parametrize(("width", "constant"), [(1 / 256, 8.0), (2 / 256, 7.0), (2 / 255, math.log2(127.5))])
def test_the_usual_constants(width, constant):
    # of a density of 1: nothing but the bin
    assert float(bits_per_dim(tensor(0.0), 12, width)) == pytest.approx(constant, rel=1e-14)


def test_the_unit_of_the_data_does_not_matter():
    # the same law on [0, 1] and on [-1, 1]: the density halves a dimension
    nll = tensor(5.0)
    torch.testing.assert_close(
        bits_per_dim(nll + 7 * math.log(2), 7, 2 / 256), bits_per_dim(nll, 7, 1 / 256), rtol=1e-14, atol=0
    )
    with pytest.raises(ValueError, match="dims >= 1"):
        bits_per_dim(nll, 0, 0.1)
    with pytest.raises(ValueError, match="bin_width"):
        bits_per_dim(nll, 1, 0.0)


def test_the_interval_is_students():
    values = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=D64)
    found = interval(values)
    low, high = stats.ttest_1samp(values.numpy(), 0.0).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(
        low
    ) and found.mean + found.half_width == pytest.approx(high)
    assert found.standard_error == pytest.approx(float(stats.sem(values.numpy()))) and found.n == 12
    one = interval(values[:1])
    assert one.n == 1 and math.isnan(one.standard_error) and one.mean == float(values[0])
    with pytest.raises(ValueError, match="at least one"):
        interval(values[:0])

"""Bytes: rounding, not flooring; exact round trips; nothing scaled twice."""

import pytest
import torch

from diffusion_lab.images import to_float, to_uint8


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert torch.equal(to_uint8(to_float(levels).double()), levels)


def test_rounding_has_no_bias_where_flooring_loses_half_a_level():
    x = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    exact = (x + 1) * 127.5
    assert abs((to_uint8(x).double() - exact).mean()) < 1e-3
    assert ((exact.to(torch.uint8).double() - exact).mean() + 0.5).abs() < 1e-2
    assert (to_uint8(x).double() - exact).abs().max() <= 0.5 + 1e-9
    between = torch.tensor([(10.4 / 127.5) - 1, (10.6 / 127.5) - 1])
    assert to_uint8(between).tolist() == [10, 11]


def test_values_outside_are_clamped_and_half_precision_is_widened():
    assert to_uint8(torch.tensor([-7.0, 7.0, float("inf"), -float("inf")])).tolist() == [0, 255, 255, 0]
    x = torch.linspace(-1, 1, 511).to(torch.bfloat16)
    assert torch.equal(to_uint8(x), to_uint8(x.double()))


def test_wrong_kinds_are_refused():
    with pytest.raises(TypeError, match="floats"):
        to_uint8(torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"):
        to_float(torch.zeros(2))
    broken = torch.zeros(3, 1, 2, 2)
    broken[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 3 images hold nan"):
        to_uint8(broken)

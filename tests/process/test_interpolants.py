"""Interpolants against their definitions, and their limits."""

import math

import pytest
import torch

from diffusion_lab.process import RectifiedFlow, VarianceExploding, VariancePreserving

ALL = [VariancePreserving(), VarianceExploding(), RectifiedFlow()]
LOGSNR = torch.linspace(-20, 20, 81, dtype=torch.float64)


@pytest.mark.parametrize("interpolant", ALL, ids=lambda i: type(i).__name__)
def test_coefficients_give_back_the_logsnr(interpolant):
    alpha, sigma = interpolant(LOGSNR)
    torch.testing.assert_close(2 * (alpha.log() - sigma.log()), LOGSNR, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("interpolant", "constant"),
    [
        (VariancePreserving(), lambda a, s: a**2 + s**2),
        (VarianceExploding(), lambda a, s: a),
        (RectifiedFlow(), lambda a, s: a + s),
    ],
    ids=["vp", "ve", "rf"],
)
def test_defining_relation(interpolant, constant):
    alpha, sigma = interpolant(LOGSNR)
    torch.testing.assert_close(constant(alpha, sigma), torch.ones_like(LOGSNR), rtol=0, atol=1e-15)


@pytest.mark.parametrize("interpolant", ALL, ids=lambda i: type(i).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits_are_exact(interpolant, dtype):
    alpha, sigma = interpolant(torch.tensor([math.inf, -math.inf], dtype=dtype))
    assert (alpha[0], sigma[0]) == (1, 0)
    assert (alpha[1], sigma[1]) == ((1, math.inf) if isinstance(interpolant, VarianceExploding) else (0, 1))


@pytest.mark.parametrize("interpolant", ALL, ids=lambda i: type(i).__name__)
def test_half_precision_is_promoted(interpolant):
    alpha, sigma = interpolant(torch.tensor([13.3], dtype=torch.bfloat16))
    assert alpha.dtype == sigma.dtype == torch.float32

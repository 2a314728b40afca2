"""Adams weights: they integrate polynomials exactly, from tiny to infinite steps."""

import math

import numpy as np
import pytest
from scipy.integrate import quad

from diffusion_lab.samplers.adams import adams_weights, lagrange, moments


@pytest.mark.parametrize("c", [1e-8, 1e-3, 0.3, 0.99, 1.0, 1.01, 5.0, 40.0])
def test_moments(c):
    for k, found in enumerate(moments(c, 4)):
        expected, _ = quad(lambda s, k=k: math.exp(-s) * (1 - s / c) ** k, 0, c, epsabs=1e-15, epsrel=1e-13)
        assert found == pytest.approx(expected, rel=1e-12)


def test_an_infinite_step_has_all_its_weight_at_the_end():
    assert moments(math.inf, 4).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("c", [1e-6, 0.4, 3.0])
@pytest.mark.parametrize("points", [[0.0], [0.0, -0.3], [0.0, -2.0, 1.0], [0.0, -1.0, -1.5, 1.0]])
def test_polynomials_are_integrated_exactly(points, c):
    weights, M = adams_weights(points, c), moments(c, len(points))
    for k in range(len(points)):
        assert float(np.dot(weights, np.power(points, k))) == pytest.approx(M[k], rel=1e-12)
        np.testing.assert_allclose(
            lagrange(points) @ np.power(0.7, range(len(points))) @ np.power(points, k), 0.7**k, atol=1e-13
        )


@pytest.mark.parametrize("last", [-0.7, 1.0])
def test_the_variants_are_one_half_with_two_outputs_and_nothing_else(last):
    for variant, B in (("bh1", 0.8), ("bh2", 1 - math.exp(-0.8))):
        M0, other = 1 - math.exp(-0.8), 0.5 * B / last
        assert adams_weights([0.0, last], 0.8, variant) == pytest.approx([M0 - other, other], rel=1e-14)
        for points in ([0.0], [0.0, -1.2, last]):
            assert adams_weights(points, 0.8, variant) == adams_weights(points, 0.8)


def test_unipcs_linear_system_has_the_same_weights():
    # R rho = b of the paper, section 3: R_km = u_m^{k-1}, b_k = k! phi_{k+1}(-h) / B, data prediction, hh = -h
    h, points = 0.6, [-0.8, -2.1, 1.0]
    hh, B = -h, math.expm1(-h)
    b, phi, factorial = [], math.expm1(hh) / hh - 1, 1
    for k in range(1, 4):
        b.append(phi * factorial / B)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    rho = np.linalg.solve([np.power(points, k) for k in range(3)], b)
    weights = -B * rho / points
    assert adams_weights([0.0, *points], h)[1:] == pytest.approx(list(weights), rel=1e-11)

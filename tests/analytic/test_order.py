"""Deterministic samplers converge at their order, in every interpolant.

Protocol: the 1-D mixture, from half log-SNR -2.5 to 2.5 (log-SNR -5 to 5) in N = 40, 80, 160, 320 equal steps,
largest error over 9 starts against a reference of 20,000 Heun steps. The samplers end at +inf by contract, so the
trajectory is read at log-SNR 5 through `on_step`; what follows is one call and moves nothing before it.
"""

import math

import pytest
from problems import DETERMINISTIC, INTERPOLANTS, solve

from diffusion_lab.samplers import Heun

ORDER = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}


@pytest.fixture(scope="module")
def reference():
    return solve(Heun(), INTERPOLANTS["vp"], 20_000)


@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
@pytest.mark.parametrize("name", ORDER)
def test_order_of_convergence(name, interpolant, reference):
    errors = [
        float((solve(DETERMINISTIC[name], interpolant, n) - reference).abs().max())
        for n in (40, 80, 160, 320)
    ]
    order = math.log2(errors[2] / errors[3])
    assert ORDER[name] - 0.35 <= order <= ORDER[name] + 0.35, errors
    assert errors[3] < errors[0]


def test_reference_is_converged(reference):
    assert float((solve(Heun(), INTERPOLANTS["vp"], 10_000) - reference).abs().max()) < 1e-6

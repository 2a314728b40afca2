"""Deterministic samplers converge at their order, in every interpolant.

Protocol: the 1-D mixture, from half log-SNR -2.5 to 2.5 (log-SNR -5 to 5) in N = 160 and 320 equal steps,
largest error over 9 starts against SciPy's DOP853. The samplers end at +inf by contract, so the
trajectory is read at log-SNR 5 through `on_step`; what follows is one call and moves nothing before it. The other
samplers' orders are checked beside their own tests, with the same `laws.check_order`.
"""

import pytest
from laws import check_order
from problems import INTERPOLANTS, exact_ends, solve

from diffusion_lab.samplers import DDIM, DPMSolverPP2M, Euler, Heun


@pytest.mark.parametrize(
    ("sampler", "order"), [(DDIM(), 1), (Euler(), 1), (Heun(), 2), (DPMSolverPP2M(), 2)], ids=str
)
def test_order_of_convergence(sampler, order):
    check_order(sampler, order)


@pytest.mark.parametrize("steps", [{"warp": 1.5}, {"uneven": 0.3}], ids=str)
def test_order_of_a_multistep_method_on_unequal_steps(steps):
    # uneven: a method that takes its past steps for equal ones has order 1 here, and 2 on any smooth grid
    check_order(DPMSolverPP2M(), 2, **steps)


@pytest.mark.slow
def test_the_reference_is_where_many_steps_lead():
    # second order: 3e-7 is what 10,000 steps leave
    assert float((solve(Heun(), INTERPOLANTS["vp"], 10_000) - exact_ends()).abs().max()) < 1e-6

"""DEIS: its weights against the paper's integrals, its orders, and agreement with diffusers and k-diffusion."""

import math

import laws
import numpy as np
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, mixture_1d, mixture_4d
from scipy.integrate import quad

from diffusion_lab.process import Cosine, LinearBeta, LinearLogSNR
from diffusion_lab.samplers import DDIM, CountingDenoiser
from diffusion_lab.samplers.deis import DEIS, rho_weights, time_weights
from diffusion_lab.samplers.grids import karras, uniform_u

VARIANTS = {
    f"{variant}-{order}": DEIS(order=order, variant=variant)
    for variant in ("rhoab", "tab")
    for order in (1, 2, 3, 4)
}
every = pytest.mark.parametrize("sampler", VARIANTS.values(), ids=VARIANTS.keys())


@every
def test_laws(sampler):
    laws.check_everything(sampler)


@pytest.mark.parametrize("schedule", [LinearLogSNR(), Cosine()], ids=["logsnr", "cosine"])
def test_laws_in_another_time(schedule):
    laws.check_everything(DEIS(schedule=schedule))


@every
def test_one_call_a_step(sampler):
    counting = CountingDenoiser(mixture_1d(INTERPOLANTS["vp"]))
    sampler(counting, torch.zeros(2, 1, dtype=D64), uniform_u(PURE_COSINE, 7))
    assert counting.calls == 7


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_rhoab_on_equal_steps_is_adams_bashforth(order):
    rho = 3.0 - 0.25 * np.arange(5)
    levels = tuple((-2 * np.log(rho))[3::-1][:order].tolist())
    textbook = {
        1: [1],
        2: [3 / 2, -1 / 2],
        3: [23 / 12, -16 / 12, 5 / 12],
        4: np.array([55, -59, 37, -9]) / 24,
    }
    found = rho_weights(levels, float(-2 * np.log(rho[4])))
    np.testing.assert_allclose(found, -0.25 * np.array(textbook[order]), rtol=1e-11)


@pytest.mark.parametrize(
    "levels", [(-3.0,), (0.5, -0.4), (4.0, 3.0, 1.0), (0.0, -0.7, -1.1, -3.0), (-6.0, -8.0)]
)
@pytest.mark.parametrize("step", [0.01, 1.0, 9.0, 24.0])
def test_tab_weights_are_the_papers_integrals_over_time(levels, step):
    # C_j = int 1/2 Psi(t_next, t) beta / sigma L_j(t) dt with Psi = alpha_next / alpha, for eps, under the VP SDE
    b0, b1 = 0.1, 20.0

    def time(logsnr):
        # alpha^2 = exp(-B), B = b0 t + (b1 - b0) t^2 / 2 = log(1 + e^-logsnr)
        B = math.log1p(math.exp(-logsnr))
        return 2 * B / (b0 + math.sqrt(b0**2 + 2 * (b1 - b0) * B))

    end = levels[0] + step
    ts, t_next = [time(level) for level in levels], time(end)
    alpha_next = math.sqrt(1 / (1 + math.exp(-end)))
    for j, C in enumerate(time_weights(LinearBeta(), levels, end)):

        def integrand(root, j=j):
            # t = root^2, without which 1 / sigma is singular at the clean end
            t = root**2
            B = b0 * t + (b1 - b0) * t**2 / 2
            alpha, sigma = math.exp(-B / 2), math.sqrt(-math.expm1(-B))
            L = math.prod((t - s) / (ts[j] - s) for k, s in enumerate(ts) if k != j)
            return root * alpha_next / alpha * (b0 + (b1 - b0) * t) / sigma * L

        expected, _ = quad(
            integrand, math.sqrt(ts[0]), math.sqrt(t_next), epsabs=1e-14, epsrel=1e-12, limit=400
        )
        assert alpha_next * C == pytest.approx(expected, rel=1e-8, abs=1e-11)


@pytest.mark.parametrize("step", [0.01, 1.0, 30.0])
def test_the_weights_sum_to_the_step_in_rho(step):
    levels = (-8.0, -8.5, -10.0)
    gap = math.exp(-0.5 * (levels[0] + step)) - math.exp(4.0)
    assert sum(rho_weights(levels, levels[0] + step)) == pytest.approx(gap, rel=1e-12)
    assert sum(time_weights(LinearBeta(), levels, levels[0] + step)) == pytest.approx(gap, rel=1e-12)


@pytest.mark.parametrize("variant", ["rhoab", "tab"])
def test_order_one_is_ddim(variant):
    sampler = DEIS(order=1, variant=variant)
    for interpolant in INTERPOLANTS.values():
        assert torch.equal(laws.run(sampler, interpolant), laws.run(DDIM(), interpolant))


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("variant", ["rhoab", "tab"])
def test_order(variant, order):
    laws.check_order(DEIS(order=order, variant=variant), order)


# DDIM's first step caps the global order at 2 as the steps shrink, so 3 and 4 are shown on one step. It ends at log-SNR
# 0 and not at the protocol's 1, where tab's error constant for order 4 changes sign between the starts.
@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("variant", ["rhoab", "tab"])
def test_local_order(variant, order):
    laws.check_local_order(DEIS(order=order, variant=variant), order, end=0.0)


# ---- public code -----------------------------------------------------------------------------------------------------

GRID = karras(0.05, 20.0, 7.0, 12)


def trajectory(sampler, interpolant):
    """The start, and the samples after each step."""
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=D64)
    start, xs = interpolant(GRID[0])[1] * start, []
    sampler(mixture_4d(interpolant), start, GRID, on_step=lambda k, logsnr, x, x0: xs.append(x))
    return start, xs


def assert_agree(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) < tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers(order):
    # the scheduler's polynomial is in log rho (its "logrho"), which is tab in a time linear in log-SNR; it knows
    # neither the paper's rhoab nor the time of a schedule. Its last step is nan: 0 times log 0.
    diffusers = pytest.importorskip("diffusers")
    vp, steps = INTERPOLANTS["vp"], len(GRID) - 1
    start, ours = trajectory(DEIS(order=order, schedule=LinearLogSNR()), vp)
    scheduler = diffusers.DEISMultistepScheduler(
        solver_order=order, prediction_type="sample", lower_order_final=False
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.exp(-GRID / 2)
    problem, x, theirs = mixture_4d(vp), start, []
    for t, logsnr in zip(scheduler.timesteps[:-1], GRID, strict=False):
        x = scheduler.step(problem(x, logsnr), t, x).prev_sample
        theirs.append(x)
    assert_agree(ours[:-1], theirs, 1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_k_diffusion(order, sampling):
    # rhoab is k-diffusion's linear multistep method: sigma is rho with alpha = 1, and the slope there is eps. To sigma
    # = 0 it still extrapolates, where the contract here is the denoiser's output, so the last step is left out.
    ve, sigmas, xs = INTERPOLANTS["ve"], torch.exp(-GRID / 2), []
    start, ours = trajectory(DEIS(order=order, variant="rhoab"), ve)
    problem = mixture_4d(ve)
    sampling.sample_lms(
        lambda x, sigma: problem(x, -2 * torch.log(sigma)),
        start,
        sigmas,
        callback=lambda of: xs.append(of["x"]),
        disable=True,
        order=order,
    )
    assert_agree(ours[:-1], xs[1:], 1e-12)


@pytest.mark.parametrize("options", [{"order": 0}, {"order": 5}, {"variant": "logrho"}])
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError):
        DEIS(**options)

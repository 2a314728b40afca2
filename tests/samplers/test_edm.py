"""EDM's stochastic sampler against its algorithm, k-diffusion and diffusers."""

import math
from itertools import pairwise

import laws
import peers
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, gaussian, mixture_1d

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.process.gaussian import add_noise
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import CountingDenoiser, Heun
from diffusion_lab.samplers.edm import EDM, ChurnedHeun
from diffusion_lab.samplers.grids import karras, uniform_u

GRID = karras(0.02, 80.0, 7.0, 18)
VE = INTERPOLANTS["ve"]
WINDOW = dict(noise_min=0.05, noise_max=50.0)


def mixture(interpolant=VE):
    """Three components in five dimensions."""
    draw = torch.Generator().manual_seed(5)
    return GaussianMixtureDenoiser(
        means=torch.randn(3, 5, generator=draw, dtype=D64),
        variances=torch.tensor([0.3, 0.1, 0.2], dtype=D64) ** 2,
        weights=torch.tensor([0.5, 0.2, 0.3], dtype=D64),
        interpolant=interpolant,
    )


class Tape:
    """Noise handed out in order; what was taken can be played again."""

    def __init__(self, seed, shape, n):
        draw = torch.Generator().manual_seed(seed)
        self.noise, self.taken = torch.randn(n, *shape, generator=draw, dtype=D64), 0

    def randn_like(self, x):
        self.taken += 1
        return self.noise[self.taken - 1].to(x.dtype)


def trajectory(sampler, denoiser, x, grid, rng=None):
    seen = []
    sampler(denoiser, x, grid, rng=rng, on_step=lambda k, logsnr, x, x0: seen.append(x))
    return seen


@pytest.mark.parametrize(
    "sampler",
    [
        EDM(),
        EDM(churn=5.0),
        EDM(churn=1e3),
        EDM(churn=40.0, noise_scale=1.003, **WINDOW),
        ChurnedHeun(gamma=0.1),
    ],
    ids=str,
)
def test_laws(sampler):
    laws.check_everything(sampler)


def test_without_churn_it_is_heun_bitwise_and_of_order_two():
    laws.check_order(EDM(), 2)
    for interpolant in INTERPOLANTS.values():
        assert torch.equal(laws.run(EDM(), interpolant), laws.run(Heun(), interpolant))
        # churn outside the window of noise levels is no churn
        nowhere = EDM(churn=10.0, noise_min=1e6, noise_max=1e7)
        assert torch.equal(laws.run(nowhere, interpolant), laws.run(Heun(), interpolant))


@pytest.mark.parametrize("churn", [pytest.param(20.0, marks=pytest.mark.slow), 80.0])
def test_marginals(churn):
    laws.check_marginals(EDM(churn=churn))


def test_adding_noise_is_the_forward_process():
    z = torch.linspace(-2, 2, 7, dtype=D64)[:, None]
    x0, eps = z.flip(0) ** 2, torch.sin(z)
    for name, interpolant in INTERPOLANTS.items():
        logsnr, logsnr_hat = torch.tensor([1.2, -0.7], dtype=D64)
        (alpha, sigma), (alpha_hat, sigma_hat) = interpolant(logsnr), interpolant(logsnr_hat)
        x = alpha * x0 + sigma * eps
        got = add_noise(interpolant, x, z, logsnr, logsnr_hat)
        # in y = x / alpha: y + sqrt(rho_hat^2 - rho^2) z
        rho, rho_hat = sigma / alpha, sigma_hat / alpha_hat
        expected = alpha_hat * (x / alpha + torch.sqrt(rho_hat**2 - rho**2) * z)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
        assert torch.equal(add_noise(interpolant, x, z, logsnr, logsnr), x)
        if name != "ve":
            assert torch.equal(add_noise(interpolant, x, z, *torch.full((2,), -math.inf, dtype=D64)), x)
        # levels per sample
        rows = add_noise(interpolant, x, z, logsnr.expand(7), logsnr_hat.expand(7))
        torch.testing.assert_close(rows, got, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("churn", "noise_scale"), [(4.0, 1.0), (40.0, 1.003)])
def test_k_diffusion_agrees(churn, noise_scale, monkeypatch):
    sampling = peers.k_diffusion_sampling()
    denoiser, steps = mixture(), len(GRID) - 1
    sigmas = torch.cat([torch.exp(-0.5 * GRID[:-1]), torch.zeros(1, dtype=D64)])
    x = 80 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=D64)
    # k-diffusion draws at every step and uses what it drew within the window; we draw only there
    inside = [0.05 <= float(sigma) <= 50.0 for sigma in sigmas[:-1]]
    assert 0 < sum(inside) < steps
    tape, seen = Tape(1, x.shape, steps), []
    draws = iter([tape.noise[sum(inside[:k])] if inside[k] else torch.zeros_like(x) for k in range(steps)])
    monkeypatch.setattr(torch, "randn_like", lambda x: next(draws))
    end = sampling.sample_heun(
        lambda x, sigma: denoiser(x, -2 * torch.log(sigma)),
        x,
        sigmas,
        callback=lambda info: seen.append((info["i"], info["denoised"])),
        disable=True,
        s_churn=churn,
        s_tmin=0.05,
        s_tmax=50.0,
        s_noise=noise_scale,
    )
    firsts = []

    class First:
        """Keeps the denoiser's first output of each step, which is what the callback shows."""

        interpolant = VE

        def __call__(self, x, logsnr, cond=None):
            x0 = denoiser(x, logsnr, cond)
            firsts.append(x0)
            return x0

    sampler = EDM(churn=churn, noise_scale=noise_scale, **WINDOW)
    ours = trajectory(sampler, First(), x, GRID, rng=tape)
    assert tape.taken == sum(inside)
    assert len(seen) == steps and len(firsts) == 2 * steps - 1
    for k, theirs in seen:
        torch.testing.assert_close(firsts[2 * k], theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours[-1], end, rtol=0, atol=1e-10)


def test_diffusers_heun_agrees_without_churn():
    diffusers = pytest.importorskip("diffusers")
    denoiser, x = mixture(), 80 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=D64)
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample")
    sigmas = torch.exp(-0.5 * GRID[:-1])
    scheduler.set_timesteps(len(sigmas))
    # its own layout: each inner level twice, since a step is two calls
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), torch.zeros(1, dtype=D64)])
    scheduler.timesteps = torch.arange(len(scheduler.sigmas) - 1)
    scheduler.set_begin_index(0)
    ours, theirs, y = trajectory(EDM(), denoiser, x, GRID), [], x
    for k, timestep in enumerate(scheduler.timesteps):
        level = -2 * torch.log(scheduler.sigmas[k])
        y = scheduler.step(denoiser(y, level), timestep, y).prev_sample
        theirs += [y] if k % 2 == 1 or k == len(scheduler.timesteps) - 1 else []
    assert len(theirs) == len(ours)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_diffusers_edm_euler_is_our_step_before_heuns_correction(monkeypatch):
    """EDMEulerScheduler is algorithm 2 without its lines 6 to 8, so after Euler's step both are at the same x'.

    It takes the denoiser's output as an argument and adds the noise afterwards: used plainly, it combines the output
    at (x, rho) with x_hat and rho_hat. Here it is given the output where algorithm 2 asks for it, at (x_hat, rho_hat).
    """
    diffusers = pytest.importorskip("diffusers")
    module = __import__("diffusers.schedulers.scheduling_edm_euler", fromlist=["randn_tensor"])
    denoiser, sigmas = mixture(), torch.exp(-0.5 * GRID[:-1])
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(len(sigmas))
    scheduler.sigmas, scheduler.is_scale_input_called = torch.cat([sigmas, torch.zeros(1, dtype=D64)]), True
    x = 80 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=D64)
    gamma, worst = EDM(churn=5.0).stepper(len(sigmas)).gamma, 0.0
    tape = Tape(2, x.shape, len(sigmas))
    for k, (logsnr, logsnr_next) in enumerate(pairwise(GRID)):
        asked = []

        class Asked:
            interpolant = VE

            def __call__(self, x, logsnr, cond=None, asked=asked):
                asked.append((x, denoiser(x, logsnr)))
                return asked[-1][1]

        x_next, _ = ChurnedHeun(gamma=gamma).step(Asked(), x, logsnr, logsnr_next, None, tape)
        monkeypatch.setattr(module, "randn_tensor", lambda *a, k=k, **b: tape.noise[k])
        x0 = asked[0][1]
        euler, _ = scheduler.step(
            x0,
            scheduler.timesteps[k],
            x,
            s_churn=5.0,
            s_noise=1.0,
            pred_original_sample=x0,
            return_dict=False,
        )
        x_euler = asked[1][0] if len(asked) == 2 else x_next
        scale = max(1.0, float(sigmas[k]))
        worst = max(worst, float((euler - x_euler).abs().max()) / scale)
        x = x_next
    assert worst < 1e-5


def test_a_churned_step_leaves_a_gaussian_as_it_should():
    # a step on N(0, c) is linear in x and z, so the variance after it is known in closed form
    c, gamma, logsnr, logsnr_next = 0.5, 0.05, torch.tensor(0.4, dtype=D64), torch.tensor(0.42, dtype=D64)
    for interpolant in INTERPOLANTS.values():
        problem = gaussian(interpolant, c)
        ones, zeros = torch.ones(1, 1, dtype=D64), torch.zeros(1, 1, dtype=D64)

        class Given:
            def __init__(self, z):
                self.z = z

            def randn_like(self, x):
                return self.z

        step = ChurnedHeun(gamma=gamma).step
        gain = float(step(problem, ones, logsnr, logsnr_next, None, Given(zeros))[0])
        spread = float(step(problem, zeros, logsnr, logsnr_next, None, Given(ones))[0])
        (alpha, sigma), (alpha_next, sigma_next) = interpolant(logsnr), interpolant(logsnr_next)
        got = gain**2 * float(alpha**2 * c + sigma**2) + spread**2
        # exact but for Heun's local error; without the noise it would be 3 % off
        assert got == pytest.approx(float(alpha_next**2 * c + sigma_next**2), rel=1e-4)
        assert spread**2 > 0.01


def test_gamma_counts_the_steps_and_is_bounded():
    assert EDM(churn=5.0).stepper(20).gamma == 0.25
    assert EDM(churn=1e9).stepper(20).gamma == math.sqrt(2) - 1
    # the sampler takes N from its grid
    tape = [Tape(0, (3, 1), 40) for _ in range(2)]
    x = torch.ones(3, 1, dtype=D64)
    ends = [
        sampler(mixture_1d(VE), x, GRID, rng=rng)
        for sampler, rng in zip((EDM(churn=1.8), ChurnedHeun(gamma=0.1)), tape, strict=True)
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-13)


def test_calls_are_counted_truly_and_noise_needs_a_source():
    counting = CountingDenoiser(mixture_1d(VE))
    EDM(churn=5.0)(counting, torch.zeros(2, 1, dtype=D64), GRID, rng=SampleRNG([0, 1]))
    assert counting.calls == 2 * (len(GRID) - 1) - 1
    with pytest.raises(ValueError, match="draws noise"):
        EDM(churn=5.0)(mixture_1d(VE), torch.zeros(2, 1, dtype=D64), GRID)
    for bad in (dict(churn=-1.0), dict(noise_min=2.0, noise_max=1.0), dict(noise_scale=-1.0)):
        with pytest.raises(ValueError, match="EDM needs"):
            EDM(**bad)
    with pytest.raises(ValueError, match="grid"):
        EDM()(mixture_1d(VE), torch.zeros(1, 1, dtype=D64), uniform_u(PURE_COSINE, 2)[-1:])

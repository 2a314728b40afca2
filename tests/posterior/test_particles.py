"""Particles: the tilted law in closed form, its bias at few particles, the same sample in any batch, true costs."""

import math
from functools import partial

import laws
import numpy as np
import pytest
import torch
from problems import ALL_SAMPLERS, D64, INTERPOLANTS, STOCHASTIC, gaussian, mixture_1d

from diffusion_lab.guidance import CADS, ClassifierFree, Projected
from diffusion_lab.posterior.particles import Particles, RewardWeights
from diffusion_lab.posterior.resampling import Ahead, _taken, effective_size, systematic
from diffusion_lab.process import Cosine
from diffusion_lab.rewards import Brightness, MeasurementLikelihood
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, DDPM, CountingDenoiser, Generation, Stepper
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.typing import MEASUREMENT, SEED

VP = INTERPOLANTS["vp"]
GRID = uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), 10)
# DDPM with the upper variance is exact on N(0, 1), but for the last step, which returns the mean: its law is N(0, V)
EXACT = DDPM(interpolation=1.0)
V = float(VP(GRID[-2])[0] ** 2)


class Given:
    """A reward from a function."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x0, cond=None):
        return self.function(x0)


def draw(guidance, n, seed=0, cond=None, grid=GRID, dim=1):
    rng = SampleRNG(range(seed, seed + n))
    x = rng.randn((dim,), dtype=D64)
    return guidance.around(EXACT)(gaussian(VP, 1.0, dim), x, grid, cond=cond, rng=rng)


# ---- resampling -----------------------------------------------------------------------------------------------------


def test_systematic_resampling_rounds_and_has_the_right_means():
    log_w = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=D64)
    W, us = torch.softmax(log_w, 1), (torch.arange(1000, dtype=D64) + 0.5) / 1000
    for n in (1, 5, 7):
        total = torch.zeros(3, 5, dtype=D64)
        for u in us:
            chosen = systematic(log_w, u.expand(3), n)
            counts = torch.stack([torch.bincount(row, minlength=5) for row in chosen]).to(D64)
            assert bool(((counts - n * W).abs() < 1).all()) and chosen.shape == (3, n)
            total += counts
        torch.testing.assert_close(total / len(us), n * W, rtol=0, atol=2e-3)
    assert (
        systematic(torch.tensor([[0.0, -1e9]], dtype=D64), torch.tensor([0.999999], dtype=D64), 2).max() == 0
    )


def test_effective_size():
    log_w = torch.tensor([[0.0] * 4, [0.0, -1e9, -1e9, -1e9], [0.0, 0.0, -1e9, -1e9]], dtype=D64) + 700
    torch.testing.assert_close(effective_size(log_w), torch.tensor([4.0, 1.0, 2.0], dtype=D64))


def test_a_steppers_memory_follows_its_particles():
    rows, level = torch.tensor([1, 1, 0]), torch.tensor(3.0)
    x = torch.arange(3.0)[:, None]
    taken = _taken((x, [(level, x)], None, level), rows)
    assert torch.equal(taken[0], x[rows]) and torch.equal(taken[1][0][1], x[rows])
    assert taken[1][0][0] is level and taken[2] is None and taken[3] is level


def test_what_was_asked_ahead_is_not_asked_again():
    counting = CountingDenoiser(gaussian(VP, 0.3))
    ahead, level = Ahead(counting, None), torch.tensor(1.0, dtype=D64)
    x = torch.arange(3.0, dtype=D64)[:, None]
    answer = ahead.ask(x, level)
    assert torch.equal(ahead(x, level), answer) and counting.calls == 1
    rows = torch.tensor([2, 0, 0])
    moved = x[rows]
    ahead.take(moved, rows)
    assert torch.equal(ahead(moved, level), answer[rows]) and torch.equal(ahead.last, answer[rows])
    assert counting.calls == 1
    # another tensor or another level is another question
    ahead(moved + 1, level), ahead(moved, level + 1)
    assert counting.calls == 3


# ---- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("potential", ["difference", pytest.param("max", marks=pytest.mark.slow), "sum"])
def test_two_particles_without_resampling_have_the_law_of_two_weighted_draws(potential):
    # E[f] = integral of sum_k W_k f(x_k) over two draws of N(0, V), for every potential: they add up to the reward
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    x = nodes * math.sqrt(V)
    w = np.exp(-((1 - x) ** 2) / 0.5)
    share = w[:, None] / (w[:, None] + w[None, :])
    joint = np.outer(weights, weights) / weights.sum() ** 2
    mean, square = (float((joint * 2 * share * f[:, None]).sum()) for f in (x, x**2))
    reward = Given(lambda x0: -((1 - x0[:, 0]) ** 2) / 0.5)
    n, guidance = 20_000, Particles(reward=reward, particles=2, potential=potential, ess_threshold=0.0)
    got = draw(guidance, n)
    v = square - mean**2
    assert abs(float(got.mean()) - mean) < 4 * math.sqrt(v / n)
    assert abs(float((got**2).mean()) - square) < 4 * float((got**2).std()) / math.sqrt(n)


@pytest.mark.slow
def test_samples_converge_to_the_tilted_law():
    # N(0, V) tilted by exp(1.5 x) is N(1.5 V, V)
    errors = []
    for K, n in ((1, 4000), (4, 4000), (16, 4000), (64, 3000)):
        got = draw(Particles(reward=Brightness(), particles=K, scale=1.5, ess_threshold=1.0), n)
        errors.append(1.5 * V - float(got.mean()))
        assert abs(float(got.var()) / V - 1) < 4 * math.sqrt(2 / n) + 0.05
    assert abs(errors[0] - 1.5 * V) < 4 / math.sqrt(4000)
    # the bias falls about as 1 / K, and is towards the law that is not tilted
    assert 2.5 < errors[0] / errors[1] < 4.5 and 2.5 < errors[1] / errors[2] < 5.0
    assert abs(errors[3]) < 4 * math.sqrt(V / 3000)


def test_with_a_likelihood_for_a_reward_they_sample_the_posterior_of_each_sample():
    # y = x + 0.5 n of each sample's own y: mean y V / (V + .25), variance .25 V / (V + .25)
    n, y = 3000, torch.tensor([-0.6, 1.0], dtype=D64).repeat(1500)[:, None]
    reward = MeasurementLikelihood(operator=lambda x0: x0, noise=0.5)
    got = draw(Particles(reward=reward, particles=64), n, cond={MEASUREMENT: y})
    for k in (0, 1):
        mean, variance = float(y[k]) * V / (V + 0.25), 0.25 * V / (V + 0.25)
        part = got[k::2]
        # resampling by ratios of likelihoods, which have no bound, biases the mean outwards by some 0.015 at K = 64
        excess = (float(part.mean()) - mean) * math.copysign(1, mean)
        assert -4 * math.sqrt(variance / 1500) < excess < 0.03 + 4 * math.sqrt(variance / 1500)
        assert abs(float(part.var()) / variance - 1) < 4 * math.sqrt(2 / 1500) + 0.05


@pytest.mark.parametrize(
    ("potential", "low", "high"), [("max", 0.3, 0.6), pytest.param("sum", 1.6, 2.1, marks=pytest.mark.slow)]
)
def test_max_and_sum_potentials_overshoot_where_they_look_often(potential, low, high):
    # the last potential would set it right, had any particle been left there: at K = 64 the mean of N(0, V) tilted by
    # exp(x) is not V but this much more
    options = dict(reward=Brightness(), particles=64, potential=potential)
    got = draw(Particles(**options), 1500)
    assert low < float(got.mean()) - V < high
    # with two looks before the end it is less
    seldom = draw(Particles(**options, every=4), 1500)
    assert abs(float(seldom.mean()) - V) < (0.1 if potential == "max" else 0.3)


@pytest.mark.parametrize("options", [dict(scale=0.0), dict(scale=1.0, ess_threshold=1.0)])
def test_a_reward_of_zero_leaves_the_law_alone(options):
    n, guidance = 4000, Particles(reward=Given(lambda x0: 0 * x0[:, 0]), particles=8, **options)
    got = draw(guidance, n)
    assert abs(float(got.mean())) < 4 * math.sqrt(V / n)
    assert abs(float(got.var()) / V - 1) < 4 * math.sqrt(2 / n)


def test_one_particle_is_the_sampler():
    for sampler in (EXACT, DDIM()):
        guidance = Particles(reward=Brightness(), particles=1)
        x = SampleRNG(range(5)).randn((1,), dtype=D64)
        plain, one = (
            s(mixture_1d(VP), x, GRID, rng=SampleRNG(range(5))) for s in (sampler, guidance.around(sampler))
        )
        assert torch.equal(plain, one)


def test_one_particle_begins_where_the_sample_does_and_the_others_at_noise_of_their_own():
    # one step, whose end is linear in the start
    grid = torch.tensor([-2.0, math.inf], dtype=D64)
    x = SampleRNG(range(2000)).randn((1,), dtype=D64)
    run = Particles(reward=Given(lambda x0: 0 * x0[:, 0]), particles=4).around(EXACT)
    plain = EXACT(gaussian(VP, 1.0), x, grid, rng=SampleRNG(range(2000)))
    ends = run(gaussian(VP, 1.0), x, grid, rng=SampleRNG(range(2000)))
    own = ends == plain
    assert abs(float(own.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    others = ends[~own] / float(VP(grid[0])[0] * VP(grid[0])[1])
    assert abs(float(others.mean())) < 4 / math.sqrt(1500) and abs(float(others.var()) - 1) < 4 * math.sqrt(
        2 / 1500
    )


def test_potentials_by_hand():
    rewards = torch.tensor([[1.0, 3.0, 2.0], [2.0, -1.0, 0.5]], dtype=D64).T
    expected = {
        "difference": [[2.0, 4.0], [4.0, -6.0], [-2.0, 3.0]],
        "max": [[2.0, 4.0], [6.0, 4.0], [4.0 - 8.0, 1.0 - 8.0]],
        "sum": [[2.0, 4.0], [8.0, 2.0], [4.0 - 10.0, 1.0 - 6.0]],
    }

    class Told:
        def ask(self, x, logsnr):
            return x

    for potential, increments in expected.items():
        weigher = RewardWeights(Given(lambda x0: x0[:, 0]), potential, 2.0, None)
        for step, level in enumerate((0.0, 1.0, math.inf)):
            got = weigher.weigh(Told(), rewards[step][:, None], None, torch.tensor(level), True)
            assert got.tolist() == increments[step], (potential, step)
    weigher = RewardWeights(Given(lambda x0: x0[:, 0]), "max", 2.0, None)
    weigher.weigh(Told(), rewards[0][:, None], None, torch.tensor(0.0), True)
    weigher.take(torch.tensor([1, 1]))
    assert weigher.weigh(Told(), rewards[1][:, None], None, torch.tensor(0.0), True).tolist() == [6.0, 4.0]


# ---- as a sampler ---------------------------------------------------------------------------------------------------

STEPPERS = {name: sampler for name, sampler in STOCHASTIC.items() if isinstance(sampler, Stepper)}


@pytest.mark.parametrize("sampler", STEPPERS.values(), ids=STEPPERS.keys())
def test_laws(sampler):
    guidance = Particles(reward=Brightness(), particles=4, scale=0.1, ess_threshold=1.0)
    steered = guidance.around(sampler)
    for law in laws.LAWS:
        law(steered)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "sa_solver", "er_sde"])
def test_a_multistep_stepper_is_as_good_after_resampling(sampler):
    # 40 steps of a solver of order 2 or 3: the mean of the tilted law stands, which a mixed-up memory would spoil
    grid = uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), 40)
    guidance = Particles(reward=Brightness(), particles=16, scale=1.0, ess_threshold=1.0)
    rng = SampleRNG(range(1500))
    x = rng.randn((1,), dtype=D64)
    got = guidance.around(ALL_SAMPLERS[sampler])(gaussian(VP, 0.3, mean=0.5), x, grid, rng=rng)
    assert abs(float(got.mean()) - 0.8) < 0.02 + 4 * math.sqrt(0.3 / 1500)
    assert abs(float(got.var()) / 0.3 - 1) < 0.06 + 4 * math.sqrt(2 / 1500)


@pytest.mark.parametrize(("every", "K"), [(1, 4), (3, 4), (1, 7)])
@pytest.mark.parametrize("name", ["ddpm", "ddim_one", "dpmpp_2m_sde", "predictor_corrector"])
def test_calls_are_those_of_the_sampler_times_the_particles(name, every, K):
    calls = []
    for guidance in (Particles(reward=Brightness(), particles=k, every=every) for k in (1, K)):
        counting = CountingDenoiser(mixture_1d(VP), batch=3)
        Generation(sampler=STOCHASTIC[name], grid=GRID, guidance=guidance, shape=(1,))(
            counting, seeds=range(3)
        )
        calls.append(counting.calls)
    assert calls[1] == K * calls[0]


def test_conditions_and_seeds_reach_every_particle():
    seen = []

    class Drawing:
        draws = True

        def __init__(self, denoiser):
            self.interpolant, self.denoiser = denoiser.interpolant, denoiser

        def __call__(self, x, logsnr, cond=None):
            seen.append(cond)
            return self.denoiser(x, logsnr, cond)

    guidance = Particles(reward=Brightness(), particles=3, scale=0.0, inner=Drawing)
    recipe = Generation(sampler=EXACT, grid=GRID, guidance=guidance, shape=(1,))
    ends = recipe(mixture_1d(VP), seeds=range(4), cond={"label": torch.tensor([0, 1, 1, 0])})
    assert ends.shape == (4, 1)
    assert torch.equal(seen[0]["label"], torch.tensor([0, 1, 1, 0]).repeat_interleave(3))
    assert len(set(seen[0][SEED].tolist())) == 12
    assert bool(((ends[:, 0] > 0) == torch.tensor([False, True, True, False])).all())


def test_the_inner_guidance_is_followed():
    guidance = Particles(reward=Brightness(), particles=3, scale=0.0, inner=lambda d: ClassifierFree(d, 0.0))
    cond = {"label": torch.zeros(200, dtype=torch.long)}
    ends = Generation(sampler=EXACT, grid=GRID, guidance=guidance, shape=(1,))(
        mixture_1d(VP), seeds=range(200), cond=cond
    )
    assert 0.5 < float((ends > 0).double().mean()) < 0.85


def test_mistakes_are_one_clear_line():
    for sampler in (DDIM(), ALL_SAMPLERS["restart"]):
        with pytest.raises(ValueError, match="made of steps that draw noise"):
            Particles(reward=Brightness()).around(sampler)
    with pytest.raises(ValueError, match="difference, max, sum, got mean"):
        Particles(reward=Brightness(), potential="mean")
    for options in (dict(particles=0), dict(every=0), dict(ess_threshold=1.5)):
        with pytest.raises(ValueError, match="Particles needs"):
            Particles(reward=Brightness(), **options).around(EXACT)
    with pytest.raises(ValueError, match=r"must have shape \(4,\), got \(4, 1\)"):
        draw(Particles(reward=Given(lambda x0: x0), particles=2), 2)
    with pytest.raises(ValueError, match="not finite"):
        draw(Particles(reward=Given(lambda x0: x0[:, 0] / 0), particles=2), 2)
    with pytest.raises(ValueError, match="rng=SampleRNG"):
        Particles(reward=Brightness()).around(EXACT)(gaussian(VP, 1.0), torch.zeros(1, 1), GRID)


MEMORY = partial(Projected, scale=3.0, momentum=-0.5)


def out_of_sight(denoiser, momentum):
    return Projected(denoiser, scale=3.0, momentum=momentum)


@pytest.mark.parametrize(
    ("inner", "modifiers"),
    [
        (lambda d: MEMORY(d), []),
        (lambda d: CADS(d, inner=MEMORY), []),
        (lambda d: d, [MEMORY]),
        (lambda d: CountingDenoiser(MEMORY(d)), []),
    ],
    ids=["inner", "inner of inner", "modifier", "counted"],
)
def test_a_guidance_with_a_memory_is_refused_wherever_it_stands(inner, modifiers):
    """`Generation` refuses what it can read in the settings; these it cannot."""
    guidance = Particles(reward=Given(lambda x: x.mean(1)), inner=inner)
    recipe = Generation(sampler=EXACT, grid=GRID, guidance=guidance, shape=(1,), modifiers=modifiers)
    with pytest.raises(ValueError, match="the momentum of Projected would not follow: set momentum=0"):
        recipe(mixture_1d(VP), seeds=[0, 1], cond={"label": torch.tensor([0, 1])})
    # one particle stays where it is, and without a momentum there is nothing to forget
    for particles, momentum in ((1, -0.5), (2, 0.0)):
        forgetful = Particles(
            reward=Given(lambda x: x.mean(1)),
            particles=particles,
            inner=partial(out_of_sight, momentum=momentum),
        )
        Generation(sampler=EXACT, grid=GRID, guidance=forgetful, shape=(1,))(mixture_1d(VP), seeds=[0])

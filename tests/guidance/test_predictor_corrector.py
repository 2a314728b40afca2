"""Predictor-corrector guidance: its limit is ancestral sampling under classifier-free guidance, and its costs."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from problems import ALL_SAMPLERS, D64, INTERPOLANTS, mixture_1d
from scipy import integrate

from diffusion_lab.denoisers import GaussianDenoiser
from diffusion_lab.guidance import ClassifierFree, Unguided
from diffusion_lab.guidance.predictor_corrector import PredictorCorrectorGuidance
from diffusion_lab.process import Cosine
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import DDIM, CountingDenoiser, Generation, Stepper
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.typing import NO_LABEL

VP = INTERPOLANTS["vp"]
M, S2, S = 0.7, 0.2, 1.0  # p(x | c) = N(.7, .2), p(x) = N(0, 1)
SCHEDULE = Cosine(logsnr_min=-14, logsnr_max=14)
GRID = uniform_u(SCHEDULE, 10)


class Classes:
    """Conditional N(M, S2), unconditional N(0, S)."""

    def __init__(self, interpolant):
        self.interpolant = interpolant
        make = partial(GaussianDenoiser, interpolant=interpolant)
        self.given = make(mean=torch.tensor([M], dtype=D64), covariance=torch.tensor([S2], dtype=D64))
        self.without = make(mean=torch.zeros(1, dtype=D64), covariance=torch.tensor([S], dtype=D64))

    def __call__(self, x, logsnr, cond=None):
        label = torch.full((len(x),), NO_LABEL) if cond is None else cond["label"]
        return torch.where((label != NO_LABEL)[:, None], self.given(x, logsnr), self.without(x, logsnr))


class Probe:
    """The noise of a linear probe: row k + 1 gets its one at draw k; rows 0 and 1 get none."""

    def __init__(self):
        self.drawn = 0

    def randn_like(self, x):
        self.drawn += 1
        z = torch.zeros_like(x)
        z[self.drawn + 1] = 1.0
        return z


def moments(around, denoiser, grid, draws, mean=0.0, variance=1.0):
    """Exact mean and variance of what a sampler makes of N(mean, variance), if it is affine in x and its noise."""
    x = torch.zeros(draws + 2, 1, dtype=D64)
    x[1] = 1.0
    rng = Probe()
    end = around(denoiser, x, grid, cond={"label": torch.zeros(draws + 2, dtype=torch.long)}, rng=rng)
    assert rng.drawn == draws
    b = (end - end[0])[1:]
    return float(end[0] + b[0] * mean), float(b[0] ** 2 * variance + (b[1:] ** 2).sum())


def limit(scale):
    """Mean and variance that the reverse SDE under classifier-free guidance ends with, by an ODE for both."""

    def slope(t, y):
        v = math.exp(-t)
        P = scale / (S2 + v) + (1 - scale) / (S + v)
        return v * np.array([scale * M / (S2 + v) - P * y[0], 1 - 2 * P * y[1]])

    ends = (float(GRID[0]), 40.0)
    found = integrate.solve_ivp(
        slope, ends, [0.0, 1 + math.exp(-ends[0])], method="Radau", rtol=1e-10, atol=1e-12
    )
    return found.y[:, -1]


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0, 0.5])
def test_in_the_limit_of_many_steps_it_is_ancestral_sampling_under_classifier_free_guidance(scale):
    exact, errors = limit(scale), {"pcg": [], "cfg": []}
    for N in (100, 200, 400, 800):
        grid = uniform_u(SCHEDULE, N)
        pcg = PredictorCorrectorGuidance(scale=scale).around(DDIM())
        errors["pcg"].append(moments(pcg, Classes(VP), grid, N - 1) - exact)
        # ddim also draws at the last step, to no effect
        errors["cfg"].append(moments(DDIM(eta=1.0), ClassifierFree(Classes(VP), scale), grid, N) - exact)
    for name, error in errors.items():
        error = np.abs(np.array(error))
        # first order in the number of steps, and close at the end of it
        assert (error[-1] < 0.003).all(), (name, error)
        assert (np.abs(np.log2(error[-2] / error[-1]) - 1) < 0.2)[error[-1] > 1e-4].all(), (name, error)


def test_the_limit_is_no_other_scale_and_no_powered_distribution():
    # gamma' in place of gamma, and p(x | c)^gamma p(x)^(1 - gamma), lie ten times as far away
    P = 1.5 / S2 - 0.5 / S
    assert abs(limit(2.0)[0] - limit(1.5)[0]) > 0.03 and abs(limit(1.5)[0] - 1.5 * M / S2 / P) > 0.03


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_many_corrections_of_one_level_sample_its_powered_distribution(scale):
    logsnr = torch.tensor(1.0, dtype=D64)
    alpha, sigma = (float(c) for c in VP(logsnr))
    P = (2 * scale - 1) / (alpha**2 * S2 + sigma**2) + (2 - 2 * scale) / (alpha**2 * S + sigma**2)
    mean = (2 * scale - 1) * alpha * M / (alpha**2 * S2 + sigma**2) / P

    def after(size, K):
        sampler = PredictorCorrectorGuidance(scale=scale, size=size).around(DDIM())

        def run(denoiser, x, grid, *, cond, rng):
            sharp = ClassifierFree(denoiser, 2 * scale - 1)

            class Bound:
                interpolant = VP

                def __call__(self, x, level):
                    return sharp(x, level.expand(len(x)), cond)

            for _ in range(K):
                x = sampler.correct(Bound(), x, logsnr - 1, logsnr, rng)
            return x

        return np.array(moments(run, Classes(VP), None, K, 0.3, 2.0)) - [mean, 1 / P]

    long, short = after(0.1, 200), after(0.05, 400)
    # a step with its x0' held is first order: the mean has no error, the variance has half at half the size
    assert abs(long[0]) < 1e-3 and abs(short[0]) < 1e-3 and 1e-3 < abs(long[1]) < 0.03
    assert long[1] / short[1] == pytest.approx(2.0, abs=0.15)


def test_one_correction_after_ddim_with_an_answer_that_stands_is_ancestral_sampling():
    class Standing:
        interpolant = VP

        def __call__(self, x, logsnr, cond=None):
            return torch.full_like(x, 0.3)

    start, seen = SampleRNG(range(4)).randn((2,), dtype=D64), []
    for sampler in (PredictorCorrectorGuidance(scale=2.0).around(DDIM()), DDIM(eta=1.0)):
        xs = {}
        keep = xs.__setitem__
        sampler(
            Standing(),
            start,
            GRID,
            rng=SampleRNG(range(4)),
            on_step=lambda k, logsnr, x, x0, keep=keep: keep(k, x),
        )
        seen.append(torch.stack(list(xs.values())))
    torch.testing.assert_close(*seen, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        (dict(scale=1.5), 10 + 2 * 9),
        (dict(scale=1.5, steps=3), 10 + 6 * 9),
        (dict(scale=1.0), 10 + 9),
        (dict(scale=0.5), 10 + 9),
        (dict(scale=1.5, steps=0), 10),
        (dict(scale=1.5, interval=(-2.0, 2.0)), 10 + 2 * int(((GRID > -2) & (GRID < 2)).sum())),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_calls_are_counted(options, calls, batched):
    counting = CountingDenoiser(mixture_1d(VP), batch=4)
    guidance = PredictorCorrectorGuidance(**options, batched=batched)
    recipe = Generation(sampler=DDIM(), grid=GRID, guidance=guidance, shape=(1,))
    recipe(counting, seeds=range(4), cond={"label": torch.tensor([0, 1, 1, 0])})
    assert counting.calls == calls


def test_outside_the_interval_it_is_the_sampler():
    cond = {"label": torch.tensor([0, 1, 1])}
    ends = [
        Generation(sampler=DDIM(), grid=GRID, guidance=guidance, shape=(1,))(
            mixture_1d(VP), seeds=range(3), cond=cond
        )
        for guidance in (PredictorCorrectorGuidance(scale=3.0, interval=(50.0, 60.0)), Unguided)
    ]
    assert torch.equal(*ends)


def test_the_inner_guidance_is_that_of_both():
    # scale 1 corrects towards the inner guidance's own distribution
    inner = partial(ClassifierFree, scale=2.0)
    plain = PredictorCorrectorGuidance(scale=1.0, inner=inner)
    by_hand = PredictorCorrectorGuidance(scale=1.0)
    cond, problem = {"label": torch.tensor([0, 1, 1])}, mixture_1d(VP)
    run = [
        Generation(sampler=DDIM(), grid=GRID, guidance=guidance, shape=(1,))(d, seeds=range(3), cond=cond)
        for guidance, d in ((plain, problem), (by_hand, ClassifierFree(problem, 2.0)))
    ]
    assert torch.equal(*run)


STEPPERS = {name: sampler for name, sampler in ALL_SAMPLERS.items() if isinstance(sampler, Stepper)}


@pytest.mark.parametrize("sampler", STEPPERS.values(), ids=STEPPERS.keys())
@pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())
def test_every_stepper_may_predict_and_samples_do_not_depend_on_their_batch(sampler, interpolant):
    guidance = PredictorCorrectorGuidance(scale=1.5, steps=2)
    recipe = Generation(sampler=sampler, grid=GRID, guidance=guidance, shape=(1,))
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    whole = recipe(mixture_1d(interpolant), seeds=range(8), cond={"label": labels})
    parts = [
        recipe(mixture_1d(interpolant), seeds=range(a, b), cond={"label": labels[a:b]})
        for a, b in ((0, 3), (3, 8))
    ]
    assert torch.equal(whole, torch.cat(parts)) and bool(torch.isfinite(whole).all())


def test_a_multistep_predictor_forgets_answers_at_another_x():
    # without memory the two-step solver is DDIM
    ends = [
        Generation(
            sampler=ALL_SAMPLERS[name], grid=GRID, guidance=PredictorCorrectorGuidance(scale=1.5), shape=(1,)
        )(mixture_1d(VP), seeds=range(3), cond={"label": torch.tensor([0, 1, 1])})
        for name in ("dpmpp_2m", "unipc", "ddim")
    ]
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(ends[1], ends[2], rtol=0, atol=1e-5)


def test_pure_noise_is_a_legal_start_and_precision_is_kept():
    grid = uniform_u(Cosine(logsnr_min=-math.inf, logsnr_max=math.inf), 6)
    sampler = PredictorCorrectorGuidance(scale=1.5).around(DDIM())
    cond = {"label": torch.tensor([0, 1])}
    for dtype in (torch.float32, D64):
        x = SampleRNG(range(2)).randn((1,), dtype=dtype)
        end = sampler(mixture_1d(VP), x, grid, cond=cond, rng=SampleRNG(range(2)))
        assert end.dtype == dtype and bool(torch.isfinite(end).all())


def test_mistakes_are_one_clear_line():
    with pytest.raises(ValueError, match="made of steps, and Restart"):
        PredictorCorrectorGuidance(scale=2.0).around(ALL_SAMPLERS["restart"])
    with pytest.raises(ValueError, match="rng=SampleRNG"):
        PredictorCorrectorGuidance(scale=2.0).around(DDIM())(
            mixture_1d(VP), torch.zeros(1, 1, dtype=D64), GRID
        )
    for options in (dict(steps=-1), dict(size=0.0), dict(interval=(1.0, 0.0))):
        with pytest.raises(ValueError, match="needs"):
            PredictorCorrectorGuidance(scale=2.0, **options)

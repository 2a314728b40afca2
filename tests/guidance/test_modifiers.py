"""Modifiers: what each does in closed form, off is off, and all stack on any sampler."""

import math
from functools import partial

import pytest
import torch
from problems import ALL_SAMPLERS, D64, INTERPOLANTS, gaussian, mixture_1d

from diffusion_lab.forward_mode import is_dual
from diffusion_lab.guidance import (
    ClassifierFree,
    DynamicThreshold,
    EpsScaling,
    StaticThreshold,
    TimeShift,
    Unguided,
)
from diffusion_lab.process import Cosine, ddim_step, eps_from_x0
from diffusion_lab.samplers import DDIM, Generation
from diffusion_lab.samplers.base import BoundDenoiser
from diffusion_lab.samplers.covariance import CovarianceAware
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.typing import conditional_of

GRID = uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), 12)
each = pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())


class Fixed:
    """A denoiser with one answer, which remembers where it was asked."""

    def __init__(self, x0, interpolant=INTERPOLANTS["vp"]):
        self.x0, self.interpolant, self.asked = x0, interpolant, None

    def __call__(self, x, logsnr, cond=None):
        self.asked = (x, logsnr)
        return self.x0


def test_static_threshold_clips():
    x0 = torch.tensor([[-3.0, 0.2, 1.5]])
    assert StaticThreshold(Fixed(x0), 1.0)(x0, torch.zeros(1)).tolist() == [[-1.0, pytest.approx(0.2), 1.0]]


def test_dynamic_threshold_scales_back_each_sample_by_its_own_quantile():
    row = torch.linspace(-4, 4, 101, dtype=D64)
    x0 = torch.stack([row, row / 8])
    out = DynamicThreshold(Fixed(x0), quantile=0.8)(x0, torch.zeros(2))
    s = 3.2  # |row| has its 80 % quantile at 0.8 * 4
    torch.testing.assert_close(out[0], row.clamp(-s, s) / s, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[1], x0[1])  # inside the range: left alone


@each
def test_eps_scaling_divides_the_noise(interpolant):
    denoiser, k = mixture_1d(interpolant), 1.02
    x, level = torch.linspace(-2, 2, 5, dtype=D64)[:, None], torch.full((5,), -2.0, dtype=D64)
    plain, scaled = denoiser(x, level), EpsScaling(denoiser, k, -6.0)(x, level)
    eps = eps_from_x0(interpolant, x, plain, level)
    torch.testing.assert_close(eps_from_x0(interpolant, x, scaled, level), eps / k, rtol=1e-12, atol=1e-14)
    # and so a DDIM step is the textbook one with eps / k
    (a, s), (a2, s2) = interpolant(level[0]), interpolant(level[0] + 1)
    expected = a2 * (x - s * eps / k) / a + s2 * eps / k
    got = ddim_step(interpolant, x, scaled, level, level + 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_eps_scaling_leaves_the_noise_end_alone():
    denoiser = mixture_1d(INTERPOLANTS["vp"])
    x = torch.ones(3, 1, dtype=D64)
    levels = torch.tensor([-math.inf, -6.1, -6.0], dtype=D64)
    plain, scaled = denoiser(x, levels), EpsScaling(denoiser, 1.1, -6.0)(x, levels)
    assert torch.equal(plain[:2], scaled[:2]) and not torch.equal(plain[2], scaled[2])


@each
def test_time_shift_finds_the_level_a_sample_has(interpolant):
    # N(0, 1/4) pixels at level l, and the sampler believes l + 0.4: the shift must undo it
    generator = torch.Generator().manual_seed(0)
    true, wrong = torch.tensor([-3.0], dtype=D64), torch.tensor([-2.6], dtype=D64)
    alpha, sigma = interpolant(true)
    x = alpha * 0.5 * torch.randn(1, 10**6, generator=generator, dtype=D64)
    x = x + sigma * torch.randn(1, 10**6, generator=generator, dtype=D64)
    # the believed level has its own length: bring x to it, as a sampler that lost track would have it
    b_alpha, b_sigma = interpolant(wrong)
    x = x * torch.sqrt((b_alpha**2 + b_sigma**2) / (alpha**2 + sigma**2))
    shift = TimeShift(Fixed(x, interpolant), window=2.0, cutoff=0.0, data_variance=0.25)
    # d var / d l = .75 sigmoid(l) sigmoid(-l) = .034 and var has a standard error of 1.4e-3, so l has .04
    assert float(shift.shifted(x, wrong)) == pytest.approx(-3.0, abs=0.16)
    narrow = TimeShift(Fixed(x, interpolant), window=0.2, cutoff=0.0, data_variance=0.25)
    assert float(narrow.shifted(x, wrong)) == pytest.approx(-2.7)
    late = TimeShift(Fixed(x, interpolant), window=2.0, cutoff=-4.0, data_variance=0.25)
    assert torch.equal(late.shifted(x, wrong), wrong)


@each
def test_time_shift_goes_half_a_window_either_way(interpolant):
    level = torch.tensor([-2.0, -2.0], dtype=D64)
    alpha, sigma = interpolant(level[0])
    # pixels with no variance are as clean as can be, very wide ones as noisy
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=D64) * torch.sqrt(alpha**2 + sigma**2)
    x = torch.stack([1e-3 * noise, 1e3 * noise])
    shifted = TimeShift(Fixed(x, interpolant), window=0.6, cutoff=0.0).shifted(x, level)
    torch.testing.assert_close(shifted, level + torch.tensor([0.3, -0.3], dtype=D64), rtol=0, atol=1e-12)


@each
def test_time_shift_asks_with_the_length_of_the_new_level(interpolant):
    denoiser = Fixed(torch.zeros(1, 4, dtype=D64), interpolant)
    x = torch.tensor([[1.0, -1.0, 0.5, -0.5]], dtype=D64)
    TimeShift(denoiser, window=1.0, cutoff=9.0)(x, torch.tensor([0.0], dtype=D64))
    asked, level = denoiser.asked
    norm = torch.sqrt(sum(c**2 for c in interpolant(level)))
    torch.testing.assert_close(
        asked, x * norm / math.sqrt(sum(float(c) ** 2 for c in interpolant(torch.zeros((), dtype=D64))))
    )


OFF = {
    "static_threshold": partial(StaticThreshold, limit=1e9),
    "dynamic_threshold": partial(DynamicThreshold, limit=1e9),
    "eps_scaling": partial(EpsScaling, scale=1.0),
    "time_shift": partial(TimeShift, window=0.0),
}


@pytest.mark.parametrize("modifier", OFF.values(), ids=OFF.keys())
def test_off_is_off_to_the_bit(modifier):
    denoiser = gaussian(INTERPOLANTS["vp"], 0.5, dim=4)
    x, level = (
        torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=D64),
        torch.zeros(3, dtype=D64),
    )
    assert torch.equal(modifier(denoiser)(x, level), denoiser(x, level))


ON = (EpsScaling, TimeShift, DynamicThreshold, StaticThreshold)


@pytest.mark.parametrize("sampler", ALL_SAMPLERS.values(), ids=ALL_SAMPLERS.keys())
@each
def test_all_stack_on_any_sampler(sampler, interpolant):
    ends = []
    for shape in ((4,), (4,)):
        recipe = Generation(sampler=sampler, grid=GRID, guidance=Unguided, shape=shape, modifiers=ON)
        ends.append(recipe(gaussian(interpolant, 0.5, dim=4), seeds=range(5)))
    assert torch.equal(*ends) and bool(torch.isfinite(ends[0]).all()) and float(ends[0].abs().max()) <= 1.0


def test_modifiers_wrap_guidance_in_their_order():
    seen = []

    def tagged(name):
        def wrap(denoiser):
            seen.append(name)
            return denoiser

        return wrap

    recipe = Generation(
        sampler=DDIM(),
        grid=GRID,
        guidance=tagged("guidance"),
        shape=(1,),
        modifiers=[tagged("a"), tagged("b")],
    )
    recipe(mixture_1d(INTERPOLANTS["vp"]), seeds=[0])
    assert seen == ["guidance", "a", "b"]


@pytest.mark.parametrize(
    "make",
    [
        lambda d: StaticThreshold(d, 0.0),
        lambda d: DynamicThreshold(d, quantile=0.0),
        lambda d: DynamicThreshold(d, limit=-1.0),
        lambda d: EpsScaling(d, 0.0),
        lambda d: EpsScaling(d, 1.1, -math.inf),
        lambda d: TimeShift(d, window=-1.0),
        lambda d: TimeShift(d, data_variance=1.0),
    ],
)
def test_bad_parameters_are_refused(make):
    with pytest.raises(ValueError):
        make(mixture_1d(INTERPOLANTS["vp"]))


def test_the_model_below_all_wrappers_can_be_reached():
    model = mixture_1d(INTERPOLANTS["vp"])
    wrapped = ClassifierFree(model, 2.0)
    for modifier in ON:
        wrapped = modifier(wrapped)
    assert wrapped.conditional is model and conditional_of(model) is model
    bound = BoundDenoiser(wrapped, None)
    x, level = torch.ones(2, 1, dtype=D64), torch.zeros((), dtype=D64)
    assert torch.equal(bound.conditional(x, level), model(x, level.expand(2))) and bound.last is None
    assert BoundDenoiser(model, None).conditional is None


def test_covariance_aware_sampling_differentiates_the_model_and_not_its_guided_answer():
    model, asked = mixture_1d(INTERPOLANTS["vp"]), []

    class Watching:
        interpolant = model.interpolant

        def __call__(self, x, logsnr, cond=None):
            asked.append((is_dual(x), None if cond is None else "cond"))
            return model(x, logsnr, cond)

    recipe = Generation(
        sampler=CovarianceAware(structure="scalar"),
        grid=GRID,
        guidance=partial(ClassifierFree, scale=2.0),
        shape=(1,),
        modifiers=[StaticThreshold],
    )
    end = recipe(Watching(), seeds=range(4), cond={"label": torch.tensor([0, 1, 1, 0])})
    assert {what for dual, what in asked if dual} == {"cond"} and bool(torch.isfinite(end).all())


def test_the_threshold_of_a_sample_does_not_know_its_batch(monkeypatch):
    x = 3 * torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(0))

    class Same:
        interpolant = INTERPOLANTS["vp"]

        def __call__(self, x, logsnr, cond=None):
            return x

    level, most = torch.zeros(6), []
    quantile = torch.quantile
    monkeypatch.setattr(
        torch, "quantile", lambda row, *rest: most.append(row.numel()) or quantile(row, *rest)
    )
    held = DynamicThreshold(Same(), quantile=0.9)
    assert torch.equal(held(x, level), torch.cat([held(x[:2], level[:2]), held(x[2:], level[2:])]))
    # torch.quantile takes 2^24 numbers at most: never more than one sample's at once
    assert max(most) == 25

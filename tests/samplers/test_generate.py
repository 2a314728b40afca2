"""What a recipe refuses, and what it counts."""

from functools import partial

import pytest
import torch
from problems import INTERPOLANTS, mixture_1d

from diffusion_lab.guidance import (
    CADS,
    ClassifierFree,
    PredictorCorrectorGuidance,
    Projected,
    StaticThreshold,
)
from diffusion_lab.posterior import FeynmanKacCorrector, Particles
from diffusion_lab.rewards import Brightness
from diffusion_lab.samplers import DDIM, DDPM, CountingDenoiser, Generation
from diffusion_lab.samplers.adaptive_rk import AdaptiveRK
from diffusion_lab.samplers.grids import uniform_logsnr

GRID = uniform_logsnr(-8.0, 8.0, 6)
LABEL = {"label": torch.tensor([0, 1])}


def recipe(guidance, sampler=None, **rest):
    return Generation(sampler=sampler or DDPM(), grid=GRID, guidance=guidance, shape=(1,), **rest)


@pytest.mark.parametrize("inner", [FeynmanKacCorrector(scale=2.0), PredictorCorrectorGuidance(scale=2.0)])
def test_what_touches_the_samples_stands_outermost(inner):
    particles = Particles(reward=Brightness(), inner=inner)
    wrapper = partial(CADS, inner=inner)
    for guidance in (particles, wrapper, partial(CADS, inner=partial(CADS, inner=inner))):
        with pytest.raises(ValueError, match=f"{type(inner).__name__} touches the samples .* outermost"):
            recipe(guidance)
    with pytest.raises(ValueError, match="outermost"):
        recipe(partial(ClassifierFree, scale=2.0), modifiers=[inner])


@pytest.mark.parametrize("guidance", [FeynmanKacCorrector(scale=2.0), PredictorCorrectorGuidance(scale=2.0)])
def test_no_modifier_stands_below_an_answer_put_together_in_the_sampler(guidance):
    with pytest.raises(ValueError, match=f"{type(guidance).__name__} takes no modifiers"):
        recipe(guidance, modifiers={"static_threshold": StaticThreshold})
    recipe(Particles(reward=Brightness()), modifiers=[StaticThreshold])


def test_what_is_moved_about_takes_no_memory_along():
    inner = partial(Projected, scale=2.0, momentum=-0.5)
    with pytest.raises(ValueError, match=r"Particles moves samples about.*set momentum=0"):
        recipe(Particles(reward=Brightness(), inner=inner))
    recipe(Particles(reward=Brightness(), inner=partial(Projected, scale=2.0)))


def test_modifiers_hold_a_guided_answer():
    held = recipe(partial(ClassifierFree, scale=8.0), DDIM(), modifiers=[partial(StaticThreshold, limit=0.5)])
    samples = held(mixture_1d(INTERPOLANTS["vp"]), seeds=[0, 1], cond=LABEL)
    assert float(samples.abs().max()) <= 0.5


def test_seeds_reach_a_modifier_that_draws():
    class Told:
        draws = True

        def __init__(self, denoiser):
            self.interpolant, self.denoiser = denoiser.interpolant, denoiser

        def __call__(self, x, logsnr, cond=None):
            assert cond["seed"].tolist() == [7, 9]
            return self.denoiser(x, logsnr, cond)

    recipe(partial(ClassifierFree, scale=1.0), modifiers=[Told])(
        mixture_1d(INTERPOLANTS["vp"]), seeds=[7, 9], cond=LABEL
    )


def test_calls_that_depend_on_the_answers_are_said_to():
    assert not recipe(partial(ClassifierFree, scale=2.0)).adaptive
    adaptive = recipe(partial(ClassifierFree, scale=2.0, interval=(-1.0, 2.0)), AdaptiveRK())
    counting = CountingDenoiser(mixture_1d(INTERPOLANTS["vp"]), batch=1)
    adaptive(counting, seeds=[0], cond={"label": torch.tensor([0])})
    one = {"label": torch.tensor([0])}
    assert adaptive.adaptive and counting.calls != adaptive.nfe(INTERPOLANTS["vp"], one)

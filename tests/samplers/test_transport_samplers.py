"""Transport in the shape of a sampler: the same numbers as the functions, from the right start, and clear refusals."""

import math
from functools import partial

import pytest
import torch
from bridges import INTERPOLANTS, ExactField, Law
from problems import D64, mixture_1d
from problems import INTERPOLANTS as PROCESSES

from diffusion_lab.denoisers.bridge import PathInterpolant
from diffusion_lab.guidance import ClassifierFree, Unguided
from diffusion_lab.rng import SampleRNG
from diffusion_lab.samplers import Generation, Heun
from diffusion_lab.samplers.grids import uniform_logsnr, uniform_time
from diffusion_lab.samplers.transport import VanishingNoise, transport_ode, transport_sde
from diffusion_lab.samplers.transport_samplers import TransportODE, TransportSDE

SOURCE, DATA = Law(means=(0.4,), stds=(0.8,)), Law(means=(-1.1,), stds=(1.7,))
GRID = uniform_time(200)
EPSILON = VanishingNoise(scale=0.5)
SAMPLERS = {"ode": TransportODE(), "sde": TransportSDE(epsilon=EPSILON)}


def field_of(name="linear", source=SOURCE, data=DATA):
    """A `BridgeField`: the closed form is called `interpolant` there, what samplers ask for is the path's."""
    exact = ExactField(INTERPOLANTS[name], source, data)

    class Model:
        bridge, interpolant = exact.interpolant, PathInterpolant(path=exact.interpolant.path)

        def __call__(self, x, tau, cond=None):
            v, xi = exact(x.to(D64), tau)
            return v.to(x.dtype), xi.to(x.dtype)

    return Model()


def recipe(sampler, grid=GRID, guidance=Unguided, shape=(1,)):
    return Generation(sampler=sampler, grid=grid, guidance=guidance, shape=shape)


def times(steps):
    return torch.linspace(0, 1, steps + 1, dtype=D64)


@pytest.mark.parametrize("name", ["linear", "linear_plain"])
def test_it_is_the_transport_of_the_sources(name):
    field, seeds = field_of(name), range(5)
    image = torch.linspace(-2, 2, 5)[:, None]
    found = recipe(TransportODE())(field, seeds=seeds, cond={"image": image})
    assert torch.equal(found, transport_ode(field, image, times(200)))
    # the flow map between two normals
    torch.testing.assert_close(found, -1.1 + 1.7 / 0.8 * (image - 0.4), rtol=0, atol=2e-3)
    if name == "linear":
        rng = SampleRNG(seeds)
        rng.randn((1,))  # the start noise, which a source takes the place of
        expected = transport_sde(field, field.bridge, image, times(200), epsilon=EPSILON, rng=rng)
        assert torch.equal(recipe(SAMPLERS["sde"])(field, seeds=seeds, cond={"image": image}), expected)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_without_sources_it_starts_from_noise(sampler):
    n = 4000
    found = recipe(sampler, uniform_time(60))(field_of(source=Law()), seeds=range(n))
    assert abs(float(found.mean()) + 1.1) < 4 * 1.7 / math.sqrt(n) + 0.01
    assert abs(float(found.var()) / 1.7**2 - 1) < 4 * math.sqrt(2 / n) + 0.02
    start = SampleRNG(range(n)).randn((1,))
    if sampler is SAMPLERS["ode"]:
        torch.testing.assert_close(found, -1.1 + 1.7 * start, rtol=0, atol=2e-2)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_eight_are_three_and_five(sampler):
    image = torch.linspace(-2, 2, 8)[:, None]
    parts = [
        recipe(sampler)(field_of(), seeds=list(rows), cond={"image": image[list(rows)]})
        for rows in (range(3), range(3, 8))
    ]
    assert torch.equal(recipe(sampler)(field_of(), seeds=range(8), cond={"image": image}), torch.cat(parts))


def test_on_the_trigonometric_path_a_grid_is_its_log_snrs():
    # log-SNR 0 is the middle of every path, -2 is not tau = .27 as on the linear one
    field, asked = field_of("trigonometric"), []
    model = type(field)
    call = model.__call__
    model.__call__ = lambda self, x, tau, cond=None: asked.append(float(tau[0])) or call(self, x, tau, cond)
    grid = torch.tensor([-math.inf, -2.0, 0.0, math.inf], dtype=D64)
    TransportSDE(epsilon=VanishingNoise(scale=0.0))(field, torch.zeros(1, 1), grid, rng=SampleRNG([0]))
    assert asked == pytest.approx([0.0, 2 / math.pi * math.atan(math.exp(-1)), 0.5])


def test_steps_are_told_with_levels_and_samples():
    seen = []
    end = recipe(TransportODE(), uniform_time(4))(
        field_of(), seeds=[0], on_step=lambda k, logsnr, x, x0: seen.append((k, float(logsnr), x, x0))
    )
    assert [k for k, *_ in seen] == [0, 1, 2, 3] and [level for _, level, *_ in seen][1::2] == [0.0, math.inf]
    assert torch.equal(seen[-1][2], end) and all(torch.equal(x, x0) for *_, x, x0 in seen)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_fields_and_denoisers_do_not_mix():
    with pytest.raises(ValueError, match=r"field of a bridge, which Heun .* sampler=transport_ode"):
        recipe(Heun())(field_of(), seeds=[0])
    denoiser = mixture_1d(PROCESSES["rf"])
    with pytest.raises(ValueError, match="TransportODE follows the field of a bridge"):
        recipe(TransportODE())(denoiser, seeds=[0])
    with pytest.raises(ValueError, match="TransportODE follows the field of a bridge"):
        TransportODE()(denoiser, torch.zeros(1, 1), GRID)


def test_a_guided_field_is_refused():
    guided = recipe(TransportODE(), guidance=partial(ClassifierFree, scale=2.0))
    with pytest.raises(ValueError, match="guidance=none"):
        guided(field_of(), seeds=[0], cond={"label": torch.zeros(1, dtype=torch.int64)})


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_a_grid_must_begin_at_the_source(sampler):
    with pytest.raises(ValueError, match="grid=uniform_time"):
        recipe(sampler, uniform_logsnr(-10.0, 10.0, 8))(field_of(), seeds=[0])


def test_a_source_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape"):
        recipe(TransportODE())(field_of(), seeds=[0], cond={"image": torch.zeros(1, 2)})


def test_the_sde_needs_noise_and_a_score():
    with pytest.raises(ValueError, match="draws noise"):
        SAMPLERS["sde"](field_of(), torch.zeros(1, 1), GRID)
    with pytest.raises(ValueError, match="no score"):
        recipe(SAMPLERS["sde"])(field_of("linear_plain"), seeds=[0])

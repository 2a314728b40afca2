"""Measurement operators: adjoints, known values, shapes, and one clear error each."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from diffusion_lab.measurements import (
    Colourise,
    GaussianBlur,
    Inpaint,
    JPEGLike,
    Linear,
    Masking,
    MotionBlur,
    Operator,
    PhaseRetrieval,
    SuperResolution,
    adjoint,
    measure,
)
from diffusion_lab.measurements.blur import motion_kernel
from diffusion_lab.measurements.jpeg import quantisation_table
from diffusion_lab.rng import SampleRNG

D64 = torch.float64


def normal(*shape, seed=0, dtype=D64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def smooth_images(batch=2, channels=3, side=16):
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, side, dtype=D64)] * 2, indexing="ij")
    waves = [torch.sin(2 * rows + k) * torch.cos(3 * columns - k) for k in range(batch * channels)]
    return torch.stack(waves).reshape(batch, channels, side, side)


LINEAR = {
    "box": (Inpaint(), (2, 3, 8, 12)),
    "half": (Inpaint(mask="half", side="top"), (2, 3, 8, 12)),
    "random": (Inpaint(mask="random", fraction=0.6), (2, 3, 8, 12)),
    "super_resolution": (SuperResolution(factor=4), (2, 3, 8, 12)),
    "gaussian_blur": (GaussianBlur(size=7, std=1.3), (2, 3, 8, 12)),
    "motion_blur": (MotionBlur(length=6.5, angle=33.0), (2, 3, 8, 12)),
    "colourise": (Colourise(), (2, 3, 8, 12)),
    "linear": (Linear(normal(4, 7, seed=5)), (2, 7)),
}
NONLINEAR = {
    "jpeg": (JPEGLike(quality=30.0), (2, 3, 8, 16)),
    "phase_retrieval": (PhaseRetrieval(oversample=1.5), (2, 3, 8, 12)),
}
ALL = LINEAR | NONLINEAR


@pytest.mark.parametrize(("A", "shape"), LINEAR.values(), ids=LINEAR.keys())
def test_adjoint_dot_product(A, shape):
    x0 = normal(*shape)
    y = normal(*A(x0).shape, seed=1)
    x_back = adjoint(A, y, shape)
    assert x_back.shape == x0.shape and not x_back.requires_grad
    torch.testing.assert_close((A(x0) * y).sum(), (x0 * x_back).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("A", "shape"), LINEAR.values(), ids=LINEAR.keys())
def test_linear_operators_are_linear_and_say_so(A, shape):
    x0, other = normal(*shape), normal(*shape, seed=1)
    assert A.linear
    torch.testing.assert_close(A(2.0 * x0 - other), 2.0 * A(x0) - A(other), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("A", "shape"), NONLINEAR.values(), ids=NONLINEAR.keys())
def test_the_others_are_not_and_have_no_adjoint(A, shape):
    x0 = normal(*shape)
    assert not A.linear and float((A(0.5 * x0 - x0) - (0.5 * A(x0) - A(x0))).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="not linear"):
        adjoint(A, A(x0), shape)


@pytest.mark.parametrize(("A", "shape"), ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("dtype", [torch.float32, D64])
def test_each_image_is_measured_alone_in_its_own_precision(A, shape, dtype):
    assert isinstance(A, Operator) and isinstance(A, Masking) == isinstance(A, Inpaint)
    x0 = normal(8, *shape[1:], dtype=dtype)
    whole = A(x0)
    assert whole.dtype == dtype
    assert torch.equal(whole, torch.cat([A(x0[:3]), A(x0[3:])]))
    if A.linear:
        back = adjoint(A, whole, x0.shape)
        parts = [adjoint(A, y, (len(y), *shape[1:])) for y in (whole[:3], whole[3:])]
        assert back.dtype == dtype and torch.equal(back, torch.cat(parts))


@pytest.mark.parametrize(("A", "shape"), ALL.values(), ids=ALL.keys())
def test_gradients_flow_and_survive_inference_mode(A, shape):
    with torch.inference_mode():
        A(normal(*shape))  # whatever an operator keeps may be made here
    x0 = normal(*shape).requires_grad_()
    (g,) = torch.autograd.grad(A(x0).square().sum(), x0)
    assert bool(torch.isfinite(g).all()) and float(g.abs().max()) > 0


def test_adjoint_refuses_a_measurement_of_the_wrong_shape():
    with pytest.raises(ValueError, match="makes"):
        adjoint(SuperResolution(factor=2), torch.zeros(1, 1, 3, 3), (1, 1, 8, 8))


# ---- y = A(x0) + noise n --------------------------------------------------------------------------------------------


def test_measure_draws_noise_of_each_samples_own_seed():
    x0, A = normal(4, 1, 8, 8), SuperResolution(factor=2)
    assert torch.equal(measure(A, x0, 0.0, None), A(x0))
    y = measure(A, x0, 0.3, SampleRNG(range(4)))
    n = SampleRNG(range(4)).randn((1, 4, 4), dtype=D64)
    torch.testing.assert_close(y, A(x0) + 0.3 * n, rtol=0, atol=1e-15)
    parts = [measure(A, x0[s], 0.3, SampleRNG(range(4)[s])) for s in (slice(0, 1), slice(1, 4))]
    assert torch.equal(y, torch.cat(parts))


def test_measure_leaves_missing_pixels_at_zero():
    x0, A = normal(2, 3, 8, 8), Inpaint(mask="random")
    y = measure(A, x0, 0.5, SampleRNG([0, 1]))
    missing = (A.known(x0) == 0).expand_as(x0)
    assert bool((y[missing] == 0).all()) and bool((y[~missing] != x0[~missing]).all())


def test_measure_refuses_noise_without_a_source():
    x0, A = normal(1, 1, 8, 8), SuperResolution(factor=2)
    with pytest.raises(ValueError, match="rng"):
        measure(A, x0, 0.1, None)
    with pytest.raises(ValueError, match="noise >= 0"):
        measure(A, x0, -0.1, SampleRNG([0]))


# ---- known values ---------------------------------------------------------------------------------------------------


def test_box_is_the_rectangle_it_names():
    A = Inpaint(box=(0.25, 0.5, 0.5, 0.25))
    expected = torch.ones(8, 8)
    expected[2:6, 4:6] = 0
    assert torch.equal(A.known(torch.zeros(1, 3, 8, 8))[0, 0], expected)
    x0 = normal(2, 3, 8, 8)
    assert torch.equal(A(x0), x0 * expected) and torch.equal(A(A(x0)), A(x0))


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_the_named_half_is_missing(side):
    known = Inpaint(mask="half", side=side).known(torch.zeros(1, 1, 4, 6))[0, 0]
    halves = {"left": known[:, :3], "right": known[:, 3:], "top": known[:2], "bottom": known[2:]}
    assert float(halves[side].sum()) == 0 and float(known.sum()) == 12


def test_random_mask_has_its_fraction_and_its_seed():
    def make(seed):
        A = Inpaint(mask="random", fraction=0.92, seed=seed)
        return A.known(torch.zeros(1, 1, 20, 20))

    assert float(make(0).sum()) == 32 and torch.equal(make(0), make(0)) and not torch.equal(make(0), make(1))


def test_super_resolution_averages_squares():
    x0 = torch.arange(16, dtype=D64).reshape(1, 1, 4, 4)
    y = SuperResolution(factor=2)(x0)
    assert torch.equal(y[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]], dtype=D64))
    # A A^T = I / factor^2, and repeating pixels is a right inverse
    u = normal(1, 1, 2, 2)
    A = SuperResolution(factor=2)
    torch.testing.assert_close(A(adjoint(A, u, x0.shape)), u / 4, rtol=0, atol=1e-15)
    torch.testing.assert_close(A(u.repeat_interleave(2, 2).repeat_interleave(2, 3)), u, rtol=0, atol=1e-15)
    assert torch.equal(SuperResolution(factor=1)(x0), x0)


def test_gaussian_blur_against_scipy():
    x0 = normal(1, 1, 16, 12)
    # scipy calls reflection about the border pixel "mirror"
    expected = ndimage.gaussian_filter(x0[0, 0].numpy(), 1.5, mode="mirror", radius=4)
    np.testing.assert_allclose(GaussianBlur(size=9, std=1.5)(x0)[0, 0].numpy(), expected, rtol=0, atol=1e-12)


def test_blur_keeps_constants():
    one = torch.ones(1, 2, 16, 16, dtype=D64)
    for A in (GaussianBlur(), MotionBlur(), MotionBlur(length=4.2, angle=-70.0)):
        torch.testing.assert_close(A(one), one, rtol=0, atol=1e-14)


def test_motion_kernels_known_values():
    flat, upright = motion_kernel(5.0, 0.0), motion_kernel(5.0, 90.0)
    assert float(flat.sum()) == pytest.approx(1.0, abs=1e-14)
    # a straight line lies in one row: interior taps are equal and the ends count half a pixel
    assert float(flat[[0, 1, 3, 4]].abs().sum()) == 0.0
    torch.testing.assert_close(flat[2, 1:4], flat[2, 2].expand(3), rtol=0.02, atol=0)
    torch.testing.assert_close(flat.T, upright, rtol=0, atol=1e-12)
    # counter-clockwise on the screen: from the bottom left to the top right
    diagonal = motion_kernel(7.0, 45.0)
    assert float(diagonal.flip(1).diagonal().sum()) > 0.5 > float(diagonal.diagonal().sum())
    assert torch.equal(motion_kernel(1.0, 30.0), torch.ones(1, 1, dtype=D64))
    x0 = normal(1, 1, 6, 6)
    assert torch.equal(MotionBlur(length=1.0, angle=30.0)(x0), x0)


def test_colourise_is_the_mean_of_channels():
    x0 = normal(2, 3, 4, 4)
    torch.testing.assert_close(Colourise()(x0)[:, 0], x0.sum(1) / 3, rtol=0, atol=1e-15)


def test_jpeg_of_quality_100_is_nearly_the_image():
    x0 = smooth_images()
    assert bool((quantisation_table(100.0) == 1.0).all())
    error = JPEGLike(quality=100.0)(x0) - x0
    # coefficients are off by half a step at most, 1 / sqrt(12) on the average; the transform keeps lengths
    assert 0.0 < float(error.square().mean().sqrt()) < 0.5 / 127.5
    assert float(error.abs().max()) < 4.0 / 127.5


def test_jpeg_loses_more_at_lower_quality():
    x0 = smooth_images()
    errors = [float((JPEGLike(quality=q)(x0) - x0).square().mean()) for q in (100, 75, 50, 20, 5, 1)]
    assert errors == sorted(errors) and errors[-1] > 100 * errors[0]


@pytest.mark.parametrize("quality", [5, 20, 50, 75, 95])
def test_jpeg_against_a_real_one(quality):
    rows, columns = np.meshgrid(np.arange(32), np.arange(40), indexing="ij")
    picture = np.uint8(np.round(127.5 + 90 * np.sin(rows / 5.0) * np.cos(columns / 3.0) + (columns % 7)))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="jpeg", quality=quality)
    real = np.asarray(Image.open(file)).astype(float)
    # libjpeg subtracts 128, not 127.5
    x0 = (torch.tensor(picture, dtype=D64)[None, None] - 128.0) / 127.5
    ours = np.clip(np.round(127.5 * JPEGLike(quality=quality)(x0)[0, 0].numpy() + 128.0), 0, 255)
    worst = np.abs(ours - real).reshape(4, 8, 5, 8).max((1, 3))
    # its arithmetic is that of integers, so a pixel may be off by one; and where a coefficient lies just between two
    # steps, halves too, it may round the other way, which a whole block shows, by less than one of its steps
    assert np.mean(worst <= 1.0) >= 0.8
    assert worst.max() <= max(2.0, float(quantisation_table(quality).max()) / 4)


def test_jpeg_gradient_is_that_of_the_identity():
    x0 = normal(1, 2, 16, 16).requires_grad_()
    w = normal(1, 2, 16, 16, seed=1)
    (g,) = torch.autograd.grad((JPEGLike(quality=10.0)(x0) * w).sum(), x0)
    torch.testing.assert_close(g, w, rtol=0, atol=1e-12)


def test_jpeg_of_images_smaller_than_a_block():
    assert torch.equal(quantisation_table(50.0, 4), quantisation_table(50.0)[::2, ::2])
    x0 = torch.full((1, 1, 4, 4), 0.3, dtype=D64)
    torch.testing.assert_close(JPEGLike(quality=100.0)(x0), x0, rtol=0, atol=0.5 / 4 / 127.5)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("quality", [10.0, 50.0, 90.0])
def test_jpeg_of_a_small_image_is_that_of_its_mirror_images_in_a_whole_block(n, quality):
    # mirrored, an image of side n has the frequencies 8 k / n of a block of 8 and no others
    x0 = 0.5 * normal(5, 1, n, n)
    whole = x0
    while whole.shape[-1] < 8:
        whole = torch.cat([whole, whole.flip(-1)], -1)
        whole = torch.cat([whole, whole.flip(-2)], -2)
    A = JPEGLike(quality=quality)
    assert whole.shape == (5, 1, 8, 8) and not torch.allclose(A(x0), x0, atol=1e-3)
    torch.testing.assert_close(A(x0), A(whole)[..., :n, :n], rtol=0, atol=1e-12)


def test_phase_retrieval_keeps_energy_and_forgets_the_phase():
    x0, A = normal(2, 1, 8, 8), PhaseRetrieval()
    y = A(x0)
    assert y.shape == (2, 1, 16, 16) and bool((y >= 0).all())
    torch.testing.assert_close(y.square().sum((1, 2, 3)), x0.square().sum((1, 2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(y[..., 0, 0], x0.sum((2, 3)).abs() / 16.0, rtol=0, atol=1e-12)
    torch.testing.assert_close(A(-x0), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(A(x0.flip(2, 3)), y, rtol=0, atol=1e-12)
    assert float((A(x0.flip(2)) - y).abs().max()) > 0.1


# ---- errors ---------------------------------------------------------------------------------------------------------

WRONG_SHAPE = {
    "vectors": (Inpaint(), (2, 7), "images"),
    "nothing missing": (Inpaint(box=(0.0, 0.0, 0.1, 0.1)), (1, 1, 4, 4), "pixels known"),
    "factor": (SuperResolution(factor=3), (1, 1, 8, 8), "factor 3"),
    "blur": (GaussianBlur(size=17, std=3.0), (1, 1, 8, 8), "too large"),
    "motion": (MotionBlur(length=19.0, angle=0.0), (1, 1, 8, 8), "too large"),
    "grey": (Colourise(), (1, 1, 8, 8), "several channels"),
    "jpeg": (JPEGLike(), (1, 1, 12, 8), "blocks of 8"),
    "phase": (PhaseRetrieval(), (2, 7), "images"),
    "matrix": (Linear(torch.ones(2, 3)), (1, 4), "vectors"),
}


@pytest.mark.parametrize(("A", "shape", "words"), WRONG_SHAPE.values(), ids=WRONG_SHAPE.keys())
def test_an_image_that_does_not_fit_is_one_clear_error(A, shape, words):
    with pytest.raises(ValueError, match=words) as error:
        A(torch.zeros(shape))
    assert type(A).__name__ in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Inpaint(mask="circle"),
        lambda: Inpaint(box=(0.5, 0.5, 0.6, 0.1)),
        lambda: Inpaint(box=(0.5, 0.5, 0.1)),
        lambda: Inpaint(fraction=1.0),
        lambda: SuperResolution(factor=0),
        lambda: GaussianBlur(size=8),
        lambda: GaussianBlur(std=0.0),
        lambda: MotionBlur(length=0.5),
        lambda: JPEGLike(quality=0.0),
        lambda: PhaseRetrieval(oversample=0.9),
        lambda: Linear(torch.ones(3)),
    ],
)
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="needs"):
        make()


def test_every_operator_is_finite_at_zero():
    for A, shape in ALL.values():
        x0 = torch.zeros(shape, dtype=D64, requires_grad=True)
        (g,) = torch.autograd.grad(A(x0).sum(), x0)
        assert bool(torch.isfinite(g).all())
    assert math.isfinite(float(PhaseRetrieval()(torch.zeros(1, 1, 4, 4)).sum()))

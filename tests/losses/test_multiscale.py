"""The multiscale loss: white errors, layout errors, a single scale, and any prediction type."""

import pytest
import torch

from diffusion_lab.denoisers import EDM, X0, Eps, NetworkDenoiser, V
from diffusion_lab.losses import DenoisingLoss, SigmoidWeighting
from diffusion_lab.losses.multiscale import MultiscaleLoss
from diffusion_lab.process import Cosine, RectifiedFlow, VariancePreserving
from diffusion_lab.rng import StepRNG

D64 = torch.float64
UNIT = {"schedule": Cosine(), "weighting": SigmoidWeighting()}


def rng(total):
    return StepRNG(seed=0, step=0, positions=slice(None), total=total)


class OffBy:
    """eps_hat = eps + a given error: a denoiser that knows the data."""

    def __init__(self, x0, error):
        self.interpolant, self.x0, self.error = VariancePreserving(), x0, error

    def __call__(self, x, logsnr, cond=None):
        alpha, sigma = (c[:, None, None, None] for c in self.interpolant(logsnr))
        return self.x0 - sigma / alpha * self.error


def parts(error, base, logsnr=0.3):
    """Multiscale and plain loss of one given eps error `(B, C, d, d)`."""
    x0, level = torch.zeros_like(error), torch.full((len(error),), logsnr, dtype=error.dtype)
    denoiser, n = OffBy(x0, error), rng(len(error))
    return tuple(
        loss(denoiser, x0, None, n, logsnr=level).per_example
        for loss in (MultiscaleLoss(**UNIT, base=base), DenoisingLoss(**UNIT))
    )


@pytest.mark.parametrize(("side", "base", "total"), [(16, 4, 4 + 8 + 16), (8, 1, 1 + 2 + 4 + 8)])
def test_a_white_error_of_variance_v_gives_v_over_d_squared_times_the_sum_of_the_sides(side, base, total):
    # white exactly, not on average: the columns of an orthogonal matrix are all deltas, and pooling is linear
    basis = 0.7 * side * torch.eye(side * side, dtype=D64).reshape(-1, 1, side, side)
    multi, plain = parts(basis, base)
    assert float(plain.mean()) == pytest.approx(float(plain[0]))
    assert float(multi.mean() / plain.mean()) == pytest.approx(total / side**2, rel=1e-10)


def test_an_error_of_the_layout_weighs_in_full_at_every_side():
    multi, plain = parts(torch.full((1, 3, 16, 16), 0.4, dtype=D64), 4)
    assert float(multi / plain) == pytest.approx(1 / 4 + 1 / 8 + 1 / 16, rel=1e-12)
    # and a checkerboard at none but the largest
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    multi, plain = parts(board.double()[None, None], 4)
    assert float(multi / plain) == pytest.approx(1 / 16, rel=1e-12)


def test_pooling_acts_on_the_difference_of_one_pixel_in_each_block():
    # 2x2 blocks with errors (1, -1, 0, 0) have no mean; their squares have
    error = torch.zeros(1, 1, 8, 8, dtype=D64)
    error[..., ::2, ::2], error[..., 1::2, 1::2] = 1.0, -1.0
    multi, plain = parts(error, 4)
    assert float(multi / plain) == pytest.approx(1 / 8, rel=1e-12)


class Nonlinear(torch.nn.Module):
    def forward(self, x, logsnr, cond):
        return torch.sin(1.3 * x) + 0.1 * logsnr[:, None, None, None]


@pytest.mark.parametrize(
    "prediction", [X0(), Eps(), V(), EDM(sigma_data=0.7)], ids=lambda p: type(p).__name__
)
def test_one_scale_is_the_denoising_loss_over_the_side(prediction):
    denoiser = NetworkDenoiser(network=Nonlinear(), interpolant=RectifiedFlow(), prediction=prediction)
    x0 = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=D64)
    multi = MultiscaleLoss(**UNIT, base=8)(denoiser, x0, None, rng(6))
    plain = DenoisingLoss(**UNIT)(denoiser, x0, None, rng(6))
    torch.testing.assert_close(multi.per_example, plain.per_example / 8, rtol=1e-12, atol=0)
    torch.testing.assert_close(multi.total, multi.per_example.mean())


@pytest.mark.parametrize(
    "prediction", [X0(), Eps(), V(), EDM(sigma_data=0.7)], ids=lambda p: type(p).__name__
)
def test_it_is_the_pooled_eps_error_for_every_prediction_type(prediction):
    denoiser = NetworkDenoiser(network=Nonlinear(), interpolant=RectifiedFlow(), prediction=prediction)
    x0 = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=D64)
    logsnr = torch.linspace(-4, 4, 6, dtype=D64)
    multi = MultiscaleLoss(**UNIT, base=2)(denoiser, x0, None, rng(6), logsnr=logsnr)
    eps = rng(6).randn("noise", (2, 8, 8), dtype=D64)
    alpha, sigma = (c[:, None, None, None] for c in RectifiedFlow()(logsnr))
    x = alpha * x0 + sigma * eps
    error = eps - (x - alpha * denoiser(x, logsnr)) / sigma
    total = sum(
        error.reshape(6, 2, s, 8 // s, s, 8 // s).mean((3, 5)).square().flatten(1).mean(1) / s
        for s in (2, 4, 8)
    )
    factor = 0.5 * SigmoidWeighting()(logsnr) * torch.exp(-Cosine().log_density(logsnr))
    torch.testing.assert_close(multi.per_example, factor * total, rtol=1e-8, atol=0)


def test_sides_that_do_not_divide_are_refused():
    denoiser = NetworkDenoiser(network=Nonlinear(), interpolant=VariancePreserving(), prediction=V())
    for shape, base in (((1, 12, 12), 4), ((1, 8, 4), 4), ((1, 8, 8), 16), ((1, 9, 9), 4)):
        with pytest.raises(ValueError, match=r"method\.loss\.base"):
            MultiscaleLoss(**UNIT, base=base)(denoiser, torch.zeros(2, *shape), None, rng(2))
    with pytest.raises(ValueError, match="base >= 1"):
        MultiscaleLoss(**UNIT, base=0)

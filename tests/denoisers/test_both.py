"""The prediction of x0 and eps at once."""

import pytest
import torch

from diffusion_lab.denoisers import X0, Both, NetworkDenoiser
from diffusion_lab.losses import eps_error
from diffusion_lab.process import RectifiedFlow, VarianceExploding, VariancePreserving

D64 = torch.float64
X0_, EPS = (torch.randn(9, 2, 3, 3, generator=torch.Generator().manual_seed(i), dtype=D64) for i in range(2))
LEVELS = torch.linspace(-20, 20, 9, dtype=D64)


class Says(torch.nn.Module):
    """Answers what it was given, whatever it is asked."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = answers

    def forward(self, x, logsnr, cond=None):
        return torch.cat(self.answers, dim=1)


def seen(interpolant):
    alpha, sigma = (c[:, None, None, None] for c in interpolant(LEVELS))
    return alpha * X0_ + sigma * EPS


@pytest.mark.parametrize("interpolant", [VariancePreserving(), VarianceExploding(), RectifiedFlow()])
def test_true_answers_give_x0_and_each_rules_its_end(interpolant):
    x = seen(interpolant)

    def answer(data, noise):
        return NetworkDenoiser(network=Says(data, noise), interpolant=interpolant, prediction=Both())(
            x, LEVELS
        )

    torch.testing.assert_close(answer(X0_, EPS), X0_, rtol=1e-12, atol=1e-12)
    wrong = torch.zeros_like(X0_)
    # noise alone is seen: only x~ counts; hardly any: only what eps~ leaves
    torch.testing.assert_close(answer(X0_, wrong)[0], X0_[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(answer(wrong, EPS)[-1], X0_[-1], rtol=0, atol=1e-8)
    assert (answer(wrong, EPS)[0] - X0_[0]).abs().max() > 0.1


def test_it_is_the_papers_formula_and_judged_as_x0():
    interpolant, data, noise = VariancePreserving(), X0_ + 0.3, EPS - 0.2
    denoiser = NetworkDenoiser(network=Says(data, noise), interpolant=interpolant, prediction=Both())
    alpha, sigma = (c[:, None, None, None] for c in interpolant(LEVELS))
    x = seen(interpolant)
    expected = sigma**2 * data + alpha * (x - sigma * noise)
    torch.testing.assert_close(denoiser(x, LEVELS), expected, rtol=1e-12, atol=1e-12)
    plain = NetworkDenoiser(network=Says(expected), interpolant=interpolant, prediction=X0())
    torch.testing.assert_close(
        eps_error(denoiser, X0_, EPS, LEVELS), eps_error(plain, X0_, EPS, LEVELS), rtol=1e-9, atol=1e-12
    )


def test_a_network_of_too_few_channels_is_one_line():
    denoiser = NetworkDenoiser(network=Says(X0_), interpolant=VariancePreserving(), prediction=Both())
    with pytest.raises(
        ValueError, match=r"needs a network of 4 output channels for data of 2.*model.out_channels=4"
    ):
        denoiser(X0_, LEVELS)

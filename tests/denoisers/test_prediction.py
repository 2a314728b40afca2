"""All prediction types are one two-by-two solve."""

import math

import pytest
import torch

from diffusion_lab.denoisers import (
    EDM,
    X0,
    Eps,
    EpsResidual,
    NetworkDenoiser,
    Score,
    V,
    Velocity,
    eps_error_scale,
    target,
    x0_from,
)
from diffusion_lab.process import RectifiedFlow, VarianceExploding, VariancePreserving, ddim_step, marginal

PREDICTIONS = [X0(), Eps(), EpsResidual(), V(), Velocity(), Score(), EDM(sigma_data=0.5), EDM(sigma_data=1.3)]
INTERPOLANTS = [VariancePreserving(), VarianceExploding(), RectifiedFlow()]
each = pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
every = pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=lambda i: type(i).__name__)


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    x0, eps, wrong = (torch.randn(5, 6, generator=g, dtype=torch.float64) for _ in range(3))
    return x0, eps, wrong, torch.tensor([-8.0, -2.0, 0.0, 3.0, 8.0], dtype=torch.float64)


@each
@every
def test_target_gives_back_x0(prediction, interpolant, problem):
    x0, eps, _, logsnr = problem
    alpha, sigma = interpolant(logsnr)
    x = marginal(interpolant, x0, eps, logsnr)
    raw = target(prediction, x0, eps, alpha, sigma)
    torch.testing.assert_close(x0_from(prediction, x, raw, alpha, sigma), x0, rtol=0, atol=1e-11)


@each
@every
def test_error_exchange_rate(prediction, interpolant, problem):
    x0, eps, wrong, logsnr = problem
    alpha, sigma = interpolant(logsnr)
    x = marginal(interpolant, x0, eps, logsnr)
    raw = target(prediction, x0, eps, alpha, sigma)
    x0_hat = x0_from(prediction, x, raw + wrong, alpha, sigma)
    eps_hat = (x - alpha[:, None] * x0_hat) / sigma[:, None]
    scaled = eps_error_scale(prediction, alpha, sigma) * (wrong**2).sum(1)
    torch.testing.assert_close(scaled, ((eps_hat - eps) ** 2).sum(1), rtol=1e-8, atol=0)


def test_a_silent_network_takes_its_input_for_noise(problem):
    # VDM's base measure: eps_hat = F + x in the variance-preserving process
    x0, eps, wrong, logsnr = problem
    alpha, sigma = VariancePreserving()(logsnr)
    x = marginal(VariancePreserving(), x0, eps, logsnr)
    x0_hat = x0_from(EpsResidual(), x, wrong, alpha, sigma)
    eps_hat = (x - alpha[:, None] * x0_hat) / sigma[:, None]
    torch.testing.assert_close(eps_hat, wrong + x, rtol=1e-9, atol=1e-9)


def test_v_in_its_own_words(problem):
    x0, eps, wrong, logsnr = problem
    alpha, sigma = VariancePreserving()(logsnr)
    x = marginal(VariancePreserving(), x0, eps, logsnr)
    # Salimans & Ho 2022: x0 = alpha x - sigma v
    expected = alpha[:, None] * x - sigma[:, None] * wrong
    torch.testing.assert_close(x0_from(V(), x, wrong, alpha, sigma), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [0.5, 1.3])
def test_edm_in_its_own_words(problem, d):
    x0, eps, raw, logsnr = problem
    alpha, sigma = VarianceExploding()(logsnr)
    x = marginal(VarianceExploding(), x0, eps, logsnr)
    # Karras et al. 2022, eq. 7: D = c_skip x + c_out F
    c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / torch.sqrt(sigma**2 + d**2)
    expected = c_skip[:, None] * x + c_out[:, None] * raw
    torch.testing.assert_close(
        x0_from(EDM(sigma_data=d), x, raw, alpha, sigma), expected, rtol=1e-10, atol=1e-10
    )


def test_targets_in_their_papers_words(problem):
    x0, eps, _, logsnr = problem
    alpha, sigma = torch.sigmoid(logsnr).sqrt()[:, None], torch.sigmoid(-logsnr).sqrt()[:, None]
    d, s = 0.7, sigma / alpha
    # Karras et al. 2022, eq. 8, for y = x0 + s eps: F = (x0 - c_skip y) / c_out
    c_skip, c_out = d**2 / (s**2 + d**2), s * d / torch.sqrt(s**2 + d**2)
    expected = {
        X0(): x0,
        Eps(): eps,
        V(): alpha * eps - sigma * x0,  # Salimans & Ho 2022, section 4
        Velocity(): eps - x0,  # Liu et al. 2022, eq. 1, with time towards the noise
        Score(): -eps / sigma,  # grad of log N(x; alpha x0, sigma^2) = -(x - alpha x0) / sigma^2
        EDM(sigma_data=d): (x0 - c_skip * (x0 + s * eps)) / c_out,
    }
    for prediction, value in expected.items():
        got = target(prediction, x0, eps, alpha[:, 0], sigma[:, 0])
        torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-10, msg=repr(prediction))


@every
def test_v_is_the_same_target_and_the_same_error_in_every_interpolant(interpolant, problem):
    x0, eps, _, logsnr = problem
    alpha, sigma = interpolant(logsnr)
    a, s = torch.sigmoid(logsnr).sqrt()[:, None], torch.sigmoid(-logsnr).sqrt()[:, None]
    torch.testing.assert_close(target(V(), x0, eps, alpha, sigma), a * eps - s * x0, rtol=1e-12, atol=1e-13)
    # the unit of VMSE: |v_err|^2 = (1 + 1 / SNR) |eps_err|^2
    expected = 1 / (1 + torch.exp(-logsnr))
    torch.testing.assert_close(eps_error_scale(V(), alpha, sigma), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", [X0(), V(), Velocity(), EDM()], ids=repr)
@pytest.mark.parametrize("interpolant", [VariancePreserving(), RectifiedFlow()], ids=["vp", "rf"])
def test_pure_noise_is_no_special_case(prediction, interpolant):
    alpha, sigma = interpolant(torch.tensor([-math.inf], dtype=torch.float64))
    x0, eps = torch.full((1, 2), 0.7, dtype=torch.float64), torch.full((1, 2), -0.4, dtype=torch.float64)
    raw = target(prediction, x0, eps, alpha, sigma)
    torch.testing.assert_close(x0_from(prediction, eps, raw, alpha, sigma), x0, rtol=0, atol=1e-12)


class Linear(torch.nn.Module):
    """A network that records what it was given."""

    def forward(self, x, logsnr, cond):
        self.seen = x, logsnr, cond
        return 0.3 * x


@every
@pytest.mark.parametrize("d", [0.5, 1.0, 1.3])
def test_network_sees_unit_variance(interpolant, d):
    logsnr = torch.tensor([-6.0, 0.0, 1.7, 8.0], dtype=torch.float64)
    alpha, sigma = interpolant(logsnr)
    # the four corners (x0, eps) = (+-d, +-1) have the mean square alpha^2 d^2 + sigma^2
    x0, eps = torch.tensor([[d, d, -d, -d], [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    x = alpha[:, None] * x0 + sigma[:, None] * eps
    network = Linear()
    NetworkDenoiser(network=network, interpolant=interpolant, prediction=X0(), sigma_data=d)(x, logsnr)
    seen = network.seen[0].square().mean(1)
    torch.testing.assert_close(seen, torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0)


@each
def test_network_denoiser_is_the_same_in_every_interpolant(prediction, problem):
    # c_in x is shared, so a network whose target knows no interpolant may be moved between processes: all but the score
    x0, eps, _, logsnr = problem
    outputs, inputs = [], []
    for interpolant in INTERPOLANTS:
        denoiser = NetworkDenoiser(
            network=Linear(), interpolant=interpolant, prediction=prediction, sigma_data=0.5
        )
        x = marginal(interpolant, x0, eps, logsnr)
        outputs.append(denoiser(x, logsnr))
        inputs.append(denoiser.network.seen[0])
    torch.testing.assert_close(inputs[0], inputs[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(inputs[0], inputs[2], rtol=1e-10, atol=1e-12)
    for output in outputs[1:]:
        if isinstance(prediction, Score):
            assert float((output - outputs[0]).abs().max()) > 0.1
        else:
            torch.testing.assert_close(output, outputs[0], rtol=1e-10, atol=1e-10)


def test_network_denoiser_expands_levels_and_keeps_digits():
    denoiser = NetworkDenoiser(network=Linear(), interpolant=VariancePreserving(), prediction=V())
    x = torch.zeros(3, 4)
    out = denoiser.predict(
        x, torch.tensor(1.0, dtype=torch.float64), {"label": torch.zeros(3, dtype=torch.long)}
    )
    assert denoiser.network.seen[1].shape == (3,) and out.x0.dtype == torch.float32
    assert "label" in denoiser.network.seen[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert denoiser(x, torch.tensor(1.0)).dtype == torch.float32


def test_bad_sigma_data():
    with pytest.raises(ValueError, match="sigma_data"):
        NetworkDenoiser(network=Linear(), interpolant=VariancePreserving(), prediction=V(), sigma_data=0.0)
    with pytest.raises(ValueError, match="sigma_data"):
        EDM(sigma_data=-1.0)


def test_ddim_of_a_network_ends_at_its_output():
    denoiser = NetworkDenoiser(network=Linear(), interpolant=VariancePreserving(), prediction=V())
    x, logsnr = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(2.0)
    x0 = denoiser(x, logsnr)
    assert torch.equal(ddim_step(denoiser.interpolant, x, x0, logsnr, torch.tensor(math.inf)), x0)

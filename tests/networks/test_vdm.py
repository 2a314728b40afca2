"""VDM's network: Fourier features that see the last bit, and no change of resolution."""

import math
from dataclasses import dataclass

import pytest
import torch

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.denoisers.prediction import x0_from
from diffusion_lab.images import to_float
from diffusion_lab.networks import VDMUNet
from diffusion_lab.networks.vdm import fourier_features
from diffusion_lab.process import RectifiedFlow, VarianceExploding, VariancePreserving
from tests.networks.test_networks import awake


def vdm(**options):
    return VDMUNet(**{"in_channels": 1, "channels": 16, "blocks": 2, **options})


def levels():
    """The 256 values of a pixel, as VDM maps them: 2 (k + 1/2) / 256 - 1."""
    return 2 * (torch.arange(256, dtype=torch.float64) + 0.5) / 256 - 1


def test_features_are_sines_and_cosines_of_powers_of_two_turns():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fourier_features(x, (7, 8))
    expected = [f(2**n * math.pi * x) for f in (torch.sin, torch.cos) for n in (7, 8)]
    assert found.shape == (2, 12, 4, 5)
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=0, atol=1e-9)


def test_features_show_the_last_bit_of_a_pixel():
    x = levels().view(1, 1, 16, 16)
    sine, whole, cosine, _ = fourier_features(x, (7, 8))[0].flatten(1)
    bit = 1.0 - 2.0 * (torch.arange(256) % 2)
    # at the centre of a level the phase 2^7 π x is (k + 1/2) π - 2^7 π
    torch.testing.assert_close(sine, bit.double(), rtol=0, atol=1e-9)
    assert float(cosine.abs().max()) < 1e-9 and float(whole.abs().max()) < 1e-9
    # float32 keeps enough of it, half precision would not: so the phases are never computed in it
    rough = fourier_features(x.float(), (7, 8))
    assert float((rough[0, 0].flatten() - sine).abs().max()) < 1e-3
    for low in (torch.bfloat16, torch.float16):
        few = levels()[120:136].view(1, 1, 4, 4).to(low)
        out = fourier_features(few, (7, 8))
        assert out.dtype == low
        torch.testing.assert_close(out.double(), fourier_features(few.double(), (7, 8)), rtol=0, atol=8e-3)


@pytest.mark.parametrize("interpolant", [VariancePreserving(), RectifiedFlow(), VarianceExploding()])
def test_the_network_sees_data_in_their_own_scale_where_sigma_data_is_one(interpolant):
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, logsnr, cond):
            seen.append(x)
            return x

    x0, eps = (
        levels().view(1, 1, 16, 16),
        torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).double(),
    )
    logsnr = torch.full((1,), 13.3, dtype=torch.float64)  # VDM's largest
    alpha, sigma = interpolant(logsnr)
    for sigma_data in (1.0, 0.5):
        denoiser = NetworkDenoiser(
            network=Spy(), interpolant=interpolant, prediction=V(), sigma_data=sigma_data
        )
        denoiser(alpha * x0 + sigma * eps, logsnr)
    # x0, with a noise of 0.0013 that is a sixth of the distance between levels; twice that with half the sigma_data
    assert float((seen[0] - x0).std()) == pytest.approx(math.exp(-13.3 / 2), rel=0.1)
    assert float((seen[1] - 2 * x0).std()) == pytest.approx(2 * math.exp(-13.3 / 2), rel=0.1)
    if isinstance(interpolant, VariancePreserving):
        torch.testing.assert_close(seen[0], alpha * x0 + sigma * eps, rtol=1e-12, atol=0)


def test_the_published_base_measure_is_a_prediction_type():
    """eps_hat = F + c_in x: target F = -alpha x0 + (1 - sigma) eps over n, solvable wherever there is any signal."""

    @dataclass(frozen=True)
    class EpsResidual:
        def coefficients(self, alpha, sigma):
            n = torch.sqrt(alpha**2 + sigma**2)
            return -alpha / n, 1.0 - sigma / n

    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    for interpolant in (VariancePreserving(), RectifiedFlow()):
        alpha, sigma = interpolant(torch.linspace(-5, 13, 4, dtype=torch.float64))
        x = alpha[:, None] * x0 + sigma[:, None] * eps
        n = torch.sqrt(alpha**2 + sigma**2)[:, None]
        F = eps - x / n
        torch.testing.assert_close(x0_from(EpsResidual(), x, F, alpha, sigma), x0, rtol=1e-9, atol=1e-9)


def test_every_feature_map_has_the_side_of_the_image():
    network = awake(vdm())
    sides = []
    for module in [*network.down, *network.middle, *network.up]:
        module.register_forward_hook(lambda m, given, out: sides.append(tuple(out.shape[1:])))
    for size in (6, 9):
        network(torch.zeros(1, 1, size, size), torch.zeros(1), None)
        assert sides == [(16, size, size)] * (2 + 2 + 3)
        sides.clear()


def test_every_block_has_a_skip_connection_and_the_middle_one_head_of_attention():
    network = awake(vdm())
    outputs, joined = [], []
    for module in (network.conv_in, *network.down):
        module.register_forward_hook(lambda m, given, out: outputs.append(out))
    for module in network.up:
        module.register_forward_pre_hook(lambda m, given: joined.append(given[0]))
    network(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2), None)
    for out, x in zip(outputs, reversed(joined), strict=True):
        assert torch.equal(x[:, 16:], out)
    attention = [stage.attention for stage in network.middle]
    assert attention[0].heads == 1 and attention[1] is None


def test_features_matter_and_can_be_left_out():
    assert vdm().conv_in.in_channels == 5 and vdm(fourier=()).conv_in.in_channels == 1
    network = awake(vdm()).double()
    x = levels()[:64].view(1, 1, 8, 8)
    with torch.no_grad():
        # one level up in one pixel: a step of 2^-7
        moved = x.clone()
        moved[..., 3, 3] += 2**-7
        told = (
            (network(moved, torch.zeros(1).double(), None) - network(x, torch.zeros(1).double(), None))
            .abs()
            .max()
        )
        network.conv_in.weight[:, 1:] = 0.0
        blind = (
            (network(moved, torch.zeros(1).double(), None) - network(x, torch.zeros(1).double(), None))
            .abs()
            .max()
        )
    assert float(told) > 30 * float(blind)


def test_the_library_s_bytes_are_put_where_the_features_can_tell_them_apart():
    network, seen = vdm().double(), []
    network.conv_in.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x = to_float(torch.arange(256, dtype=torch.uint8)).double().view(1, 1, 16, 16)
    network(x, torch.full((1,), 13.0, dtype=torch.float64), None)
    bit = 1.0 - 2.0 * (torch.arange(256) % 2)
    # bytes are float32 when they come, so 2^7 pi x is good to a few 1e-5
    torch.testing.assert_close(seen[0][0, 1].flatten(), bit.double(), rtol=0, atol=1e-4)

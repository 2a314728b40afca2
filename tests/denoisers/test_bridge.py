"""The field of a bridge: what its network is told and asked, and the coordinate it shares with our processes."""

import math

import pytest
import torch

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.denoisers.bridge import (
    BridgeField,
    InterpolantField,
    PathInterpolant,
    reads_image,
    time_of,
)
from diffusion_lab.networks import UNet
from diffusion_lab.process import RectifiedFlow, VariancePreserving
from diffusion_lab.process.stochastic_interpolant import LinearPath, StochasticInterpolant, TrigonometricPath

D64 = torch.float64
PATHS = {
    "linear": (LinearPath(), RectifiedFlow()),
    "trigonometric": (TrigonometricPath(), VariancePreserving()),
}
every = pytest.mark.parametrize(("path", "process"), PATHS.values(), ids=PATHS.keys())
LEVELS = torch.linspace(-16, 16, 33, dtype=D64)
NOISY = StochasticInterpolant(path=LinearPath(), noise=0.3)


@every
def test_time_is_the_inverse_of_the_logsnr_of_the_path(path, process):
    tau = time_of(path, LEVELS)
    a, b = path(tau)
    torch.testing.assert_close(2 * torch.log(b / a), LEVELS, rtol=0, atol=1e-10)
    assert time_of(path, torch.tensor([-math.inf, 0.0, math.inf])).tolist() == [0.0, 0.5, 1.0]
    # so near an end that float64 cannot tell it from the end
    assert time_of(path, torch.tensor([-1e4, 1e4])).tolist() == pytest.approx([0.0, 1.0], abs=1e-15)


@every
def test_from_gaussian_noise_its_coefficients_are_those_of_our_process(path, process):
    ends = torch.cat([LEVELS, torch.tensor([-math.inf, math.inf], dtype=D64)])
    for ours, theirs in zip(PathInterpolant(path=path)(ends), process(ends), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert PathInterpolant(path=path)(torch.zeros(2))[0].dtype == torch.float32


class Twice(torch.nn.Module):
    """v and xi as two functions of x; keeps what it was told."""

    def forward(self, x, logsnr, cond):
        self.told = logsnr, cond
        return torch.cat([torch.sin(x), torch.cos(x)], dim=1)


class Once(torch.nn.Module):
    def forward(self, x, logsnr, cond):
        return torch.sin(x)


def test_velocity_and_xi_are_the_halves_and_times_keep_the_margin():
    network = Twice()
    field = InterpolantField(network=network, bridge=NOISY, margin=0.1)
    x = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=D64)
    tau = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=D64)
    v, xi = field(x, tau)
    assert torch.equal(v, torch.sin(x)) and torch.equal(xi, torch.cos(x))
    assert torch.equal(network.told[0], NOISY.logsnr(torch.tensor([0.1, 0.1, 0.5, 0.9, 0.9], dtype=D64)))
    assert torch.equal(field.predict(x, tau).raw, torch.cat([v, xi], 1))
    # under autocast the network answers in half precision
    network.forward = lambda x, logsnr, cond: torch.zeros(5, 4, 3, 3, dtype=torch.bfloat16)
    assert field(x.float(), tau)[0].dtype == torch.float32


def test_a_bridge_without_noise_has_only_a_velocity():
    field = InterpolantField(network=Once(), bridge=StochasticInterpolant(path=LinearPath(), noise=0.0))
    x = torch.ones(2, 3, 4, 4)
    v, xi = field(x, torch.tensor([0.0, 1.0]))
    assert torch.equal(v, torch.sin(x)) and xi is None


def unet(image_channels):
    return UNet(
        in_channels=1, out_channels=2, size=4, channels=8, multipliers=[1], blocks=1, attention=[],
        head_channels=8, num_classes=0, image_channels=image_channels,
    )  # fmt: skip


def test_a_network_is_told_the_source_only_if_it_sees_images():
    x, tau = torch.zeros(2, 1, 4, 4), torch.full((2,), 0.5)
    cond = {"image": torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))}
    for channels in (0, 1):
        network = unet(channels)
        assert reads_image(network) == bool(channels)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        field = InterpolantField(network=network, bridge=NOISY)
        with torch.no_grad():
            assert torch.equal(field(x, tau, cond)[0], field(x, tau)[0]) == (channels == 0)
            # what nobody reads is still refused
            with pytest.raises(ValueError, match="colour"):
                field(x, tau, {**cond, "colour": torch.zeros(2)})
    # a network of one's own that says nothing of what it reads is told no source, and all else
    own = Twice()
    InterpolantField(network=own, bridge=NOISY)(x, tau, {**cond, "label": torch.zeros(2)})
    assert list(own.told[1]) == ["label"]
    InterpolantField(network=own, bridge=NOISY)(x, tau, cond)
    assert own.told[1] is None


def test_a_field_is_no_denoiser_and_says_so():
    field = InterpolantField(network=Twice(), bridge=NOISY)
    assert isinstance(field, BridgeField)
    assert not isinstance(
        NetworkDenoiser(network=Once(), interpolant=RectifiedFlow(), prediction=V()), BridgeField
    )


@pytest.mark.parametrize(("noise", "network", "channels"), [(0.3, Once(), 6), (0.0, Twice(), 3)])
def test_another_number_of_channels_is_refused_by_what_to_set(noise, network, channels):
    bridge = StochasticInterpolant(path=LinearPath(), noise=noise)
    with pytest.raises(ValueError, match=rf"model\.out_channels={channels}$"):
        InterpolantField(network=network, bridge=bridge)(torch.zeros(2, 3, 4, 4), torch.full((2,), 0.5))


def test_a_margin_out_of_range_is_refused():
    for margin in (-0.1, 0.5):
        with pytest.raises(ValueError, match="margin"):
            InterpolantField(network=Twice(), bridge=NOISY, margin=margin)

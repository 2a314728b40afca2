"""Averages against brute force."""

import copy

import numpy as np
import pytest
import torch

from diffusion_lab.ema import EMA, ConstantDecay, PowerFunction, Profile, sigma_rel_to_gamma


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(3, 2)
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))


def test_gamma_of_the_paper():
    # papers: sigma_rel .05 -> gamma 16.97, .10 -> 6.94
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.25])
def test_gamma_inverts_the_width(sigma_rel):
    gamma = sigma_rel_to_gamma(sigma_rel)
    assert np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PowerFunction(sigma_rel=0.0),
        lambda: PowerFunction(sigma_rel=0.5),
        lambda: ConstantDecay(half_life_images=0),
    ],
)
def test_bad_profiles_are_refused(make):
    with pytest.raises(ValueError):
        make()


def run(profile, updates=200, batch=16):
    net = Net().double()
    average, history = EMA(net, profile), []
    start = net.a.weight.detach().clone()
    g = torch.Generator().manual_seed(0)
    for k in range(1, updates + 1):
        with torch.no_grad():
            net.a.weight += 0.1 * torch.randn(2, 3, generator=g, dtype=torch.float64)
            net.count += 1
        average.update(net, k * batch, batch)
        history.append(net.a.weight.detach().clone())
    return average, torch.stack(history), start, net


@pytest.mark.parametrize(
    ("profile", "decay"),
    [
        # after the k-th update of 16 images; Karras et al. 2022, appendix F.2, and 2024, section 3 (gamma 6.937)
        (ConstantDecay(half_life_images=500, ramp_up=None), lambda k: 2 ** (-16 / 500)),
        (ConstantDecay(half_life_images=100), lambda k: 2 ** (-16 / min(100, 0.05 * 16 * k))),
        (ConstantDecay(half_life_images=100, ramp_up=0.2), lambda k: 2 ** (-16 / min(100, 0.2 * 16 * k))),
        (PowerFunction(sigma_rel=0.1), lambda k: (1 - 1 / k) ** 7.937203937601805),
    ],
    ids=["constant", "ramped", "ramped_fast", "power"],
)
def test_against_explicit_weights(profile, decay):
    assert isinstance(profile, Profile)
    average, history, start, net = run(profile)
    decays = [decay(k) for k in range(1, 201)]
    weights = [(1 - d) * float(np.prod(decays[k + 1 :])) for k, d in enumerate(decays)]
    expected = float(np.prod(decays)) * start + sum(w * h for w, h in zip(weights, history, strict=True))
    torch.testing.assert_close(average.module.a.weight, expected, rtol=1e-10, atol=1e-12)
    assert int(average.module.count) == int(net.count) == 200


def test_half_life():
    profile = ConstantDecay(half_life_images=500, ramp_up=None)
    assert profile.decay(10**9, 500) == pytest.approx(0.5)
    # the ramp: half-life at most a twentieth of what was seen
    assert ConstantDecay(half_life_images=500).decay(1000, 50) == pytest.approx(0.5)


def test_power_profile_has_the_width_it_promises():
    profile, n = PowerFunction(sigma_rel=0.1), 4000
    decays = np.array([profile.decay(k, 1) for k in range(1, n + 1)])
    assert decays[0] == 0.0
    weights = (1 - decays) * np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    place = (np.arange(1, n + 1) - 0.5) / n
    mean = (weights * place).sum()
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.sqrt((weights * (place - mean) ** 2).sum()) == pytest.approx(0.1, rel=2e-3)


def test_shadow_is_apart_from_the_live_module():
    average, _, _, net = run(PowerFunction(sigma_rel=0.1), updates=3)
    before = copy.deepcopy(net.state_dict())
    assert not average.module.training and not any(p.requires_grad for p in average.module.parameters())
    average.update(net, 64, 16)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_state_is_exact():
    average, *_ = run(PowerFunction(sigma_rel=0.1), updates=5)
    other = EMA(Net().double(), PowerFunction(sigma_rel=0.1))
    other.load_state_dict(average.state_dict())
    assert all(torch.equal(v, average.state_dict()[k]) for k, v in other.state_dict().items())


def test_moving_a_module_between_updates_is_followed():
    net, start = Net(), torch.ones(2, 3, dtype=torch.float64)
    average = EMA(net, ConstantDecay(half_life_images=16, ramp_up=None))
    average.update(net, 16, 16)
    # a change of dtype, like one of device, gives every tensor a new storage and every buffer a new object
    net.double()
    average.module.double()
    with torch.no_grad():
        net.a.weight.copy_(start)
        average.module.a.weight.zero_()
        net.count += 5
    average.update(net, 32, 16)
    torch.testing.assert_close(average.module.a.weight, 0.5 * start)
    assert int(average.module.count) == 5

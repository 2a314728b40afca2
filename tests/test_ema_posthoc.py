"""Reconstructed averages against quadrature, and against averages that were tracked."""

import numpy as np
import pytest
import torch

from diffusion_lab.ema import EMA, PowerFunction, sigma_rel_to_gamma
from diffusion_lab.ema_posthoc import combine, inner_products, solve_weights

TRACKED = (0.05, 0.10)


def moments(count, end, widths=TRACKED):
    """Times and exponents of `count` evenly spaced snapshots of every width."""
    times = [end * (k + 1) / count for k in range(count) for _ in widths]
    return times, [sigma_rel_to_gamma(width) for width in widths] * count


def profile(tau, time, gamma):
    return np.where(tau <= time, (gamma + 1) * tau**gamma / time ** (gamma + 1), 0.0)


@pytest.mark.parametrize("gammas", [(16.97, 6.94), (6.94, 16.97), (2.0, 0.0)])
@pytest.mark.parametrize("times", [(3.0, 5.0), (5.0, 3.0), (4.0, 4.0), (0.5, 5.0)])
def test_inner_products_by_quadrature(times, gammas):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    end = min(times)  # beyond it one of the two is zero
    tau, weights = end * (nodes + 1) / 2, end * weights / 2
    expected = np.sum(weights * profile(tau, times[0], gammas[0]) * profile(tau, times[1], gammas[1]))
    assert inner_products(times[0], gammas[0], times[1], gammas[1]) == pytest.approx(expected, rel=1e-9)
    assert inner_products(times[1], gammas[1], times[0], gammas[0]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.075, 0.13, 0.2])
@pytest.mark.parametrize("count", [3, 8, 32])
def test_weights_sum_to_one(count, sigma_rel):
    found = solve_weights(*moments(count, 1000.0), 1000.0, sigma_rel_to_gamma(sigma_rel))
    assert found.weights.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("index", [0, 1, 17, 62, 63])
def test_a_tracked_profile_is_itself(index):
    times, gammas = moments(32, 1e6)
    found = solve_weights(times, gammas, times[index], gammas[index])
    np.testing.assert_allclose(found.weights, np.eye(64)[index], atol=1e-10)
    # an error of zero is a root of a difference of rounded numbers
    assert found.error < 1e-7


@pytest.mark.parametrize(
    ("sigma_rel", "error"), [(0.03, 1.1e-2), (0.075, 9e-4), (0.13, 1.3e-3), (0.20, 6.4e-3)]
)
def test_the_error_of_the_profile(sigma_rel, error):
    """With 32 snapshots of two widths; the error that is told is the distance on a fine grid."""
    times, gammas = moments(32, 1.0)
    target = sigma_rel_to_gamma(sigma_rel)
    found = solve_weights(times, gammas, 1.0, target)
    assert found.error == pytest.approx(error, rel=0.05)
    # profiles jump at the snapshots' times, so the midpoints of cells that end there
    tau = (np.arange(64_000) + 0.5) / 64_000
    made = sum(x * profile(tau, t, g) for x, t, g in zip(found.weights, times, gammas, strict=True))
    wanted = profile(tau, 1.0, target)
    assert np.sqrt(np.sum((made - wanted) ** 2) / np.sum(wanted**2)) == pytest.approx(found.error, rel=1e-3)


def test_the_weights_are_the_best_that_sum_to_one():
    times, gammas = moments(8, 1.0)
    target = sigma_rel_to_gamma(0.075)
    found = solve_weights(times, gammas, 1.0, target)
    t, g = np.array(times), np.array(gammas)
    A, b = inner_products(t[:, None], g[:, None], t, g), inner_products(t, g, 1.0, target)
    # at the minimum the gradient has nothing but a component across the constraint
    gradient = A @ found.weights - b
    np.testing.assert_allclose(gradient, gradient.mean(), atol=1e-10)


def test_without_a_unit_times_change_nothing():
    x = solve_weights(*moments(8, 1.0), 1.0, 5.0).weights
    np.testing.assert_allclose(solve_weights(*moments(8, 7e6), 7e6, 5.0).weights, x, rtol=1e-9)


def test_the_decay_of_a_run_is_the_profile_integrated_over_each_step():
    gamma, steps, batch = sigma_rel_to_gamma(0.1), 300, 16
    power = PowerFunction(sigma_rel=0.1)
    decays = np.array([power.decay(k * batch, batch) for k in range(1, steps + 1)])
    weights = (1 - decays) * np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    np.testing.assert_allclose(weights, np.diff(edges), rtol=1e-11, atol=1e-300)
    # and what it means for the inner product: of step functions, so up to the square of a step's share
    exact = float(inner_products(1.0, gamma, 1.0, gamma))
    assert np.sum(weights**2) * steps == pytest.approx(exact, rel=(gamma * gamma) / steps**2)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(5))
        self.still = torch.nn.Parameter(torch.full((2,), 3.0))
        self.register_buffer("count", torch.tensor(0))


def follow(widths, steps=960, batch=16, keep=30):
    """Track averages along a path that turns and trembles; return them and their snapshots, every `keep` steps."""
    net = Net().double()
    averages = {width: EMA(net, PowerFunction(sigma_rel=width)) for width in widths}
    noise = torch.Generator().manual_seed(0)
    taken = []
    for k in range(1, steps + 1):
        s = k / steps
        path = torch.tensor([s, s**3, np.sin(9 * s), np.exp(-3 * s), np.sqrt(s)], dtype=torch.float64)
        with torch.no_grad():
            net.w.copy_(path + 0.05 * torch.randn(5, generator=noise, dtype=torch.float64))
            net.count += 1
        for width, average in averages.items():
            average.update(net, k * batch, batch)
            if k % keep == 0:
                state = {name: value.clone() for name, value in average.state_dict().items()}
                taken.append((k * batch, width, state))
    return averages, taken, steps * batch


@pytest.mark.parametrize(("width", "tolerance"), [(0.04, 2e-3), (0.075, 3e-4), (0.13, 3e-4), (0.2, 2e-3)])
def test_reconstruction_matches_an_average_that_was_tracked(width, tolerance):
    averages, taken, end = follow((*TRACKED, width))
    used = [item for item in taken if item[1] in TRACKED]
    gammas = [sigma_rel_to_gamma(item[1]) for item in used]
    found = solve_weights([item[0] for item in used], gammas, end, sigma_rel_to_gamma(width))
    made = combine((item[2] for item in used), found.weights, copied={"count"})
    direct = averages[width].module
    # an error of the profile times the size of what is averaged, about one
    assert (made["w"] - direct.w).abs().max() < tolerance
    other = min(float((averages[tracked].module.w - direct.w).abs().max()) for tracked in TRACKED)
    assert other > 10 * tolerance, "the widths differ by more than that"
    torch.testing.assert_close(made["still"], torch.full((2,), 3.0), rtol=1e-6, atol=0)
    assert made["w"].dtype == torch.float32 and int(made["count"]) == 960


def test_an_average_as_of_an_earlier_moment_is_that_of_a_shorter_run():
    """Out of snapshots up to then; a profile is relative to its own time."""
    _, taken, end = follow((*TRACKED, 0.075))
    then = end // 2
    used = [item for item in taken if item[1] in TRACKED and item[0] <= then]
    gammas = [sigma_rel_to_gamma(item[1]) for item in used]
    found = solve_weights([item[0] for item in used], gammas, then, sigma_rel_to_gamma(0.075))
    made = combine((item[2] for item in used), found.weights, copied={"count"})
    direct = next(item[2] for item in taken if item[0] == then and item[1] == 0.075)
    assert (made["w"] - direct["w"]).abs().max() < 2e-3 and int(made["count"]) == 480


def test_sums_are_taken_in_double_precision():
    """Large weights of both signs cancel; float16 snapshots are added exactly."""
    states = [{"w": torch.full((3,), 1.0, dtype=torch.float16)} for _ in range(3)]
    made = combine(states, [1e9 + 1, -1e9, 0.25])
    assert torch.equal(made["w"], torch.full((3,), 1.25))


def test_what_does_not_fit_is_refused():
    one, other = {"w": torch.ones(2)}, {"v": torch.ones(2)}
    with pytest.raises(ValueError, match="not all of them have 'v'"):
        combine([one, other], [0.5, 0.5])
    with pytest.raises(ValueError, match="'w' differs in shape"):
        combine([one, {"w": torch.ones(3)}], [0.5, 0.5])
    with pytest.raises(ValueError):
        combine([one], [0.5, 0.5])
    with pytest.raises(ValueError, match="no snapshots"):
        combine([], [])
    with pytest.raises(ValueError, match="positive times"):
        solve_weights([], [], 1.0, 5.0)
    with pytest.raises(ValueError, match="positive times"):
        solve_weights([0.0, 1.0], [5.0, 5.0], 1.0, 5.0)

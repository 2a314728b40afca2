"""ParaDiGMS: DDIM's samples, fewer sequential calls, each sample on its own."""

import math

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, mixture_1d

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.samplers import DDIM, CountingDenoiser
from diffusion_lab.samplers.grids import karras, uniform_logsnr, uniform_u
from diffusion_lab.samplers.paradigms import ParaDiGMS

VP = INTERPOLANTS["vp"]


def mixture(interpolant=VP, dim=16):
    draw = torch.Generator().manual_seed(5)
    return GaussianMixtureDenoiser(
        means=0.5 * torch.randn(8, dim, generator=draw, dtype=D64),
        variances=torch.full((8,), 0.2**2, dtype=D64),
        weights=torch.ones(8, dtype=D64),
        interpolant=interpolant,
    )


def start(n, dim=16):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=D64)


class Logging:
    """Keeps what the denoiser was asked."""

    def __init__(self, denoiser):
        self.interpolant, self.denoiser, self.asked = denoiser.interpolant, denoiser, []

    def __call__(self, x, logsnr, cond=None):
        self.asked.append((x, logsnr, cond))
        return self.denoiser(x, logsnr, cond)


@pytest.mark.parametrize(("window", "tolerance"), [(1, 0.0), (4, 0.0), (6, 1e-3), (100, 0.0), (100, 0.1)])
def test_laws(window, tolerance):
    laws.check_everything(ParaDiGMS(window=window, tolerance=tolerance))


@pytest.mark.slow
def test_order_is_ddims():
    laws.check_order(ParaDiGMS(window=40, tolerance=0.0), 1)


@pytest.mark.parametrize("window", [1, 2, 7, 30, 64])
@pytest.mark.parametrize("name", ["vp", "ve", "rf"])
def test_without_tolerance_it_is_ddim_at_every_level(window, name):
    interpolant, grid = INTERPOLANTS[name], karras(0.01, 80.0, 7.0, 30)
    x, seen, other = start(5) * interpolant(grid[0])[1], [], []
    denoiser = mixture(interpolant)
    end = ParaDiGMS(window=window, tolerance=0.0)(
        denoiser, x, grid, on_step=lambda k, level, x, x0: seen.append((k, level, x, x0))
    )
    exact = DDIM()(denoiser, x, grid, on_step=lambda k, level, x, x0: other.append((k, level, x, x0)))
    assert len(seen) == len(other) == 30
    for (k, level, got, got_x0), (l, same, want, want_x0) in zip(seen, other, strict=True):
        # under the exploding process x itself is up to 80
        size = float(torch.sqrt(sum(c**2 for c in interpolant(level))))
        assert k == l and float(level) == float(same)
        torch.testing.assert_close(got / size, want / size, rtol=0, atol=1e-12)
        torch.testing.assert_close(got_x0, want_x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [5, 16, 50])
def test_error_follows_the_tolerance_and_rounds_fall(window):
    grid, x = karras(0.002, 80.0, 7.0, 50), start(24)
    exact, rounds = DDIM()(mixture(), x, grid), []
    for tolerance in (0.0, 1e-6, 1e-4, 1e-3):
        found = ParaDiGMS(window=window, tolerance=tolerance).solve(mixture(), x, grid)
        error = (found.x[-1] - exact).square().mean(1).sqrt()
        assert float(error.max()) <= 4 * tolerance + 1e-12
        assert int(found.rounds.max()) <= 50
        rounds.append(int(found.rounds.max()))
    assert rounds == sorted(rounds, reverse=True) and rounds[-1] <= 50 / min(window, 16) + 12, rounds


def test_rounds_are_the_calls_of_the_slowest_and_rows_the_work():
    grid, x = karras(0.002, 80.0, 7.0, 50), start(24)
    counting = CountingDenoiser(Logging(mixture()))
    sampler = ParaDiGMS(window=50, tolerance=1e-3)
    found = sampler.solve(counting, x, grid)
    assert counting.calls == int(found.rounds.max()) < 15
    assert int(found.rounds.min()) < int(found.rounds.max())
    sizes = [len(x) for x, _, _ in counting.denoiser.asked]
    # samples that have arrived are asked no more
    assert max(sizes) == 50 * 24 and min(sizes) < 24
    # the same work and rounds alone
    for b in (int(found.rounds.argmin()), int(found.rounds.argmax())):
        alone = sampler.solve(mixture(), x[b : b + 1], grid)
        assert int(alone.rounds[0]) == int(found.rounds[b])
        assert torch.equal(alone.x[:, 0], found.x[:, b]) and torch.equal(alone.x0[:, 0], found.x0[:, b])


def test_conditions_go_with_their_rows():
    logging = Logging(mixture_1d(VP))
    grid = uniform_u(PURE_COSINE, 20)
    cond = {"label": torch.tensor([0, 1, 0, 1, 1]), "text": torch.arange(10.0).reshape(5, 2)}
    x = start(5, dim=1)
    end = ParaDiGMS(window=6, tolerance=1e-3)(logging, x, grid, cond=cond)
    for asked, logsnr, rows in logging.asked:
        assert len(asked) == len(logsnr) == len(rows["label"]) == len(rows["text"])
        # row 2 b of the text belongs to label b
        assert torch.equal(cond["label"][(rows["text"][:, 0] / 2).long()], rows["label"])
    for b in range(5):
        alone = ParaDiGMS(window=6, tolerance=1e-3)(
            mixture_1d(VP), x[b : b + 1], grid, cond={name: v[b : b + 1] for name, v in cond.items()}
        )
        assert torch.equal(alone[0], end[b])


@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize(("window", "tolerance"), [(7, 0.0), (16, 1e-3)])
def test_any_split_of_the_batch_gives_the_same_bits(window, tolerance, dtype):
    """Under the exploding process: the others' torch.sigmoid rounds the end of a vector differently from its body.

    It does so for DDIM as well, and where it does the two agree to rounding only; see the law for the house's case.
    """
    ve, grid = INTERPOLANTS["ve"], karras(0.01, 80.0, 7.0, 30)
    sampler, x = ParaDiGMS(window=window, tolerance=tolerance), 80 * start(20).to(dtype)
    parts = [sampler(mixture(ve), part, grid) for part in x.split([1, 2, 3, 5, 9])]
    assert torch.equal(sampler(mixture(ve), x, grid), torch.cat(parts))


def test_levels_are_seen_in_order_and_early():
    logging, calls = Logging(mixture()), []
    ParaDiGMS(window=8, tolerance=1e-4)(
        logging,
        start(4),
        karras(0.01, 80.0, 7.0, 40),
        on_step=lambda k, level, x, x0: calls.append((k, len(logging.asked))),
    )
    assert [k for k, _ in calls] == list(range(40))
    # the first level is final after the first round, the last only at the end
    assert calls[0][1] == 1 and calls[-1][1] == len(logging.asked)


@pytest.mark.parametrize(("window", "tolerance"), [(4, 1e-6), (8, 1e-2), (30, 1e-3)])
def test_it_is_the_papers_algorithm_with_diffusers_steps(window, tolerance):
    """Algorithm 1 written out for one sample, its drift from diffusers' DDIMParallelScheduler, round by round.

    The tolerance is ours (absolute); the order of the loop, the stride and the start of new points are the paper's.
    """
    diffusers = pytest.importorskip("diffusers")
    grid, N = uniform_logsnr(-7.0, 7.0, 30), 30
    scheduler = diffusers.DDIMParallelScheduler(
        num_train_timesteps=N, prediction_type="sample", clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(N)
    # time step T - 1 - i is level i; the step before time 0 is clean
    scheduler.alphas_cumprod = torch.sigmoid(grid[:-1]).flip(0)
    denoiser, x = mixture(), start(1)
    logging = Logging(denoiser)
    found = ParaDiGMS(window=window, tolerance=tolerance).solve(logging, x, grid)

    z, t, rounds = x.expand(N + 1, *x.shape[1:]).clone(), 0, 0
    while t < N:
        p = min(window, N - t)
        i = torch.arange(t, t + p)
        torch.testing.assert_close(logging.asked[rounds][0], z[i], rtol=0, atol=1e-9)
        x0 = denoiser(z[i], grid[i])
        drift = scheduler.batch_step_no_noise(x0, N - 1 - i, z[i]) - z[i]
        new = z[t] + drift.cumsum(0)
        if t + p == N:
            new[-1] = x0[-1]
        error = (new - z[t + 1 : t + p + 1]).square().mean(1).sqrt()
        z[t + 1 : t + p + 1] = new
        stride = next((j for j in range(1, p + 1) if error[j - 1] > tolerance), p)
        z[t + p + 1 :] = z[t + p]
        t, rounds = t + stride, rounds + 1
    assert rounds == int(found.rounds[0])
    torch.testing.assert_close(found.x[-1][0], z[-1], rtol=0, atol=1e-9)


def test_parameters_are_checked():
    for bad in (
        dict(window=0, tolerance=0.0),
        dict(window=3, tolerance=-1.0),
        dict(window=3, tolerance=math.nan),
    ):
        with pytest.raises(ValueError, match="ParaDiGMS needs"):
            ParaDiGMS(**bad)
    with pytest.raises(ValueError, match="grid"):
        ParaDiGMS(window=3, tolerance=0.0)(mixture(), start(2), torch.tensor([1.0, 0.0]))

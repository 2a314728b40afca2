"""The bound as a loss: invariance of its value, and the two kinds of gradients of VDM."""

import math

import pytest
import torch

from diffusion_lab.denoisers import GaussianDenoiser, NetworkDenoiser, V
from diffusion_lab.losses.vlb import VariationalBound, VDMLoss
from diffusion_lab.losses.vlb_terms import Levels
from diffusion_lab.process import Cosine, LinearLogSNR, VariancePreserving
from diffusion_lab.process.schedules import LearnedLinear, LearnedSchedule
from diffusion_lab.rng import StepRNG

D64 = torch.float64
LOW, HIGH = -5.0, 9.0
C = 0.7
# two values of the right variance: errors are quadratic in the data, so they stand for N(0, C)
TWO = Levels(count=2, low=-math.sqrt(C), high=math.sqrt(C))


def rng(total, step=0, positions=slice(None), seed=0):
    return StepRNG(seed=seed, step=step, positions=positions, total=total)


def bent(width=16, seed=0):
    """A learned schedule with the ends of the others and a curve far from the line."""
    schedule = LearnedSchedule(logsnr_min=LOW, logsnr_max=HIGH, width=width).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in ("w2", "b2", "w3"):
            parameter = getattr(schedule, name)
            parameter.copy_(3.0 * torch.randn(parameter.shape, generator=g, dtype=D64))
    return schedule


def gaussian(dimensions):
    return GaussianDenoiser(
        mean=torch.zeros(dimensions, dtype=D64),
        covariance=torch.full((dimensions,), C, dtype=D64),
        interpolant=VariancePreserving(),
    )


SCHEDULES = {
    "linear": LinearLogSNR(logsnr_min=LOW, logsnr_max=HIGH),
    "cosine": Cosine(logsnr_min=LOW, logsnr_max=HIGH),
    "learned_linear": LearnedLinear(logsnr_min=LOW, logsnr_max=HIGH),
    "learned": bent(),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
EXACT = 0.5 * (math.log1p(C * math.exp(HIGH)) - math.log1p(C * math.exp(LOW)))


class Quadrature:
    """Stands in for StepRNG: midpoint levels, and noise at the two Gauss-Hermite nodes, exact for squared errors."""

    def __init__(self, levels):
        u = (torch.arange(levels, dtype=D64) + 0.5) / levels
        self.u = u.repeat_interleave(4)
        self.signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=D64)
        self.signs = self.signs.repeat(levels, 1)

    def stratified(self, tag):
        return self.u

    def randn(self, tag, shape, dtype=D64):
        return self.signs[:, 1:].expand(-1, *shape)

    def data(self):
        return math.sqrt(C) * self.signs[:, :1]


@every
@torch.no_grad()
def test_the_bound_does_not_depend_on_the_schedule_s_interior(schedule):
    nodes = Quadrature(40_000)
    losses = [VariationalBound(schedule=schedule, levels=TWO)]
    if isinstance(schedule, (LearnedLinear, LearnedSchedule)):
        losses.append(VDMLoss(schedule=schedule, levels=TWO))
    for loss in losses:
        terms = loss(gaussian(1), nodes.data(), None, nodes)
        assert float(terms.diffusion.mean()) == pytest.approx(EXACT, abs=1e-6)
        prior = 0.5 * ((C - 1) / (1 + math.exp(-LOW)) + math.log1p(math.exp(LOW)))
        torch.testing.assert_close(terms.prior, torch.full_like(terms.prior, prior), rtol=1e-12, atol=0)
        parts = terms.diffusion + terms.prior + terms.reconstruction
        assert torch.equal(terms.total, terms.per_example.mean())
        torch.testing.assert_close(terms.per_example, parts, rtol=1e-12, atol=0)
        torch.testing.assert_close(terms.bits_per_dim, parts / math.log(2), rtol=1e-12, atol=0)


@every
@torch.no_grad()
def test_nor_within_the_error_of_random_batches(schedule):
    loss = VariationalBound(schedule=schedule, levels=TWO)
    g = torch.Generator().manual_seed(1)
    values = []
    for step in range(100):
        signs = torch.randint(0, 2, (128, 8), generator=g).double() * 2 - 1
        terms = loss(gaussian(8), math.sqrt(C) * signs, None, rng(128, step))
        values.append(float(terms.diffusion.mean()))
    values = torch.tensor(values)
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - EXACT) < 4 * error and error < 0.02 * EXACT


@every
@pytest.mark.parametrize("steps", [1, 7, 200])
@torch.no_grad()
def test_the_discrete_bound_is_the_sum_over_its_steps(schedule, steps):
    nodes = Quadrature(steps)
    loss = VariationalBound(schedule=schedule, levels=TWO, steps=steps)
    terms = loss(gaussian(1), nodes.data(), None, nodes)
    ends = torch.exp(schedule(torch.linspace(0, 1, steps + 1, dtype=D64)))
    exact = 0.5 * float(((ends[:-1] - ends[1:]) * C / (1 + C * ends[1:])).sum())
    assert float(terms.diffusion.mean()) == pytest.approx(exact, rel=1e-10)
    assert exact > EXACT


def test_every_step_is_reached_and_no_other():
    loss = VariationalBound(schedule=SCHEDULES["linear"], levels=TWO, steps=4)
    s, t = loss.step(torch.tensor([0.0, 0.24, 0.25, 0.999, 1.0], dtype=D64))
    assert s.tolist() == [0, 0, 0.25, 0.75, 0.75] and t.tolist() == [0.25, 0.25, 0.5, 1, 1]
    with pytest.raises(TypeError, match="no steps"):
        VariationalBound(schedule=SCHEDULES["linear"], levels=TWO).step(s)


class Small(torch.nn.Module):
    """A network that is nonlinear in the data, and hears the level."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.3, 0.2], dtype=D64))

    def forward(self, x, logsnr, cond):
        return torch.sin(self.weight[0] * x) + self.weight[1] * torch.tanh(0.3 * logsnr)[:, None]


def problem(n=16):
    g = torch.Generator().manual_seed(3)
    x0 = Levels().positions(torch.zeros((), dtype=D64))[torch.randint(0, 256, (n, 5), generator=g)]
    return NetworkDenoiser(network=Small(), interpolant=VariancePreserving(), prediction=V()), x0


def written_out(schedule, denoiser, x0, stream):
    """The diffusion loss of each example, from the definitions, in the letters of the paper's gamma."""
    u, eps = stream.stratified("noise_level"), stream.randn("noise", (5,), dtype=D64)
    u.requires_grad_()
    gamma = -schedule(u)
    (gamma_slope,) = torch.autograd.grad(gamma.sum(), u, create_graph=True)
    alpha, sigma = torch.sqrt(torch.sigmoid(-gamma))[:, None], torch.sqrt(torch.sigmoid(gamma))[:, None]
    z = alpha * x0 + sigma * eps
    v = denoiser.network(z, -gamma, None)
    return 0.5 * gamma_slope * (sigma * z + alpha * v - eps).square().mean(1)


@pytest.mark.parametrize("width", [0, 6])
def test_ends_learn_from_the_bound_and_the_curve_from_the_variance(width):
    schedule = bent(width) if width else LearnedLinear(logsnr_min=LOW, logsnr_max=HIGH).double()
    denoiser, x0 = problem()
    loss = VDMLoss(schedule=schedule, levels=Levels())
    terms = loss(denoiser, x0, None, rng(16))
    terms.total.backward()

    L = written_out(schedule, denoiser, x0, rng(16))
    torch.testing.assert_close(terms.diffusion, L, rtol=1e-9, atol=0)
    ends = [schedule.logsnr_min, schedule.logsnr_max]
    interior = [p for name, p in schedule.named_parameters() if not name.startswith("logsnr")]
    assert len(interior) == (4 if width else 0)
    rest = VariationalBound(schedule=schedule, levels=Levels())(denoiser, x0, None, rng(16))
    bound = (L + rest.prior + rest.reconstruction).mean()
    for p, expected in zip(
        [*ends, denoiser.network.weight],
        torch.autograd.grad(bound, [*ends, denoiser.network.weight], retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=0)
    if interior:
        for p, expected in zip(interior, torch.autograd.grad(L.square().mean(), interior), strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-11)


def test_gradients_accumulate_and_scale_as_others_do():
    # half a batch twice, with the loss multiplied by 3 as a gradient scaler does
    denoiser, x0 = problem()
    grads = []
    for parts, scale in (([slice(None)], 1.0), ([slice(0, 8), slice(8, 16)], 3.0)):
        schedule = bent(6)
        loss = VDMLoss(schedule=schedule, levels=Levels())
        for rows in parts:
            total = loss(denoiser, x0[rows], None, rng(16, positions=rows)).total
            (scale * total / len(parts)).backward()
        grads.append([p.grad / scale for p in schedule.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-11)


def test_with_finitely_many_steps_all_learn_from_the_bound():
    schedule = bent(6)
    denoiser, x0 = problem()
    parameters = list(schedule.parameters())
    by_vdm = VDMLoss(schedule=schedule, levels=Levels(), steps=5)(denoiser, x0, None, rng(16)).total
    by_bound = VariationalBound(schedule=schedule, levels=Levels(), steps=5)(
        denoiser, x0, None, rng(16)
    ).total
    assert torch.equal(by_vdm, by_bound)
    torch.testing.assert_close(
        torch.autograd.grad(by_vdm, parameters), torch.autograd.grad(by_bound, parameters), rtol=1e-12, atol=0
    )


def test_learning_cuts_the_variance_and_leaves_the_bound():
    def mean_and_variance():
        nodes = Quadrature(4000)
        with torch.no_grad():
            values = loss(gaussian(1), nodes.data(), None, nodes).diffusion
        # over the levels: the noise of a single example's error is not the schedule's to cut
        by_level = values.view(-1, 4).mean(1)
        return float(by_level.mean()), float(by_level.var())

    schedule = LearnedSchedule(logsnr_min=LOW, logsnr_max=HIGH, width=32)
    loss = VDMLoss(schedule=schedule, levels=TWO)
    interior = [p for name, p in schedule.named_parameters() if not name.startswith("logsnr")]
    optimizer = torch.optim.Adam(interior, lr=0.05)
    mean, variance = mean_and_variance()
    for _ in range(100):
        nodes = Quadrature(100)
        optimizer.zero_grad()
        loss(gaussian(1), nodes.data(), None, nodes).total.backward()
        optimizer.step()
    mean_after, variance_after = mean_and_variance()
    assert mean == pytest.approx(EXACT, abs=1e-4) and mean_after == pytest.approx(EXACT, abs=1e-4)
    assert variance_after < 0.2 * variance


@pytest.mark.parametrize("steps", [None, 10])
def test_processes_together_see_one_batch(steps):
    denoiser, x0 = problem(8)
    loss = VDMLoss(schedule=bent(6), levels=Levels(), steps=steps, label_dropout=0.5)
    cond = {"label": torch.arange(8)}
    whole = loss(denoiser, x0, cond, rng(8)).per_example
    for rank in range(2):
        rows = slice(rank, None, 2)
        part = loss(denoiser, x0[rows], {"label": cond["label"][rows]}, rng(8, positions=rows)).per_example
        torch.testing.assert_close(part, whole[rows], rtol=1e-12, atol=0)


@every
@torch.no_grad()
def test_given_levels_are_used(schedule):
    denoiser, x0 = problem(3)
    logsnr = torch.tensor([-4.0, 1.0, 8.5], dtype=D64)
    loss = VariationalBound(schedule=schedule, levels=Levels())
    terms = loss(denoiser, x0, None, rng(3), logsnr=logsnr)
    torch.testing.assert_close(terms.logsnr, logsnr, rtol=0, atol=1e-10)
    eps = rng(3).randn("noise", (5,), dtype=D64)
    alpha, sigma = (c[:, None] for c in VariancePreserving()(logsnr))
    z = alpha * x0 + sigma * eps
    error = (sigma * z + alpha * denoiser.network(z, logsnr, None) - eps).square().mean(1)
    expected = 0.5 * torch.exp(-schedule.log_density(logsnr)) * error
    torch.testing.assert_close(terms.diffusion, expected, rtol=1e-8, atol=0)


def test_misuse_is_named():
    linear = SCHEDULES["linear"]
    with pytest.raises(ValueError, match="finite ends"):
        VariationalBound(schedule=Cosine(logsnr_min=-math.inf), levels=TWO)
    with pytest.raises(TypeError, match="not LinearLogSNR"):
        VDMLoss(schedule=linear, levels=TWO)
    with pytest.raises(ValueError, match="steps >= 1"):
        VariationalBound(schedule=linear, levels=TWO, steps=0)
    with pytest.raises(ValueError, match="label_dropout"):
        VariationalBound(schedule=linear, levels=TWO, label_dropout=2.0)
    with pytest.raises(ValueError, match="not among"):
        VariationalBound(schedule=linear, levels=Levels())(gaussian(2), torch.full((1, 2), 0.3), None, rng(1))

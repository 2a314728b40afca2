"""UniPC: its special cases, its orders, its calls, and agreement with diffusers step by step."""

import math

import laws
import pytest
import torch
from problems import D64, INTERPOLANTS, PURE_COSINE, mixture_1d, mixture_4d

from diffusion_lab.samplers import DDIM, CountingDenoiser, DPMSolverPP2M
from diffusion_lab.samplers.grids import karras, uniform_u
from diffusion_lab.samplers.unipc import UniPC

VARIANTS = {
    f"{order}-{'pc' if corrector else 'p'}-{variant}": UniPC(
        order=order, corrector=corrector, variant=variant
    )
    for order in (1, 2, 3)
    for corrector in (False, True)
    for variant in ("bh1", "bh2")
}
every = pytest.mark.parametrize("sampler", VARIANTS.values(), ids=VARIANTS.keys())


@every
def test_laws(sampler):
    laws.check_everything(sampler)


@every
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_call_a_step(sampler, steps):
    counting = CountingDenoiser(mixture_1d(INTERPOLANTS["vp"]))
    sampler(counting, torch.zeros(2, 1, dtype=D64), uniform_u(PURE_COSINE, steps))
    assert counting.calls == steps


# ---- special cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "other"),
    [
        (UniPC(order=1, corrector=False), DDIM()),
        (UniPC(order=2, corrector=False, variant="bh2"), DPMSolverPP2M()),
    ],
    ids=["ddim", "2m"],
)
def test_special_cases(sampler, other):
    for interpolant in INTERPOLANTS.values():
        torch.testing.assert_close(
            laws.run(sampler, interpolant), laws.run(other, interpolant), rtol=0, atol=1e-12
        )


def test_the_corrector_repeats_the_step_with_the_output_at_its_end():
    # order 1, bh2: x_corrected = DDIM's map with x0 replaced by the mean of both ends
    vp = INTERPOLANTS["vp"]
    problem, levels = mixture_1d(vp), torch.tensor([-2.0, -0.5, 1.0], dtype=D64)
    x, sampler = torch.tensor([[0.7]], dtype=D64), UniPC(order=1)

    def bound(x, logsnr):
        return problem(x, logsnr.reshape(1))

    bound.interpolant = vp
    predicted, state = sampler.step(bound, x, levels[0], levels[1], None, None)
    found, (corrected, _) = sampler.step(bound, predicted, levels[1], levels[2], state, None)
    ends = 0.5 * (bound(x, levels[0]) + bound(predicted, levels[1]))
    (a, s), (a1, s1), (a2, s2) = (vp(level) for level in levels)
    expected = s1 / s * (x - a * ends) + a1 * ends
    torch.testing.assert_close(corrected, expected, rtol=0, atol=1e-14)
    x0 = bound(predicted, levels[1])
    torch.testing.assert_close(found, s2 / s1 * (expected - a1 * x0) + a2 * x0, rtol=0, atol=1e-14)


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize(("order", "corrector"), [(2, False), (1, True), (2, True)])
def test_order(order, corrector, variant):
    laws.check_order(UniPC(order=order, corrector=corrector, variant=variant), order + corrector)


def test_order_one_without_corrector():
    # DDIM's error constant still shrinks at 320 steps (section "Order test protocol" of our notes: .48 .62 .75)
    laws.check_order(UniPC(order=1, corrector=False), 1)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_order_four_with_corrector(variant):
    laws.check_order(UniPC(order=3, variant=variant), 4)


def test_local_order_three_without_corrector():
    # the first step, DDIM's, caps the global order at 2
    laws.check_local_order(UniPC(order=3, corrector=False), 3)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_local_order_of_the_corrector(order, variant):
    # predict from outputs at exact points, correct, and look at the corrected point, which is in the state
    for name, interpolant in INTERPOLANTS.items():
        sampler, errors, problem = UniPC(order=order, variant=variant), [], mixture_1d(interpolant)

        def bound(x, logsnr, problem=problem):
            return problem(x, logsnr.expand(len(x)))

        bound.interpolant = interpolant
        for h in (0.2, 0.1, 0.05):
            levels = [torch.tensor(1.0 + h * (k - order), dtype=D64) for k in range(order + 2)]
            exact = laws.exact_trajectory(interpolant, levels[:-1])
            past = [(level, bound(x, level)) for level, x in zip(levels[: order - 1], exact, strict=False)]
            # the step that leads to exact[order], from a state without a correction to make
            state = (exact[order - 2], past[::-1]) if past else None
            uncorrected = UniPC(order=order, corrector=False, variant=variant)
            x, state = uncorrected.step(
                bound, exact[order - 1], levels[order - 1], levels[order], state, None
            )
            _, (corrected, _) = sampler.step(bound, x, levels[order], levels[order + 1], state, None)
            errors.append(float((corrected - exact[order]).abs().max()))
        observed = math.log2(errors[-2] / errors[-1]) - 1
        assert abs(observed - (order + 1)) <= 0.35, (name, observed, errors)


# ---- public code -----------------------------------------------------------------------------------------------------

GRID = karras(0.05, 20.0, 7.0, 12)


@every
def test_diffusers(sampler):
    diffusers = pytest.importorskip("diffusers")
    vp, steps = INTERPOLANTS["vp"], len(GRID) - 1
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=sampler.order,
        solver_type=sampler.variant,
        prediction_type="sample",
        disable_corrector=[] if sampler.corrector else list(range(steps)),
        lower_order_final=False,
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.exp(-GRID / 2)
    problem, ours, theirs = mixture_4d(vp), [], []
    x = vp(GRID[0])[1] * torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=D64)
    end = sampler(problem, x, GRID, on_step=lambda k, logsnr, x, x0: ours.append(x))
    for k, t in enumerate(scheduler.timesteps):
        if k == steps - 1:
            # to sigma = 0 any higher order is 0 / 0; lower_order_final from the start would lower the last but one too
            scheduler.register_to_config(lower_order_final=True)
        x = scheduler.step(problem(x, GRID[k]), t, x).prev_sample
        theirs.append(x)
    assert torch.equal(end, ours[-1])
    # to sigma = 0 under bh1 the scheduler multiplies its infinite B = h by an empty sum, which is nan; ours is x0
    last = steps if sampler.variant == "bh2" else steps - 1
    for a, b in zip(ours[:last], theirs[:last], strict=True):
        assert float((a - b).abs().max()) < 1e-12 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("options", [{"order": 0}, {"order": 4}, {"variant": "bh3"}, {"variant": "exact"}])
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError):
        UniPC(**options)

"""Composition: the product of Gaussian classes in closed form, its known bias, identities to the bit, true costs."""

import math
from functools import partial

import pytest
import torch
from problems import ALL_SAMPLERS, D64, INTERPOLANTS, gaussian, mixture_1d

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.guidance.composition import Composition
from diffusion_lab.process import Cosine
from diffusion_lab.samplers import CountingDenoiser, Generation, Heun
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.typing import NO_LABEL, conditional_of

GRID = uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), 12)
LABEL = {"label": torch.tensor([0, 1, 1, 0])}
X = torch.linspace(-2, 2, 4, dtype=D64)[:, None]
LEVEL = torch.full((4,), 0.7, dtype=D64)
each = pytest.mark.parametrize("interpolant", INTERPOLANTS.values(), ids=INTERPOLANTS.keys())


def whole(label, n=4):
    return {"label": torch.full((n,), label)}


class GaussianClasses:
    """Class k is N(m_k, s_k); without a label N(0, S)."""

    def __init__(self, interpolant, means, variances, S):
        self.interpolant = interpolant
        self.classes = [gaussian(interpolant, s, mean=m) for m, s in zip(means, variances, strict=True)]
        self.all = gaussian(interpolant, S)
        self.seen = []

    def __call__(self, x, logsnr, cond=None):
        label = torch.full((len(x),), NO_LABEL) if cond is None else cond["label"]
        self.seen.append(label)
        out = self.all(x, logsnr)
        for k, denoiser in enumerate(self.classes):
            out = torch.where((label == k)[:, None], denoiser(x, logsnr), out)
        return out


MEANS, VARIANCES, S = (0.7, -0.4, 0.2), (0.3, 0.5, 0.8), 1.5


@each
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("labels", "weights"),
    [
        ([0, 1], [1.0, 1.0]),
        ([1, 2], [1.0, -0.5]),
        ([2, 0, 1], [0.5, 2.0, -0.7]),
        ([0, 1], [0.25, 0.75]),
        ([1], [3.0]),
    ],
    ids=["and", "not", "weighted", "average", "one"],
)
def test_gaussian_classes_in_closed_form(interpolant, labels, weights, batched):
    # prod_i p_i^w_i p^(1 - sum w) of noised Gaussians: precision P = sum_i w_i / v_i + (1 - sum w) / v_u and mean
    # alpha sum_i (w_i m_i / v_i) / P; "and" is p(x | a) p(x | b) / p(x)
    alpha, sigma = (c[:, None] for c in interpolant(LEVEL))
    v_u, rest = alpha**2 * S + sigma**2, 1 - sum(weights)
    v = [alpha**2 * VARIANCES[k] + sigma**2 for k in labels]
    P = sum(w / v_k for w, v_k in zip(weights, v, strict=True)) + rest / v_u
    mean = alpha * sum(w * MEANS[k] / v_k for w, k, v_k in zip(weights, labels, v, strict=True)) / P
    denoiser = GaussianClasses(interpolant, MEANS, VARIANCES, S)
    x0 = Composition(denoiser, labels, weights, batched)(X, LEVEL, LABEL)
    torch.testing.assert_close((X - alpha * x0) / sigma, sigma * P * (X - mean), rtol=0, atol=1e-12)
    # one call for all branches, or one each; none without a label where the weights add up to one
    told = [int(label) for call in denoiser.seen for label in call.reshape(-1, 4)[:, 0]]
    assert told == (labels if rest == 0 else [NO_LABEL, *labels])
    assert len(denoiser.seen) == (1 if batched else len(told))


@each
def test_known_bias_of_a_product(interpolant):
    # d V / d(sigma^2) = P V in the exploding process, so two classes of variance s at w = (1, 1) end at
    # V = s^2 / S (1 + S / T) / (1 + s / T)^2 for a start of variance T; the product of the data has s S / (2 S - s)
    s, grid = 0.3, uniform_u(Cosine(logsnr_min=-14, logsnr_max=14), 400)
    denoiser = GaussianClasses(interpolant, (0.0, 0.0), (s, s), S)
    T = math.exp(-float(grid[0]))
    x = interpolant(grid[0])[1] * torch.tensor([[1.0], [-2.0]], dtype=D64)
    ends = Heun()(Composition(denoiser, [0, 1], [1.0, 1.0]), x, grid)
    assert float(ends[1] / ends[0]) == pytest.approx(
        -2.0, abs=1e-10
    )  # linear: the slope is the standard deviation
    variance = float(ends[0]) ** 2
    assert variance == pytest.approx(s**2 / S * (1 + S / T) / (1 + s / T) ** 2, rel=2e-3)
    assert variance == pytest.approx(0.36 * s * S / (2 * S - s), rel=2e-3)  # too certain, by this much


@each
def test_one_label_is_classifier_free_to_the_bit(interpolant):
    counting = CountingDenoiser(mixture_1d(interpolant), batch=4)
    for weight, calls in ((0.0, 1), (0.3, 2), (1.0, 1), (2.5, 2), (-1.0, 2)):
        expected = ClassifierFree(counting.denoiser, weight)(X, LEVEL, whole(1))
        counting.calls = 0
        assert torch.equal(Composition(counting, [1], [weight])(X, LEVEL, LABEL), expected)
        assert counting.calls == calls
    # labels without a weight are not asked about
    counting.calls = 0
    assert torch.equal(
        Composition(counting, [0, 1], [0.0, 1.0])(X, LEVEL), counting.denoiser(X, LEVEL, whole(1))
    )
    assert torch.equal(Composition(counting, [0, 1], [0.0, 0.0])(X, LEVEL), counting.denoiser(X, LEVEL))
    assert counting.calls == 2 and conditional_of(Composition(counting, [0], [1.0])) is counting


@each
def test_one_call_answers_like_three_and_the_labels_asked_for_do_not_matter(interpolant):
    one, three = (CountingDenoiser(mixture_1d(interpolant)) for _ in range(2))
    settings = {"labels": [0, 1], "weights": [1.5, -0.5001]}
    x0 = Composition(one, **settings)(X, LEVEL, LABEL)
    assert torch.equal(x0, Composition(three, **settings, batched=False)(X, LEVEL, None))
    assert (one.calls, three.calls) == (1, 3)


def test_other_conditions_go_to_every_branch():
    class Listening:
        interpolant = INTERPOLANTS["vp"]

        def __call__(self, x, logsnr, cond=None):
            assert cond is not None
            assert (
                torch.equal(cond["text"], text.repeat(3, 1)) and cond["seed"].tolist() == list(range(4)) * 3
            )
            assert cond["label"].tolist() == [-1] * 4 + [0] * 4 + [1] * 4
            return torch.zeros_like(x)

    text = torch.arange(8.0).reshape(4, 2)
    Composition(Listening(), [0, 1], [1.0, 1.0])(X, LEVEL, {**LABEL, "text": text, "seed": torch.arange(4)})


@pytest.mark.parametrize("dtype", [torch.float32, D64])
@pytest.mark.parametrize("name", ["vp", "rf"])
def test_pure_noise_is_finite_and_types_are_kept(name, dtype):
    level = torch.full((4,), -math.inf, dtype=dtype)
    x0 = Composition(mixture_1d(INTERPOLANTS[name]), [0, 1], [2.0, 1.0])(X.to(dtype), level)
    # the means: 0.26 + 2 (-1 - 0.26) + (0.8 - 0.26)
    torch.testing.assert_close(x0, torch.full((4, 1), -1.72, dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        ([], [], "at least one label"),
        ([0, 1], [1.0], "one weight each"),
        ([0.0], [1.0], "classes"),
        (["0"], [1.0], "classes"),
        ([True], [1.0], "classes"),
        ([-1], [1.0], "classes"),
    ],
)
def test_settings_are_checked(labels, weights, message):
    with pytest.raises(ValueError, match=message):
        Composition(mixture_1d(INTERPOLANTS["vp"]), labels, weights)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "dpmpp_2m"])
@each
def test_runs_with_samplers_and_splits_of_the_batch(interpolant, sampler):
    guidance = partial(Composition, labels=[0, 1], weights=[0.8, 0.7])
    recipe = Generation(sampler=ALL_SAMPLERS[sampler], grid=GRID, guidance=guidance, shape=(1,))
    samples = recipe(mixture_1d(interpolant), seeds=range(8))
    parts = [recipe(mixture_1d(interpolant), seeds=part) for part in (range(3), range(3, 8))]
    assert torch.equal(samples, torch.cat(parts))
    assert samples.dtype == torch.float32 and bool(torch.isfinite(samples).all())


def test_weights_that_add_up_to_one_but_for_rounding_need_no_unconditional_answer():
    assert sum((0.6, 0.3, 0.1)) != 1.0
    problem = GaussianMixtureDenoiser(
        means=torch.tensor([[-1.0], [0.0], [1.0]], dtype=D64),
        variances=torch.full((3,), 0.1, dtype=D64),
        weights=torch.ones(3, dtype=D64),
        labels=torch.arange(3),
        interpolant=INTERPOLANTS["vp"],
    )
    counting = CountingDenoiser(problem, batch=2)
    Composition(counting, labels=[0, 1, 2], weights=[0.6, 0.3, 0.1])(
        torch.zeros(2, 1, dtype=D64), torch.zeros(2, dtype=D64)
    )
    assert counting.calls == 3

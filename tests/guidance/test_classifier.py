"""Classifier guidance on Gaussian classes with Bayes' classifier: the identities, and what is not asked."""

import math

import pytest
import torch

from diffusion_lab.denoisers import GaussianMixtureDenoiser
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.guidance.classifier import ClassifierGuidance
from diffusion_lab.process import RectifiedFlow, VarianceExploding, VariancePreserving
from diffusion_lab.process.gaussian import posterior

D64 = torch.float64
MEANS = torch.tensor([[-1.0, 0.3], [0.8, 0.0], [0.2, -0.9]], dtype=D64)
LABELS = torch.tensor([0, 1, 0])
INTERPOLANTS = {"vp": VariancePreserving(), "ve": VarianceExploding(), "rf": RectifiedFlow()}


def exact(interpolant):
    return GaussianMixtureDenoiser(
        means=MEANS,
        variances=torch.tensor([0.2, 0.35, 0.3], dtype=D64) ** 2,
        weights=torch.tensor([0.3, 0.5, 0.2], dtype=D64),
        labels=LABELS,
        interpolant=interpolant,
    )


class Bayes:
    """p(label | x, logsnr) of the mixture, as logits with an offset of their own; counts calls."""

    def __init__(self, mixture):
        self.mixture, self.calls = mixture, 0

    def __call__(self, x, logsnr):
        self.calls += 1
        prior = torch.tensor([0.5, 0.5], dtype=D64)
        each = [
            self.mixture.log_density(x, logsnr, {"label": torch.full((len(x),), k)}) + prior[k].log()
            for k in (0, 1)
        ]
        return torch.stack(each, dim=1) + 3.0


def problem(name, seed=0):
    mixture = exact(INTERPOLANTS[name])
    logsnr = torch.tensor([-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0, 9.0], dtype=D64)
    rng = torch.Generator().manual_seed(seed)
    x0, label = mixture.sample(8, rng)
    alpha, sigma = mixture.interpolant(logsnr)
    x = alpha[:, None] * x0 + sigma[:, None] * torch.randn(8, 2, generator=rng, dtype=D64)
    return mixture, Bayes(mixture), x, logsnr, {"label": label}


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_scale_one_on_the_unconditional_denoiser_is_the_conditional_one(name):
    mixture, bayes, x, logsnr, cond = problem(name)
    guided = ClassifierGuidance(mixture, bayes, scale=1.0, with_label=False)
    assert (guided(x, logsnr, cond) - mixture(x, logsnr, cond)).abs().max() < 1e-10
    assert (mixture(x, logsnr) - mixture(x, logsnr, cond)).abs().max() > 0.1


@pytest.mark.parametrize("name", INTERPOLANTS)
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, -1.0])
def test_on_the_conditional_denoiser_it_is_classifier_free_guidance_of_scale_one_more(name, scale):
    mixture, bayes, x, logsnr, cond = problem(name)
    guided = ClassifierGuidance(mixture, bayes, scale=scale)
    free = ClassifierFree(mixture, scale=1.0 + scale)
    assert (guided(x, logsnr, cond) - free(x, logsnr, cond)).abs().max() < 1e-10
    # and around another guidance the gradients add up
    inner = ClassifierGuidance(mixture, bayes, scale=scale, inner=lambda d: ClassifierFree(d, scale=2.0))
    free = ClassifierFree(mixture, scale=2.0 + scale)
    assert (inner(x, logsnr, cond) - free(x, logsnr, cond)).abs().max() < 1e-10


def test_where_the_classifier_is_not_asked():
    mixture, bayes, x, logsnr, cond = problem("vp")
    alone = mixture(x, logsnr, cond)
    assert torch.equal(ClassifierGuidance(mixture, bayes, scale=0.0)(x, logsnr, cond), alone)
    assert torch.equal(
        ClassifierGuidance(mixture, bayes, scale=2.0, interval=(20, 30))(x, logsnr, cond), alone
    )
    free = ClassifierGuidance(mixture, bayes, scale=2.0)
    for nothing in (None, {}, {"seed": torch.arange(8)}):
        assert torch.equal(free(x, logsnr, nothing), mixture(x, logsnr))
    assert bayes.calls == 0
    inside = ClassifierGuidance(mixture, bayes, scale=2.0, interval=(-2, 2))(x, logsnr, cond)
    within = (logsnr >= -2) & (logsnr <= 2)
    assert torch.equal(inside[~within], alone[~within]) and bayes.calls == 1
    assert (inside[within] - ClassifierFree(mixture, scale=3.0)(x, logsnr, cond)[within]).abs().max() < 1e-10


def test_examples_without_a_label_are_not_guided():
    mixture, bayes, x, logsnr, cond = problem("vp")
    some = {"label": torch.where(torch.arange(8) % 2 == 0, -1, cond["label"])}
    out = ClassifierGuidance(mixture, bayes, scale=2.0)(x, logsnr, some)
    assert torch.equal(out[::2], mixture(x, logsnr)[::2])
    assert (out[1::2] - ClassifierFree(mixture, scale=3.0)(x, logsnr, cond)[1::2]).abs().max() < 1e-10


def test_ends_are_finite_and_no_graph_is_left():
    mixture, bayes, x, _, cond = problem("vp")
    guided = ClassifierGuidance(mixture, bayes, scale=2.0)
    for level in (-math.inf, 40.0):
        with torch.no_grad():
            out = guided(x, torch.full((8,), level, dtype=D64), cond)
        assert bool(out.isfinite().all()) and not out.requires_grad
    lowest = torch.full((8,), -math.inf, dtype=D64)
    assert torch.equal(guided(x, lowest, cond), mixture(x, lowest, cond))
    # no example depends on its neighbours
    level = torch.zeros(8, dtype=D64)
    whole, part = guided(x, level, cond), guided(x[2:5], level[2:5], {"label": cond["label"][2:5]})
    assert torch.equal(whole[2:5], part)


def test_float32_stays_and_it_can_be_differentiated_again():
    mixture, bayes, x, logsnr, cond = problem("vp")
    guided = ClassifierGuidance(mixture, bayes, scale=2.0)
    assert guided(x.float(), logsnr.float(), cond).dtype == torch.float32
    free = ClassifierFree(mixture, scale=3.0)
    grads = []
    for denoiser in (guided, free):
        y = x.clone().requires_grad_(True)
        grads.append(torch.autograd.grad(denoiser(y, logsnr, cond).square().sum(), y)[0])
    assert (grads[0] - grads[1]).abs().max() < 1e-8 * grads[1].abs().max()


def test_a_label_that_the_classifier_does_not_know_is_named():
    mixture, bayes, x, logsnr, _ = problem("vp")
    guided = ClassifierGuidance(mixture, bayes, scale=2.0, with_label=False)
    with pytest.raises(ValueError, match=r"label 5 is not one of the classifier's 2 classes \(0 .. 1\)"):
        guided(x, logsnr, {"label": torch.full((8,), 5)})
    with pytest.raises(ValueError, match="low <= high"):
        ClassifierGuidance(mixture, bayes, scale=2.0, interval=(1, 0))
    with pytest.raises(ValueError, match="needs a classifier"):
        ClassifierGuidance(mixture, {"run": None}, scale=2.0)


def test_it_runs_in_inference_mode_too():
    mixture, bayes, x, logsnr, cond = problem("vp")
    guided = ClassifierGuidance(mixture, bayes, scale=2.0)
    outside = guided(x, logsnr, cond)
    with torch.inference_mode():
        inside = guided(x.clone(), logsnr.clone(), {"label": cond["label"].clone()})
    assert torch.equal(inside, outside) and not inside.requires_grad


def test_negative_labels_other_than_none_are_no_classes():
    mixture, bayes, x, logsnr, _ = problem("vp")
    guided = ClassifierGuidance(mixture, bayes, scale=2.0, with_label=False)
    with pytest.raises(ValueError, match="label -2 is not one of the classifier's 2 classes"):
        guided(x, logsnr, {"label": torch.tensor([0, -1, -2, 1, 0, 0, 0, 0])})


@pytest.mark.parametrize("beta", [0.3, 0.03, 0.003])
def test_an_ancestral_step_tends_to_the_papers_first_algorithm(beta):
    mixture, bayes, x, _, cond = problem("vp")
    level = torch.tensor(-1.0, dtype=D64)
    # alpha^2 = alpha_next^2 (1 - beta)
    later = torch.logit(torch.sigmoid(level) / (1 - beta))
    scale = 2.0
    guided = ClassifierGuidance(mixture, bayes, scale=scale)
    levels = level.expand(8)
    mean, _, _ = posterior(mixture.interpolant, x, guided(x, levels, cond), level, later)
    plain, lower, upper = posterior(mixture.interpolant, x, mixture(x, levels, cond), level, later)
    y = x.clone().requires_grad_()
    log_p = torch.log_softmax(bayes(y, levels), 1).gather(1, cond["label"][:, None]).sum()
    (g,) = torch.autograd.grad(log_p, y)
    torch.testing.assert_close(mean - plain, scale * beta / math.sqrt(1 - beta) * g, rtol=1e-9, atol=1e-12)
    # the paper's, with either variance: not the same, and the less so the longer the step
    assert float(upper) == pytest.approx(beta, rel=1e-9)
    for variance in (lower, upper):
        ratio = float(beta / math.sqrt(1 - beta) / variance)
        assert 1 + beta / 2.1 < ratio < 1 + 2.5 * beta

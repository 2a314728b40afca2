"""CADS: the annealed condition's statistics, thresholds, null rows, seeds, and what it does to variety."""

import math
from functools import partial

import pytest
import torch
from problems import ALL_SAMPLERS, D64, INTERPOLANTS, mixture_1d

from diffusion_lab.denoisers import NetworkDenoiser, V
from diffusion_lab.guidance import ClassifierFree
from diffusion_lab.guidance.cads import CADS
from diffusion_lab.networks import MLP
from diffusion_lab.process import Cosine
from diffusion_lab.process.broadcast import broadcast_right, expand_logsnr
from diffusion_lab.samplers import DDIM, CountingDenoiser, Generation
from diffusion_lab.samplers.grids import uniform_u
from diffusion_lab.typing import NO_LABEL, SEED

VP = INTERPOLANTS["vp"]
WIDTH = 64
TABLE = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0), dtype=D64) * 0.3 + 0.1


class Told:
    """Remembers what it was told. Its data are N(means @ embedding, 0.1), one number a sample."""

    interpolant = VP

    def __init__(self):
        self.heard = []

    def embed(self, cond):
        rest = {name: value for name, value in cond.items() if name != "label"}
        label = torch.where(cond["label"] == NO_LABEL, 2, cond["label"])
        return {**rest, "label_embedding": TABLE[label]}

    def __call__(self, x, logsnr, cond=None):
        self.heard.append(cond)
        if cond is not None and "label" in cond:
            cond = self.embed(cond)
        c = (
            TABLE[2].expand(len(x), -1)
            if cond is None or "label_embedding" not in cond
            else cond["label_embedding"]
        )
        mean = broadcast_right((c @ (TABLE[0] - TABLE[1])) / WIDTH / 0.09, x)
        alpha, sigma = (broadcast_right(c, x) for c in VP(expand_logsnr(logsnr, x)))
        return mean + alpha * 0.1 / (alpha**2 * 0.1 + sigma**2) * (x - alpha * mean)


def hear(guidance, labels, level, seeds=None, **cond):
    """The condition that the model gets at one level."""
    told = Told()
    n = len(labels)
    seeds = torch.arange(n) if seeds is None else seeds
    x = torch.zeros(n, 1, dtype=D64)
    levels = torch.as_tensor(level, dtype=D64).expand(n)
    guidance(told)(x, levels, {"label": torch.as_tensor(labels), SEED: seeds, **cond})
    return told.heard[-1]


@pytest.mark.parametrize("level", [-3.6, 0.0, math.inf])
def test_late_the_model_hears_the_label_itself(level):
    cond = hear(partial(CADS, noise=2.0), [0, 1], level)
    assert torch.equal(cond["label"], torch.tensor([0, 1])) and "label_embedding" not in cond


@pytest.mark.parametrize(
    ("level", "kept"), [(-math.inf, 0.0), (-8.1, 0.0), (-6.0, 2.1 / 4.5), (-4.0, 4.1 / 4.5)]
)
@pytest.mark.parametrize("noise", [0.25, 1.5])
def test_without_rescaling_the_condition_is_the_noisy_one_of_the_paper(level, kept, noise):
    n = 4000
    cond = hear(partial(CADS, noise=noise, mixing=0.0), [1] * n, level)
    assert "label" not in cond
    c, s = TABLE[1], TABLE[1].std(correction=0)
    got = (cond["label_embedding"] - math.sqrt(kept) * c) / (noise * s * math.sqrt(1 - kept))
    # standard normal numbers: mean and variance over all, and independent from one number to the next
    total = n * WIDTH
    assert abs(float(got.mean())) < 4 / math.sqrt(total)
    assert abs(float(got.var()) - 1) < 4 * math.sqrt(2 / total)
    assert abs(float((got[:, 1:] * got[:, :-1]).mean())) < 4 / math.sqrt(total)
    assert abs(float((got[1:] * got[:-1]).mean())) < 4 / math.sqrt(total)


@pytest.mark.parametrize("level", [-9.0, -6.0])
def test_rescaling_restores_mean_and_standard_deviation(level):
    cond = hear(partial(CADS, noise=2.0), [0, 1, 0], level)
    for row, c in zip(cond["label_embedding"], TABLE[[0, 1, 0]], strict=True):
        assert float(row.mean()) == pytest.approx(float(c.mean()), abs=1e-12)
        assert float(row.std()) == pytest.approx(float(c.std()), abs=1e-12)
    half, none = (hear(partial(CADS, noise=2.0, mixing=m), [0, 1, 0], level) for m in (0.5, 0.0))
    mean = (cond["label_embedding"] + none["label_embedding"]) / 2
    torch.testing.assert_close(half["label_embedding"], mean, rtol=0, atol=1e-14)


def test_other_conditions_of_floating_dtype_are_annealed_and_nothing_else():
    text = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=D64)
    given = {"text": text, "mask": torch.ones(2, 5, dtype=torch.bool), "measurement": torch.ones(2, 1)}
    cond = hear(partial(CADS, noise=1.0), [0, 1], -6.0, **given)
    assert not torch.allclose(cond["text"], text) and not torch.equal(cond["text"][0], cond["text"][1])
    for row, c in zip(cond["text"], text, strict=True):
        assert float(row.std()) == pytest.approx(float(c.std()), abs=1e-12)
    assert torch.equal(cond["mask"], given["mask"]) and torch.equal(cond["measurement"], given["measurement"])


def test_the_null_branch_stays_null_and_the_other_is_annealed():
    cond = hear(partial(CADS, inner=partial(ClassifierFree, scale=3.0)), [0, NO_LABEL], -6.0)
    null, given = cond["label_embedding"].chunk(2)
    assert torch.equal(null, TABLE[[2, 2]]) and torch.equal(given[1], TABLE[2])
    assert not torch.allclose(given[0], TABLE[0])


def test_noise_belongs_to_seed_and_level():
    def embedding(seeds, level):
        return hear(CADS, [0] * len(seeds), level, torch.tensor(seeds))["label_embedding"]

    base = embedding([5, 6, 5], -6.0)
    assert torch.equal(base[0], base[2]) and not torch.allclose(base[0], base[1])
    assert torch.equal(base, embedding([5, 6, 5], -6.0))
    assert not torch.allclose(base, embedding([5, 6, 5], -6.1))


def test_noise_is_the_same_in_every_precision():
    # -6.1 is another number in float32
    heard = []
    for dtype in (torch.float32, D64):
        told = Told()
        levels = torch.full((3,), -6.1, dtype=dtype)
        cond = {"text": TABLE.to(dtype), SEED: torch.arange(3)}
        CADS(told)(torch.zeros(3, 1, dtype=dtype), levels, cond)
        heard.append(told.heard[-1]["text"])
    assert heard[0].dtype == torch.float32 and heard[1].dtype == D64
    torch.testing.assert_close(heard[0].double(), heard[1], rtol=0, atol=1e-5)


def test_levels_that_differ_within_the_batch():
    cond = hear(CADS, [0, 1, 1], torch.tensor([-9.0, 0.0, -6.0], dtype=D64))
    assert torch.equal(cond["label_embedding"][1], TABLE[1])
    assert not torch.allclose(cond["label_embedding"][2], TABLE[1])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun", "restart", "adaptive_rk", "paradigms"])
def test_samples_do_not_depend_on_their_batch(sampler):
    guidance = partial(CADS, inner=partial(ClassifierFree, scale=2.0))
    grid = uniform_u(Cosine(logsnr_min=-12, logsnr_max=12), 12)
    recipe = Generation(sampler=ALL_SAMPLERS[sampler], grid=grid, guidance=guidance, shape=(2,))
    label = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    whole = recipe(Told(), seeds=range(8), cond={"label": label})
    parts = [recipe(Told(), seeds=range(a, b), cond={"label": label[a:b]}) for a, b in ((0, 3), (3, 8))]
    # Told multiplies matrices, whose last bit may depend on the batch
    torch.testing.assert_close(
        whole, torch.cat(parts), rtol=0, atol=1e-6 if sampler != "adaptive_rk" else 1e-3
    )
    assert bool(torch.isfinite(whole).all())


def test_the_ends_have_the_variance_that_the_annealing_adds():
    # data N(first number of the embedding, 0.1): DDIM's end is linear in the start and in what was heard at each level
    grid, n, noise = uniform_u(Cosine(logsnr_min=-14, logsnr_max=14), 40), 3000, 10.0
    tau1, tau2 = 5.0, 0.0

    class First(Told):
        def __init__(self, only=None):
            self.only, self.k = only, -1

        def __call__(self, x, logsnr, cond=None):
            self.k += 1
            mean = (
                cond["label_embedding"][:, :1]
                if self.only is None
                else torch.full_like(x, float(self.k == self.only))
            )
            alpha, sigma = (c[:, None] for c in VP(logsnr))
            return mean + alpha * 0.1 / (alpha**2 * 0.1 + sigma**2) * (x - alpha * mean)

    z = torch.zeros(1, 1, dtype=D64)
    weights = torch.tensor([float(DDIM()(First(k), z, grid)) for k in range(40)], dtype=D64)
    start = float(DDIM()(First(-1), z + 1, grid))
    kept = ((grid[:-1] - tau2) / (tau1 - tau2)).clamp(0, 1)
    c, s = float(TABLE[0, 0]), float(TABLE[0].std(correction=0))
    mean = float((weights * kept.sqrt()).sum()) * c
    added = float((weights**2 * (1 - kept)).sum()) * (noise * s) ** 2
    variance = start**2 * float(VP(grid[0])[1]) ** 2 + added
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-3) and added > 0.2 * variance

    guidance = partial(CADS, tau1=tau1, tau2=tau2, noise=noise, mixing=0.0)
    recipe = Generation(sampler=DDIM(), grid=grid, guidance=guidance, shape=(1,))

    class Table(First):
        def __call__(self, x, logsnr, cond=None):
            return super().__call__(x, logsnr, self.embed(cond) if "label" in cond else cond)

    ends = recipe(Table(), seeds=range(n), cond={"label": torch.zeros(n, dtype=torch.long)})
    assert abs(float(ends.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(ends.var()) / variance - 1) < 4 * math.sqrt(2 / n)


@pytest.mark.parametrize("classes", [0, 3])
def test_a_network_answers_the_same_to_labels_and_to_their_embeddings(classes):
    network = MLP(dim=2, width=16, depth=2, num_classes=classes)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 4)
    denoiser = NetworkDenoiser(network=network.eval(), interpolant=VP, prediction=V())
    x, level = torch.randn(4, 2, generator=g), torch.linspace(-9, 1, 4)
    cond = {"label": torch.tensor([0, 2, NO_LABEL, 1]), SEED: torch.arange(4)}
    with torch.no_grad():
        embedded = denoiser.embed(cond)
        assert torch.equal(denoiser(x, level, cond), denoiser(x, level, embedded))
        assert torch.equal(embedded[SEED], cond[SEED])
        assert ("label_embedding" in embedded) == (classes > 0) and ("label" in embedded) == (classes == 0)
        assert denoiser.embed({}) == {}
        guided = CADS(denoiser, inner=partial(ClassifierFree, scale=2.0))(x, level, cond)
    plain = ClassifierFree(denoiser, 2.0)(x, level, cond)
    # row 3 is late, row 2 has no label
    assert torch.equal(guided[2:], plain[2:]) and torch.allclose(guided[0], plain[0]) == (classes == 0)


def test_calls_are_those_of_the_guidance_inside():
    told = Told()
    counting = CountingDenoiser(told, batch=2)
    cond = {"label": torch.tensor([0, 1]), SEED: torch.arange(2)}
    x, level = torch.zeros(2, 1, dtype=D64), torch.full((2,), -6.0, dtype=D64)
    for inner, calls in ((partial(ClassifierFree, scale=2.0), 2), (partial(ClassifierFree, scale=1.0), 1)):
        counting.calls = 0
        CADS(counting, inner=inner)(x, level, cond)
        assert counting.calls == calls
    assert torch.equal(CADS(told)(x, level, None), told(x, level))


def test_mistakes_are_one_clear_line():
    told = Told()
    x, level = torch.zeros(2, 1, dtype=D64), torch.full((2,), -6.0, dtype=D64)
    with pytest.raises(ValueError, match="seed"):
        CADS(told)(x, level, {"label": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match="GaussianMixtureDenoiser offers no embed"):
        CADS(mixture_1d(VP))(x, level, {"label": torch.tensor([0, 1]), SEED: torch.arange(2)})
    for options in (dict(tau1=-9.0), dict(tau2=-math.inf), dict(noise=-1.0), dict(mixing=1.5)):
        with pytest.raises(ValueError, match="CADS needs"):
            CADS(told, **options)

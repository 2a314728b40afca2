"""Same images, same weights: our numbers are those of torch-fidelity and torchmetrics."""

import pytest
import torch
from torch import nn

from diffusion_lab.images import to_float, to_uint8
from diffusion_lab.metrics.collect import collect, pieces_of
from diffusion_lab.metrics.features import Inception
from diffusion_lab.metrics.frechet import frechet_from_stats, gaussian_stats
from diffusion_lab.metrics.measures import PRDC, Frechet, InceptionScore, Kernel
from diffusion_lab.metrics.measures.base import wanted_of
from diffusion_lab.metrics.quality import Real, evaluate_images, judge

# a few images of nothing, some smooth: as many as the slow network allows
N, M = 7, 6


def pictures(seed, n, size=24, bright=1.0):
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=rng)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (255 * bright * (0.7 * smooth + 0.3 * torch.rand(n, 3, size, size, generator=rng))).to(torch.uint8)


class Ten(nn.Module):
    """Ten features of an image that also serve as scores of ten classes."""

    name, dim, resize, sha256 = "ten", 10, "none", "ten"
    outputs = ("features", "logits")
    num_features = 10  # asked by torchmetrics

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.map = nn.Linear(3 * 24 * 24, 10)
        self.requires_grad_(False)

    def forward(self, images):
        return 8 * self.map(to_float(images).flatten(1)).tanh()

    def extract(self, images, outputs):
        return dict.fromkeys(outputs, self(images))


def test_custom_features_give_the_metrics_of_torch_fidelity(torch_fidelity_of):
    samples, real = pictures(0, 230), pictures(1, 200, bright=0.8)
    theirs = torch_fidelity_of(
        Ten(), samples, real, fid=True, isc=True, kid=True, prc=True, kid_subsets=10, kid_subset_size=100
    )
    measures = (Frechet(), InceptionScore(), Kernel(subsets=10, size=100), PRDC())
    ours = {
        record.metric: record
        for record in evaluate_images(samples, None, Real(images=real, name="test"), Ten(), measures=measures)
    }
    for found, name in (
        (ours["frechet"].value, "frechet_inception_distance"),
        (ours["inception_score"].value, "inception_score_mean"),
        (ours["inception_score"].spread, "inception_score_std"),
        (ours["kernel"].value, "kernel_inception_distance_mean"),
        (ours["kernel"].spread, "kernel_inception_distance_std"),
        (ours["precision"].value, "precision"),
        (ours["recall"].value, "recall"),
    ):
        assert theirs[name] > 0 and found == pytest.approx(theirs[name], rel=1e-4), name


def test_custom_features_give_the_metrics_of_torchmetrics():
    """One subset and one part hold all images, so that torchmetrics' shuffling does not matter."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore as TheirScore
    from torchmetrics.image.kid import KernelInceptionDistance

    samples, real = pictures(0, 200), pictures(1, 200, bright=0.8)
    score = TheirScore(feature=Ten(), splits=1)
    score.update(samples)
    frechet = FrechetInceptionDistance(feature=Ten(), input_img_size=(3, 24, 24))
    kernel = KernelInceptionDistance(feature=Ten(), subsets=1, subset_size=200)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(samples, real=False)
    measures = (Frechet(), InceptionScore(splits=1), Kernel())
    ours = evaluate_images(samples, None, Real(images=real, name="test"), Ten(), measures=measures)
    theirs = [frechet.compute().item(), score.compute()[0].item(), kernel.compute()[0].item()]
    assert [record.value for record in ours] == pytest.approx(theirs, rel=1e-4)


@pytest.fixture(scope="module")
def through_inception(random_inception):
    """What both see of two small sets: our summaries, and their features and scores."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    samples, real = pictures(2, N), pictures(3, M, bright=0.8)
    network = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(random_inception))
    measures = (InceptionScore(splits=3), Kernel(subsets=5, size=5), PRDC(), Frechet())
    extractor = Inception(weights_path=random_inception, verify=False)
    sets = {
        part: collect(
            pieces_of(images, None, 5), extractor, wanted_of(measures, part), n=len(images), shape=(3, 24, 24)
        )
        for part, images in (("samples", samples), ("reference", real))
    }
    return sets, network(samples), network(real)


@pytest.mark.slow
def test_inception_gives_the_kid_score_precision_and_recall_of_torch_fidelity(through_inception):
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    sets, (samples, logits), (real, _) = through_inception
    score = isc_features_to_metric(logits, splits=3, shuffle=True)
    kernel = kid_features_to_metric(samples, real, kid_subsets=5, kid_subset_size=5, verbose=False)
    manifold = prc_features_to_metric(samples, real, prc_neighborhood=3, prc_batch_size=10, verbose=False)
    ours = {
        r.metric: r
        for r in judge(sets, measures=(InceptionScore(splits=3), Kernel(subsets=5, size=5), PRDC()))
    }
    assert ours["inception_score"].value == pytest.approx(score["inception_score_mean"], rel=1e-4)
    assert ours["inception_score"].spread == pytest.approx(score["inception_score_std"], rel=1e-4)
    assert ours["kernel"].value == pytest.approx(kernel["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["kernel"].spread == pytest.approx(kernel["kernel_inception_distance_std"], rel=1e-4)
    assert (ours["precision"].value, ours["recall"].value) == (
        pytest.approx(manifold["precision"], rel=1e-6), pytest.approx(manifold["recall"], rel=1e-6),
    )  # fmt: skip


@pytest.mark.slow
def test_inception_gives_the_moments_of_torch_fidelity(through_inception):
    """The distance itself takes a root of a matrix of 2048 rows: the slow test below."""
    sets, (samples, _), _ = through_inception
    ours, truth = sets["samples"].moments(), gaussian_stats(samples.double())
    torch.testing.assert_close(ours.mean, truth.mean, rtol=1e-4, atol=1e-6 * truth.mean.max().item())
    torch.testing.assert_close(ours.cov, truth.cov, rtol=1e-4, atol=1e-5 * truth.cov.max().item())
    assert ours.cov.trace().item() == pytest.approx(truth.cov.trace().item(), rel=1e-5)


@pytest.mark.slow
def test_inception_gives_the_fid_of_torch_fidelity_and_torchmetrics(through_inception):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    sets, (samples, _), (real, _) = through_inception
    (ours,) = judge(sets, measures=(Frechet(),))
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(samples), fid_features_to_statistics(real), verbose=False
    )
    assert ours.value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    a, b = gaussian_stats(samples.double()), gaussian_stats(real.double())
    assert ours.value == pytest.approx(_compute_fid(a.mean, a.cov, b.mean, b.cov).item(), rel=1e-4)


def test_floats_become_bytes_by_rounding():
    """Images that left their bytes by less than half a level come back to them, and the distance is that of equals."""
    images = pictures(5, 200)
    rng = torch.Generator().manual_seed(0)
    floats = to_float(images) + 0.45 / 127.5 * (2 * torch.rand(images.shape, generator=rng) - 1)
    reference = Real(images=images, name="test")
    (rounded,) = evaluate_images(to_uint8(floats), None, reference, Ten(), measures=(Frechet(),))
    floored = ((floats + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    (shifted,) = evaluate_images(floored, None, reference, Ten(), measures=(Frechet(),))
    scale = gaussian_stats(Ten()(images)).cov.trace().item()
    assert torch.equal(to_uint8(floats), images)
    assert rounded.value < 1e-9 * scale and shifted.value > 1e-5 * scale
    assert shifted.value == pytest.approx(
        frechet_from_stats(gaussian_stats(Ten()(floored)), gaussian_stats(Ten()(images))), rel=1e-4
    )

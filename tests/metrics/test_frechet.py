"""Fréchet distance and streaming statistics against closed forms, hostile numbers and two other libraries."""

import numpy as np
import pytest
import torch

from diffusion_lab.metrics.frechet import frechet_distance, frechet_from_stats
from diffusion_lab.metrics.stats import GaussianStats, gaussian_stats


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def covariance(d, rank, seed):
    a = torch.randn(d, rank, generator=rng(seed), dtype=torch.float64)
    return a @ a.T / rank


def test_commuting_gaussians_have_the_textbook_distance():
    # common eigenvectors Q: d^2 = |m1 - m2|^2 + sum (sqrt a - sqrt b)^2
    q = torch.linalg.qr(torch.randn(20, 20, generator=rng(), dtype=torch.float64))[0]
    a, b = (
        torch.rand(20, generator=rng(s), dtype=torch.float64) * 10 ** torch.linspace(-6, 2, 20)
        for s in (1, 2)
    )
    m1, m2 = torch.randn(2, 20, generator=rng(3), dtype=torch.float64)
    truth = (m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    value = frechet_distance(m1, q @ a.diag() @ q.T, m2, q @ b.diag() @ q.T)
    assert value == pytest.approx(truth.item(), rel=1e-10)


def test_two_dimensions_without_common_axes():
    # in two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for M = C1 C2
    c1 = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    c2 = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    product = c1 @ c2
    cross = (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    truth = (c1.trace() + c2.trace() - 2 * cross).item()
    assert frechet_distance(zero, c1, zero, c2) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 7, 50, 200])
def test_distance_of_a_set_to_itself_vanishes_at_any_rank(rank):
    cov = covariance(50, rank, 4)
    mean = torch.full((50,), 1e4, dtype=torch.float64)
    assert frechet_distance(mean, cov, mean, cov) <= 1e-12 * cov.trace().item()


def test_singular_covariances_in_disjoint_subspaces():
    # nothing shared: the cross term is exactly zero, and no rounding may be blown up by a root
    a, b = torch.zeros(2, 30, 30, dtype=torch.float64)
    a[:10, :10], b[10:30, 10:30] = covariance(10, 10, 5), covariance(20, 20, 6)
    q = torch.linalg.qr(torch.randn(30, 30, generator=rng(7), dtype=torch.float64))[0]
    zero = torch.zeros(30, dtype=torch.float64)
    truth = (a.trace() + b.trace()).item()
    assert frechet_distance(zero, q @ a @ q.T, zero, q @ b @ q.T) == pytest.approx(truth, rel=1e-12)


def test_distance_is_symmetric_and_zero_covariance_is_a_point():
    m1, m2 = torch.randn(2, 5, generator=rng(8), dtype=torch.float64)
    c1, c2 = covariance(5, 9, 9), torch.zeros(5, 5, dtype=torch.float64)
    truth = ((m1 - m2).square().sum() + c1.trace()).item()
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(truth, rel=1e-12)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(truth, rel=1e-12)


def test_bad_gaussians_are_refused():
    m, c = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match="one dimension"):
        frechet_distance(m, c, torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(m, c * float("nan"), m, c)


def test_statistics_equal_numpy_and_parts_merge_to_the_whole():
    x = (
        torch.randn(997, 12, generator=rng(10), dtype=torch.float64)
        @ torch.randn(12, 12, generator=rng(11)).double()
        + 3
    )
    whole = gaussian_stats(x)
    np.testing.assert_allclose(whole.cov.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-12, atol=1e-13)
    for cuts in ([997], [1] * 997, [3, 0, 500, 494], [996, 1]):
        stats = GaussianStats()
        for part in x.split(cuts):
            stats.update(part)
        assert stats.n == 997
        torch.testing.assert_close(stats.mean, whole.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(stats.cov, whole.cov, rtol=1e-12, atol=1e-12)
    left, right = gaussian_stats(x[:300]), gaussian_stats(x[300:])
    left.merge(right)
    torch.testing.assert_close(left.cov, whole.cov, rtol=1e-12, atol=1e-12)
    assert right.n == 697


def test_float32_features_with_a_large_mean_keep_their_digits():
    # mean 1e4, spread 1: sum(f f^T) - n m m^T in float32 is off by more than the covariance itself
    x = (torch.randn(5000, 8, generator=rng(12)) + 1e4).float()
    exact = np.cov(x.double().numpy(), rowvar=False)
    stats = GaussianStats()
    for part in x.split(64):
        stats.update(part)
    np.testing.assert_allclose(stats.cov.numpy(), exact, rtol=0, atol=1e-12)
    naive = (x.T @ x - len(x) * torch.outer(x.mean(0), x.mean(0))) / (len(x) - 1)
    assert abs(naive.numpy() - exact).max() > 1e-2


def test_the_mean_may_be_enormous():
    x = torch.randn(2000, 4, generator=rng(13), dtype=torch.float64)
    stats, shifted = GaussianStats(), GaussianStats()
    for part in x.split(100):
        stats.update(part)
        shifted.update(
            part + 2.0**26
        )  # adding a power of two this size costs 2**-26 of rounding, and no more
    torch.testing.assert_close(shifted.cov, stats.cov, rtol=1e-6, atol=1e-6)


def test_all_reduce_of_three_processes_is_the_whole():
    x = torch.randn(500, 6, generator=rng(14)) + 1e4
    parts = [gaussian_stats(x[:7]), gaussian_stats(x[7:]), GaussianStats(dim=6)]

    def together(index):
        """What process `index` gets: its tensors are summed with those the others would bring at the same call."""
        calls = []

        def first(tensor):
            calls.append(tensor)
            return sum(torch.cat([torch.tensor([float(p.n)]), p.n * p._moments()[0]]) for p in parts)

        def second(tensor):
            mean = gaussian_stats(x).mean
            total = torch.zeros(6, 6, dtype=torch.float64)
            for part in parts:
                m, s = part._moments()
                total += s + part.n * torch.outer(m - mean, m - mean)
            return total

        steps = iter([first, second])
        return parts[index].all_reduce(lambda tensor: next(steps)(tensor))

    whole = gaussian_stats(x)
    for index in range(3):
        stats = together(index)
        assert stats.n == 500
        torch.testing.assert_close(stats.mean, whole.mean, rtol=1e-14, atol=1e-9)
        torch.testing.assert_close(stats.cov, whole.cov, rtol=1e-9, atol=1e-11)
    assert parts[0].n == 7


def test_all_reduce_over_real_threads():
    """Three processes played by threads that meet at a barrier and sum what they brought."""
    import threading

    x = torch.randn(90, 5, generator=rng(15), dtype=torch.float64) * 3 + 100
    shares, world = [x[:10], x[10:11], x[11:]], 3
    board, barrier, results = [None] * world, threading.Barrier(world), [None] * world

    def work(rank):
        def reduce(tensor):
            board[rank] = tensor
            barrier.wait()
            total = torch.stack(board).sum(dim=0)
            barrier.wait()
            return total

        stats = GaussianStats(dim=5)
        stats.update(shares[rank])
        results[rank] = stats.all_reduce(reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    whole = gaussian_stats(x)
    for stats in results:
        assert stats.n == 90
        torch.testing.assert_close(stats.cov, whole.cov, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stats.cov, results[0].cov, rtol=0, atol=0)


def test_statistics_refuse_what_they_cannot_be():
    stats = GaussianStats()
    with pytest.raises(ValueError, match="not known"):
        stats.dim  # noqa: B018
    stats.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="two features"):
        stats.cov  # noqa: B018
    with pytest.raises(ValueError, match="cannot join"):
        stats.update(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="not finite"):
        stats.update(torch.tensor([[0.0, float("inf"), 0.0]]))
    with pytest.raises(ValueError, match=r"\(N, d\)"):
        stats.update(torch.zeros(3))
    assert stats.n == 1


def test_statistics_leave_what_they_were_given():
    x = torch.randn(20, 4, generator=rng(5), dtype=torch.float64)
    state = gaussian_stats(x).state_dict()
    before = {name: value.clone() for name, value in state.items()}
    loaded, made = GaussianStats(), GaussianStats.of(state["mean"], state["scatter"])
    loaded.load_state_dict(state)
    merged = gaussian_stats(x)
    merged.merge(loaded)
    for stats in (loaded, made, merged):
        stats.update(x + 3)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_statistics_survive_their_state_dict():
    stats = gaussian_stats(torch.randn(9, 3, generator=rng(16)))
    other = GaussianStats()
    other.load_state_dict(stats.state_dict())
    assert other.n == 9 and torch.equal(other.cov, stats.cov)
    other.update(torch.ones(1, 3))
    assert stats.n == 9  # the copy has its own tensors


class TinyFeatures(torch.nn.Module):
    """Ten fixed non-linear features of uint8 RGB images, for the other libraries."""

    num_features = 10

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(3 * 8 * 8, 10, generator=rng(17)) / 14)

    def forward(self, images):
        return torch.tanh((images.float() / 127.5 - 1).flatten(1) @ self.weight) * 3 + 1


def image_sets():
    a = torch.randint(0, 256, (300, 3, 8, 8), generator=rng(18), dtype=torch.uint8)
    b = (torch.randint(0, 256, (400, 3, 8, 8), generator=rng(19)) ** 2 // 256).to(torch.uint8)
    return a, b


def ours(a, b):
    features = TinyFeatures()
    return frechet_from_stats(gaussian_stats(features(a)), gaussian_stats(features(b)))


def test_the_value_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = image_sets()
    metric = FrechetInceptionDistance(feature=TinyFeatures(), input_img_size=(3, 8, 8))
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert ours(a, b) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_the_value_of_torch_fidelity(torch_fidelity_of):
    a, b = image_sets()
    theirs = torch_fidelity_of(TinyFeatures(), a, b, fid=True)
    assert ours(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)

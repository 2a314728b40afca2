"""Every measure: cases that can be counted by hand, the libraries' values, one process equal to two, no batch size."""

import math
import threading

import numpy as np
import pytest
import torch

from diffusion_lab.images import spread
from diffusion_lab.metrics.collect import Batch, collect, pieces_of
from diffusion_lab.metrics.features import Coordinates, DigitsCNN, ManyOutputs, Pixels
from diffusion_lab.metrics.measures import CMMD, PRDC, Accuracy, Frechet, InceptionScore, Kernel, Memorisation
from diffusion_lab.metrics.measures.base import wanted_of
from diffusion_lab.metrics.measures.inception_score import Classes
from diffusion_lab.metrics.quality import Real, evaluate_images, judge
from diffusion_lab.metrics.train_classifier import digits_split

ALL = (Frechet(), Accuracy(), Kernel(subsets=5, size=50), CMMD(), InceptionScore(), PRDC(), Memorisation())


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randn(seed, *shape, **settings):
    return torch.randn(*shape, generator=rng(seed), **settings)


class Points(Coordinates):
    """Points with scores: the points themselves."""

    outputs = ("features", "logits")

    def extract(self, images, outputs):
        return dict.fromkeys(outputs, images.flatten(1))


def measured(measure, samples, reference, *, real=None, train=None, batch_size=64):
    """Return the records of points, by metric."""
    records = evaluate_images(
        samples, None, Real(images=reference, name="test"), Points(), measures=[measure], batch_size=batch_size,
        stand_in=None if real is None else Real(images=real, name="real"),
        train=None if train is None else Real(images=train, name="train"),
    )  # fmt: skip
    return {record.metric: record for record in records}


# --- kernel distance


def test_the_kernel_distance_of_two_points_each():
    """All four features by hand: k(a, b) = (a b / 2 + 1)^3."""
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [2.0, 2.0]])
    within = 1.0 + (4 / 2 + 1) ** 3
    between = [(2 / 2 + 1) ** 3, (2 / 2 + 1) ** 3, 1.0, (2 / 2 + 1) ** 3]
    record = measured(Kernel(), x, y)["kernel"]
    assert record.value == pytest.approx(within - 2 * sum(between) / 4, rel=1e-12)
    assert record.spread is None and record.label.startswith("KD@2")  # the one subset that there is


def test_the_kernel_distance_is_that_of_torch_fidelity_with_its_spread():
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = randn(0, 400, 8), randn(1, 300, 8) * 1.3 + 0.2
    theirs = kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=100, verbose=False)
    record = measured(Kernel(subsets=20, size=100), x, y, real=randn(2, 400, 8))["kernel"]
    assert record.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert record.spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)
    assert record.real_n == 400 and record.real > record.value / 2 and "±" in record.shown()


def test_the_kernel_distance_is_unbiased_and_a_small_set_is_no_error():
    distances = [Kernel().distance(randn(s, 20, 3), randn(100 + s, 30, 3))[0] for s in range(40)]
    mean, error = np.mean(distances), np.std(distances) / math.sqrt(len(distances))
    assert abs(mean) < 3 * error and min(distances) < 0
    _, spread = Kernel(subsets=3).distance(randn(0, 20, 3), randn(1, 30, 3))
    assert spread > 0  # 20 of the 30 are drawn
    with pytest.raises(ValueError, match="two images of each"):
        Kernel().distance(randn(0, 1, 3), randn(1, 30, 3))
    with pytest.raises(ValueError, match="subsets"):
        Kernel(subsets=0)


# --- Gaussian kernel


def test_cmmd_is_the_definition_and_keeps_the_digits():
    x, y = randn(0, 150, 16, dtype=torch.float64), randn(1, 130, 16, dtype=torch.float64) + 0.1
    x, y = ((v / v.norm(dim=1, keepdim=True)).float() for v in (x, y))

    def k(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200).mean()

    a, b = x.double().numpy(), y.double().numpy()
    truth = 1000 * (k(a, a) + k(b, b) - 2 * k(a, b))
    record = measured(CMMD(), x, y)["cmmd"]
    assert record.value == pytest.approx(truth, rel=1e-9) and record.short == "MMD"
    assert measured(CMMD(), x, x)["cmmd"].value < 1e-10
    wide = measured(CMMD(sigma=1.0, scale=1.0), x[:1].repeat(2, 1), y[:1].repeat(3, 1))["cmmd"].value
    assert wide == pytest.approx(2 - 2 * math.exp(-((a[0] - b[0]) ** 2).sum() / 2), rel=1e-9)


def test_the_gaussian_mmd_of_two_gaussians_is_the_closed_form():
    """E k of N(0, 1) and N(m, 1) is (s^2 / (s^2 + 2))^(d/2) exp(-m^2 / (2 (s^2 + 2)))."""
    n, d, s, shift = 1000, 2, 1.5, 2.0
    x, y = randn(3, n, d), randn(4, n, d) + torch.tensor([shift, 0.0])
    c = s * s / (s * s + 2)
    truth = 2 * c * (1 - math.exp(-(shift**2) / (2 * (s * s + 2)))) + 2 * (1 - c) / n
    record = measured(CMMD(sigma=s, scale=1.0), x, y)["cmmd"]
    assert record.value == pytest.approx(truth, rel=0.1)  # of 1000 random points


def test_cmmd_of_clip_has_its_name():
    class Clip(Coordinates):
        name = "clip-tiny"

    x = randn(0, 10, 3)
    (record,) = evaluate_images(x, None, Real(images=x, name="test"), Clip(), measures=[CMMD()])
    assert record.label == "CMMD@10 (clip-tiny)"


# --- Inception Score


def test_the_inception_score_of_sure_and_unsure_scores():
    sure = 1000.0 * torch.eye(4).repeat(10, 1)  # every class as often, each without doubt
    assert measured(InceptionScore(splits=1), sure, sure)["inception_score"].value == pytest.approx(
        4, rel=1e-12
    )
    assert measured(InceptionScore(), torch.zeros(40, 4), sure)["inception_score"].value == pytest.approx(1)
    same = measured(InceptionScore(), sure[:1].repeat(40, 1), sure)["inception_score"]
    assert same.value == pytest.approx(1) and same.spread == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "splits"), [(1000, 10), (997, 10), (45, 4)])
def test_the_inception_score_is_that_of_torch_fidelity(n, splits):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * randn(5, n, 12)
    theirs = isc_features_to_metric(logits, splits=splits, shuffle=True)
    record = measured(InceptionScore(splits=splits), logits, logits, real=logits[: n // 2], batch_size=7)
    record = record["inception_score"]
    assert record.value == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert record.spread == pytest.approx(theirs["inception_score_std"], rel=1e-8)
    assert record.real_n == n // 2 and record.real > 1


def test_a_part_of_the_inception_score_is_known_by_the_index():
    logits, order = 3 * randn(6, 103, 5), torch.randperm(103, generator=rng(7))
    what = Classes(splits=10)
    whole, shuffled = what.start(103, {"logits": 5}), what.start(103, {"logits": 5})
    whole.update(Batch(index=torch.arange(103), outputs={"logits": logits}, labels=None))
    for rows in order.split(20):
        shuffled.update(Batch(index=rows, outputs={"logits": logits[rows]}, labels=None))
    torch.testing.assert_close(shuffled.scores, whole.scores, rtol=1e-12, atol=0)
    assert whole.counts.tolist() == [10.0, 10.0, 10.0, 11.0, 10.0, 10.0, 11.0, 10.0, 10.0, 11.0]
    few = what.start(3, {"logits": 5})
    few.update(Batch(index=torch.arange(3), outputs={"logits": logits[:3]}, labels=None))
    assert few.scores.tolist() == pytest.approx([1.0, 1.0, 1.0])


# --- precision, recall, density, coverage


def test_prdc_reports_all_four_with_those_of_real_images():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    samples = torch.tensor([[0.5], [0.5], [2.5], [30.0]])
    records = measured(PRDC(k=1, k_density=1), samples, real, real=real)
    # the samples' balls are the points .5 twice, [.5, 4.5] and [2.5, 57.5]: they miss the real 0
    assert {name: record.value for name, record in records.items()} == {
        "precision": 0.75, "recall": 0.75, "density": 1.5, "coverage": 1.0,
    }  # fmt: skip
    assert records["precision"].real == records["coverage"].real == 1.0 and records["recall"].real_n == 4
    assert records["recall"].shown() == "75.00 % (real 100.00 %)" and records["density"].shown().startswith(
        "1.5 "
    )


def test_prdc_compares_banks_of_its_size():
    x, y = randn(0, 200, 3), randn(1, 100, 3)
    record = measured(PRDC(most=50), x, y)["precision"]
    assert (
        record.n == 50
        and record.value == measured(PRDC(), x[spread(200, 50)], y[spread(100, 50)])["precision"].value
    )


# --- memorisation


def test_copies_and_distances_counted_by_hand():
    train = torch.tensor([[0.0], [3.0], [10.0], [20.0]])
    # nearest and second nearest: .5 of 2.5, 1 of 2, 0 of 3, 40 of 50
    samples = torch.tensor([[0.5], [1.0], [3.0], [60.0]])
    test = torch.tensor([[5.0], [14.0]])  # 2 of 5, 4 of 6
    records = measured(Memorisation(), samples, test, train=train)
    copies, nearest = records["copies"], records["nearest_train"]
    assert copies.value == 2 / 4 and copies.real == 0.0
    assert nearest.value == pytest.approx((0.5 + 1 + 0 + 40) / 4) and nearest.real == pytest.approx(3.0)
    assert (copies.reference, copies.reference_n, copies.n, copies.real_n) == ("train", 4, 4, 2)
    assert not any("reference" in deviation for deviation in copies.deviations)
    assert measured(Memorisation(ratio=0.45), samples, test, train=train)["copies"].value == 2 / 4
    assert measured(Memorisation(ratio=0.45), samples, test, train=train)["copies"].real == 1 / 2


def test_a_copy_of_an_image_that_stands_twice_in_the_training_set_is_found():
    train = torch.tensor([[7.0], [7.0], [10.0]])
    assert measured(Memorisation(), torch.tensor([[7.0], [8.5]]), train, train=train)["copies"].value == 0.5


def test_without_held_out_images_copies_have_no_floor_and_without_training_images_there_are_none():
    x, train = randn(0, 20, 2), randn(1, 30, 2)
    told = {}
    settings = {"measures": [Memorisation()], "on_hindrance": told.__setitem__}
    same = evaluate_images(
        x,
        None,
        Real(images=train, name="train"),
        Points(),
        train=Real(images=train, name="train"),
        **settings,
    )
    assert [record.real for record in same] == [None, None] and not told
    part = Real(images=train[:9], name="train")
    some = evaluate_images(x, None, part, Points(), train=Real(images=train, name="train"), **settings)
    assert [record.real for record in some] == [None, None]
    assert evaluate_images(x, None, Real(images=train, name="test"), Points(), **settings) == []
    assert told == {"memorisation": "there are no train images"}


def test_a_part_of_the_training_set_gives_a_lower_bound():
    train = randn(1, 400, 4)
    left_out = torch.ones(400, dtype=torch.bool)
    left_out[spread(400, 200)] = False
    whole = measured(Memorisation(), train[left_out], train[::40] + 1, train=train)
    part = measured(Memorisation(train_most=200), train[left_out], train[::40] + 1, train=train)
    assert whole["copies"].value == 1 and part["copies"].value < 0.5
    assert part["nearest_train"].value > whole["nearest_train"].value == 0


def test_digits_of_the_training_set_are_copies_and_those_of_the_test_set_are_not():
    split, cnn = digits_split(), DigitsCNN()
    test, train = Real(images=split.test, name="test"), Real(images=split.train, name="train")

    def copies(images):
        return evaluate_images(images, None, test, cnn, train=train, measures=[Memorisation()])[0]

    assert copies(split.train[:300]).value == 1
    honest = copies(split.test)
    assert honest.value == honest.real < 0.1


# --- all of them


@pytest.fixture(scope="module")
def real_sets():
    split, cnn = digits_split(), DigitsCNN()
    return split, {
        part: collect(
            pieces_of(images, labels, 500),
            cnn,
            wanted_of(ALL, part),
            n=len(images),
            shape=(1, 8, 8),
            name=name,
        )
        for part, images, labels, name in (
            ("reference", split.test, split.test_labels, "test"),
            ("train", split.train, split.train_labels, "train"),
        )
    }


@pytest.mark.parametrize("shares", [((0, 100), (100, 300)), ((0, 0), (0, 300))])
def test_merged_and_reduced_parts_give_what_the_whole_gives(real_sets, shares):
    split, others = real_sets
    rows = torch.arange(300) * 4
    images, labels = split.train[rows], split.train_labels[rows]
    noise = torch.randint(-40, 40, images.shape, generator=rng(0))
    images = (images.int() + noise).clamp(0, 255).to(torch.uint8)

    def part(start, end):
        index = torch.arange(start, end)
        pieces = [(index, images[start:end], labels[start:end])] if end > start else []
        return collect(pieces, DigitsCNN(), wanted_of(ALL, "samples"), n=300, shape=(1, 8, 8))

    truth = judge({"samples": part(0, 300), **others}, measures=ALL)
    assert len(truth) == 11
    # two processes played by threads that sum what they bring at a barrier
    parts = [part(*share) for share in shares]
    board, barrier, reduced = [None, None], threading.Barrier(2), [None, None]

    def work(rank):
        def reduce(tensor):
            board[rank] = tensor
            barrier.wait(30)
            total = board[0] + board[1]
            barrier.wait(30)
            return total

        reduced[rank] = parts[rank].all_reduce(reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for what, collector in parts[0].kept.items():
        collector.merge(parts[1].kept[what])
    for together in (*reduced, parts[0]):
        found = judge({"samples": together, **others}, measures=ALL)
        assert [r.n for r in found] == [r.n for r in truth]
        assert [r.value for r in found] == pytest.approx([r.value for r in truth], rel=1e-4)


def test_no_measure_depends_on_the_batch_size():
    split = digits_split()
    images, test = split.train[:200], Real(images=split.test, labels=split.test_labels, name="test")
    train = Real(images=split.train[:400], labels=split.train_labels[:400], name="train")
    measures = [m for m in ALL if not isinstance(m, Accuracy | InceptionScore)]

    def values(size):
        return [
            value
            for r in evaluate_images(
                images, None, test, Pixels(), measures=measures, train=train, batch_size=size
            )
            for value in (r.value, r.real)
        ]

    whole = values(400)
    assert len(whole) == 2 * 9 and values(13) == pytest.approx(whole, rel=1e-9)


def test_summaries_survive_their_files(tmp_path):
    split, cnn = digits_split(), DigitsCNN()
    settings = {"measures": ALL, "train": Real(images=split.train[:200], name="train"), "cache": tmp_path}
    test = Real(images=split.test, labels=split.test_labels, name="test")
    first, again = (
        evaluate_images(split.train[:50], split.train_labels[:50], test, cnn, **settings) for _ in range(2)
    )
    assert first == again and len(list(tmp_path.iterdir())) == 7


def test_points_with_scores_are_an_extractor_of_many_outputs():
    assert isinstance(Points(), ManyOutputs)


def test_the_files_of_the_group_build_every_measure_with_its_defaults():
    """A file's settings are the class's own defaults, so that a script and the command line measure alike."""
    from dataclasses import fields

    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from diffusion_lab.app.session import conf_folder

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        full, default = (compose(f"measures/{name}").measures for name in ("full", "default"))
    built = {name: instantiate(node) for name, node in full.items()}
    assert {name: measure.name for name, measure in built.items()} == {name: name for name in built}
    assert {path.stem for path in (conf_folder() / "measures").glob("*.yaml")} == {*built, "full", "default"}
    for name, measure in built.items():
        plain = Frechet(output="spatial") if name == "spatial_frechet" else type(measure)()
        assert measure == plain
        assert {field.name for field in fields(measure)} == set(full[name]) - {"_target_"}
    assert [instantiate(node) for node in default.values()] == [Frechet(), Accuracy()]

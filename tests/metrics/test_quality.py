"""The whole way from bytes to records, on the real digits."""

import threading

import pytest
import torch

from diffusion_lab.images import to_uint8
from diffusion_lab.metrics.collect import UNQUANTISED, Bank, Moments, collect, pieces_of, spread
from diffusion_lab.metrics.features import Coordinates, DigitsCNN, Pixels
from diffusion_lab.metrics.frechet import frechet_from_stats, gaussian_stats
from diffusion_lab.metrics.measures.accuracy import Accuracy, Answers
from diffusion_lab.metrics.measures.frechet import Frechet
from diffusion_lab.metrics.measures.prdc import PRDC
from diffusion_lab.metrics.protocol import FID50K, Source
from diffusion_lab.metrics.quality import Real, judge
from diffusion_lab.metrics.quality import evaluate_images as evaluate
from diffusion_lab.metrics.reference import collect_kept, content_hash
from diffusion_lab.metrics.train_classifier import digits_split


def evaluate_images(
    images, labels, reference, extractor, protocol=None, *,
    reference_labels=None, reference_name="test", real_images=None, **settings,
):  # fmt: skip
    """Judge images against real ones given as tensors."""
    return evaluate(
        images, labels, Real(images=reference, labels=reference_labels, name=reference_name), extractor, protocol,
        stand_in=None if real_images is None else Real(images=real_images, name="train"), **settings,
    )  # fmt: skip


def moments(images, extractor, **settings):
    """Collect mean and covariance of real images."""
    return collect_kept(images, extractor, [Moments()], **settings)


@pytest.fixture(scope="module")
def digits():
    return digits_split()


@pytest.fixture(scope="module")
def cnn():
    return DigitsCNN()


def test_train_digits_as_samples_give_exactly_the_floor(digits, cnn):
    frechet, accuracy = evaluate_images(
        digits.train, digits.train_labels, digits.test, cnn,
        reference_labels=digits.test_labels, real_images=digits.train, source=Source(ema="none", seeds="none"),
    )  # fmt: skip
    assert frechet.label == "FD@1437 (digits-cnn)" and frechet.deviations == ()
    assert frechet.value == pytest.approx(frechet.real, rel=1e-5) and frechet.real_n == 1437
    truth = frechet_from_stats(gaussian_stats(cnn(digits.train)), gaussian_stats(cnn(digits.test)))
    assert frechet.value == pytest.approx(truth, rel=1e-5)
    assert accuracy.metric == "accuracy" and accuracy.n == 1437 and accuracy.value > 0.99
    assert accuracy.real == pytest.approx(cnn.test_accuracy, abs=1.5 / 360) and accuracy.real_n == 360


def test_the_reference_against_itself_is_zero(digits, cnn):
    (record,) = evaluate_images(digits.test, None, digits.test, cnn)
    scale = gaussian_stats(cnn(digits.test)).cov.trace().item()
    assert record.value < 1e-6 * scale


def test_the_more_damage_the_greater_the_distance(digits, cnn):
    rng = torch.Generator().manual_seed(0)
    x, noise = digits.train.float() / 127.5 - 1, torch.randn(digits.train.shape, generator=rng)
    distances, accuracies = [], []
    for strength in (0.0, 0.2, 0.4, 0.8):
        images = to_uint8(x + strength * noise)
        frechet, accuracy = evaluate_images(images, digits.train_labels, digits.test, cnn)
        distances.append(frechet.value)
        accuracies.append(accuracy.value)
    assert distances == sorted(distances) and distances[-1] > 5 * distances[0]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > 0.99 and accuracies[-1] < 0.8


def test_samples_that_miss_a_class_or_repeat_one_image_are_far_away(digits, cnn):
    def distance(rows):
        return evaluate_images(digits.train[rows], None, digits.test, cnn)[0].value

    floor = distance(slice(None))
    assert distance(digits.train_labels != 3) > 1.3 * floor
    assert distance(torch.zeros(1437, dtype=torch.int64)) > 20 * floor


def test_batch_size_does_not_matter(digits, cnn):
    results = [
        [
            r.value
            for r in evaluate_images(digits.train, digits.train_labels, digits.test, cnn, batch_size=size)
        ]
        for size in (1437, 100, 7)
    ]
    for result in results[1:]:
        assert result[0] == pytest.approx(
            results[0][0], rel=1e-5
        )  # the network's float32 rounding varies with it
        assert result[1] == results[0][1]
    exact = [
        evaluate_images(digits.train, None, digits.test, Pixels(), batch_size=size)[0].value
        for size in (1437, 100, 7)
    ]
    assert exact[1:] == pytest.approx([exact[0]] * 2, rel=1e-11)


def test_wrong_evaluations_of_real_images_are_visible(digits, cnn):
    def line(images=digits.train, reference=digits.test, name="test", ema="ema"):
        return str(
            evaluate_images(
                images,
                None,
                reference,
                cnn,
                reference_name=name,
                real_images=digits.train,
                source=Source(ema=ema),
            )[0]
        )

    assert "DEVIATES" not in line()
    assert "DEVIATES: raw weights instead of averaged" in line(ema="raw")
    assert "DEVIATES: reference train instead of test" in line(reference=digits.train, name="train")
    few = line(images=digits.train[:200])
    assert few.startswith("FD@200 (digits-cnn)") and "DEVIATES: n 200 instead of 1437" in few
    other = str(evaluate_images(digits.train, None, digits.test, Pixels(), FID50K)[0])
    assert other.startswith("FD@1437 (pixels)") and "features pixels instead of inception-v3-tf" in other


def test_the_floor_is_taken_at_the_number_of_samples(digits, cnn):
    (record,) = evaluate_images(digits.train[:200], None, digits.test, cnn, real_images=digits.train)
    assert record.n == 200 and record.real_n == 200
    rows = spread(1437, 200)
    assert len(set(rows.tolist())) == 200 and rows[-1] > 1400
    truth = frechet_from_stats(gaussian_stats(cnn(digits.train[rows])), gaussian_stats(cnn(digits.test)))
    assert record.real == pytest.approx(truth, rel=1e-5)
    many = digits.train.repeat(2, 1, 1, 1)
    (record,) = evaluate_images(many, None, digits.test, cnn, real_images=digits.train)
    assert record.real_n == 1437 and "(real@1437 " in str(
        record
    )  # there are no more real ones, and the line says so


def test_labels_below_zero_are_not_judged(digits, cnn):
    labels = digits.train_labels.clone()
    labels[:1000] = -1
    _, accuracy = evaluate_images(digits.train, labels, digits.test, cnn)
    assert accuracy.n == 437 and accuracy.value > 0.99
    assert len(evaluate_images(digits.train, torch.full_like(labels, -1), digits.test, cnn)) == 1
    assert len(evaluate_images(digits.train, labels, digits.test, Pixels())) == 1


def test_two_processes_equal_one(digits, cnn):
    """Two processes played by threads that sum what they bring at a barrier; one has far more than the other."""
    wanted, shape = [Moments(), Answers()], digits.train.shape[1:]
    reference = collect_kept(digits.test, cnn, wanted, name="test", labels=digits.test_labels)
    board, barrier, results = [None, None], threading.Barrier(2), [None, None]

    def work(rank, rows):
        def reduce(tensor):
            board[rank] = tensor
            barrier.wait()
            total = board[0] + board[1]
            barrier.wait()
            return total

        pieces = [(rows, digits.train[rows], digits.train_labels[rows])] if len(rows) else []
        mine = collect(pieces, cnn, wanted, n=1437, shape=shape)
        results[rank] = judge({"samples": mine.all_reduce(reduce), "reference": reference})

    whole = collect(pieces_of(digits.train, digits.train_labels, 256), cnn, wanted, n=1437, shape=shape)
    alone = judge({"samples": whole, "reference": reference})
    every = torch.arange(1437)
    for shares in ((every[:100], every[100:]), (every[:0], every), (every[::2], every[1::2])):
        threads = [threading.Thread(target=work, args=(rank, rows)) for rank, rows in enumerate(shares)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results[0] == results[1]
        assert [r.n for r in results[0]] == [r.n for r in alone] == [1437, 1437]
        assert results[0][0].value == pytest.approx(alone[0].value, rel=1e-5)
        assert results[0][1].value == alone[1].value


def test_points_are_measured_as_they_are():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(500, 2, generator=rng), torch.randn(400, 2, generator=rng) * 2 + 5
    (record,) = evaluate_images(a, None, b, Coordinates(), real_images=a)
    truth = frechet_from_stats(gaussian_stats(a), gaussian_stats(b))
    assert record.value == pytest.approx(truth, rel=1e-12)
    assert (
        record.quantisation == UNQUANTISED
        and record.deviations == ()
        and "FD@500 (coordinates)" in str(record)
    )


def test_sets_that_do_not_belong_together_are_refused(digits, cnn):
    with pytest.raises(ValueError, match="cannot be compared"):
        evaluate_images(digits.train[:, :, :4], None, digits.test, Pixels())
    with pytest.raises(ValueError, match="at least two"):
        evaluate_images(digits.train[:1], None, digits.test, cnn)
    with pytest.raises(ValueError, match="5 images have 4 labels"):
        evaluate_images(digits.train[:5], digits.train_labels[:4], digits.test, cnn)
    samples, reference = (
        moments(digits.train, cnn, name="samples"),
        moments(digits.test, Pixels(), name="test"),
    )
    with pytest.raises(ValueError, match="made with pixels"):
        judge({"samples": samples, "reference": reference})


class Counting(Pixels):
    """Pixels that count how often they are asked, under a hash of choice."""

    def __init__(self, sha256="11" * 32):
        super().__init__()
        self.sha256 = sha256
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images)


def test_reference_statistics_are_kept_by_content(digits, tmp_path):
    extractor = Counting()
    first = moments(digits.test, extractor, name="test", folder=tmp_path)
    assert extractor.calls > 0 and len(list(tmp_path.iterdir())) == 1
    extractor.calls = 0
    again = moments(digits.test.clone(), extractor, name="other name", folder=tmp_path)
    assert extractor.calls == 0 and torch.equal(again.moments().cov, first.moments().cov) and again.n == 360
    assert again.sha256 == content_hash(digits.test) and again.name == "other name"

    changed = digits.test.clone()
    changed[0, 0, 0, 0] += 1
    moments(changed, extractor, name="test", folder=tmp_path)
    assert extractor.calls > 0  # one pixel is another set
    other = Counting("22" * 32)
    moments(digits.test, other, name="test", folder=tmp_path)
    assert other.calls > 0  # other weights are other features
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_or_foreign_statistics_file_is_made_anew(digits, tmp_path):
    truth = moments(digits.test, Counting(), name="test", folder=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    extractor = Counting()
    again = moments(digits.test, extractor, name="test", folder=tmp_path)
    assert extractor.calls > 0 and torch.equal(again.moments().cov, truth.moments().cov)
    assert len(path.read_bytes()) == len(whole)  # mended
    # statistics of other features under this file's name are not taken
    other_folder = tmp_path / "other"
    moments(digits.test[:100], Counting(), name="test", folder=other_folder)
    (foreign,) = other_folder.iterdir()
    path.write_bytes(foreign.read_bytes())
    extractor = Counting()
    assert moments(digits.test, extractor, name="test", folder=tmp_path).n == 360
    assert extractor.calls > 0


def test_the_classifiers_answers_are_kept_too_and_only_what_is_missing_is_made(digits, cnn, tmp_path):
    def answers(labels):
        counts = collect_kept(digits.test, cnn, [Answers()], name="test", labels=labels, folder=tmp_path)
        return counts.kept[Answers()].counts.tolist()

    for _ in range(2):
        right, asked = answers(digits.test_labels)
        assert asked == 360 and right / asked == pytest.approx(cnn.test_accuracy, abs=1.5 / 360)
    assert answers(None) == [0, 0]
    extractor = Counting()
    moments(digits.test, extractor, name="test", folder=tmp_path / "some")
    extractor.calls = 0
    both = collect_kept(
        digits.test,
        extractor,
        [Moments(), Bank(most=7)],
        name="test",
        folder=tmp_path / "some",
        batch_size=360,
    )
    assert extractor.calls == 2 and both.kept[Bank(most=7)].rows.shape == (
        7,
        64,
    )  # one of them asks for the length
    assert both.moments().n == 360


def test_a_bank_keeps_rows_spread_over_the_set_whoever_sees_them(digits):
    bank, rows = Bank(most=100), spread(1437, 100)
    whole = collect(pieces_of(digits.train, None, 300), Pixels(), [bank], n=1437, shape=(1, 8, 8)).kept[bank]
    assert torch.equal(whole.rows, Pixels()(digits.train[rows]))
    parts = [
        collect([(index, digits.train[index], None)], Pixels(), [bank], n=1437, shape=(1, 8, 8)).kept[bank]
        for index in torch.randperm(1437, generator=torch.Generator().manual_seed(0)).split(500)
    ]
    assert 0 < len(parts[0].rows) < 100
    for part in parts[1:]:
        parts[0].merge(part)
    assert torch.equal(parts[0].rows, whole.rows)
    again = bank.start(1437, {"features": 0})
    again.load_state_dict(whole.state_dict())
    assert torch.equal(again.rows, whole.rows)
    few = collect(pieces_of(digits.train[:5], None, 2), Pixels(), [bank], n=5, shape=(1, 8, 8)).kept[bank]
    assert torch.equal(few.rows, Pixels()(digits.train[:5]))


def test_a_measure_that_does_not_apply_says_why(digits, cnn):
    told = {}
    settings = {
        "on_hindrance": told.__setitem__,
        "measures": (Frechet(output="spatial"), Frechet(), Accuracy()),
    }
    (record,) = evaluate_images(digits.train, None, digits.test, cnn, **settings)
    assert record.metric == "frechet"
    assert told == {"spatial_frechet": "digits-cnn has no spatial", "accuracy": "the samples have no labels"}
    evaluate_images(digits.train, digits.train_labels, digits.test, Pixels(), **settings)
    assert told["accuracy"] == "pixels tells no classes of the data"


def test_a_bank_of_samples_whose_classes_come_in_turn_holds_all_classes_alike():
    for n, classes in ((50_000, 10), (50_000, 1000), (60_000, 10)):
        kept = torch.bincount(spread(n, 10_000) % classes, minlength=classes)
        assert kept.min() > 0 and kept.double().std() < 2 * (10_000 / classes) ** 0.5
    assert torch.equal(spread(5, 10), torch.arange(5)) and len(set(spread(1437, 300).tolist())) == 300
    assert bool((spread(1437, 300).diff() > 0).all())


def test_a_measure_that_cannot_be_taken_does_not_cost_the_others(digits, cnn):
    told = {}
    records = evaluate_images(
        digits.train[:3], None, digits.test, cnn, measures=(Frechet(), PRDC()), on_hindrance=told.__setitem__
    )
    assert [record.metric for record in records] == ["frechet"] and "prdc" in told
    with pytest.raises(ValueError):
        evaluate_images(digits.train[:3], None, digits.test, cnn, measures=(PRDC(),))


def test_statistics_written_as_adm_does_meet_the_same_features():
    """Maps are flattened with channels last, as TensorFlow has them: a set against its own statistics is at zero."""
    import numpy as np

    from diffusion_lab.metrics.inception import spatial

    maps = torch.randn(40, 9, 3, 2, generator=torch.Generator().manual_seed(0))
    theirs = maps.permute(0, 2, 3, 1).numpy()[..., :7].reshape(40, -1)
    assert np.array_equal(spatial(maps).numpy(), theirs)

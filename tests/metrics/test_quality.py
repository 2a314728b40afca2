"""The whole way from bytes to records, on the real digits."""

import threading

import pytest
import torch

from diffusion_lab.images import to_uint8
from diffusion_lab.metrics import quality
from diffusion_lab.metrics.features import Coordinates, DigitsCNN, Pixels
from diffusion_lab.metrics.frechet import frechet_from_stats, gaussian_stats
from diffusion_lab.metrics.protocol import FID50K, Source
from diffusion_lab.metrics.quality import evaluate, evaluate_images, spread
from diffusion_lab.metrics.reference import content_hash, reference_statistics
from diffusion_lab.metrics.train_classifier import digits_split


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
    reference = reference_statistics(digits.test, cnn, name="test", labels=digits.test_labels)
    board, barrier, results = [None, None], threading.Barrier(2), [None, None]

    def work(rank, rows):
        def reduce(tensor):
            board[rank] = tensor
            barrier.wait()
            total = board[0] + board[1]
            barrier.wait()
            return total

        batches = [(digits.train[rows], digits.train_labels[rows])] if len(digits.train[rows]) else []
        results[rank] = evaluate(batches, extractor=cnn, reference=reference, reduce=reduce)

    alone = evaluate([(digits.train, digits.train_labels)], extractor=cnn, reference=reference)
    for shares in ((slice(0, 100), slice(100, None)), (slice(0, 0), slice(0, None))):
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
        record.quantisation == quality.UNQUANTISED
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
    reference = reference_statistics(digits.test, Pixels(), name="test")
    with pytest.raises(ValueError, match="made with pixels"):
        evaluate([(digits.train, None)], extractor=cnn, reference=reference)


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
    first = reference_statistics(digits.test, extractor, name="test", folder=tmp_path)
    assert extractor.calls > 0 and len(list(tmp_path.iterdir())) == 1
    extractor.calls = 0
    again = reference_statistics(digits.test.clone(), extractor, name="other name", folder=tmp_path)
    assert extractor.calls == 0 and torch.equal(again.stats.cov, first.stats.cov) and again.n == 360
    assert again.sha256 == content_hash(digits.test) and again.name == "other name"

    changed = digits.test.clone()
    changed[0, 0, 0, 0] += 1
    reference_statistics(changed, extractor, name="test", folder=tmp_path)
    assert extractor.calls > 0  # one pixel is another set
    other = Counting("22" * 32)
    reference_statistics(digits.test, other, name="test", folder=tmp_path)
    assert other.calls > 0  # other weights are other features
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_or_foreign_statistics_file_is_made_anew(digits, tmp_path):
    truth = reference_statistics(digits.test, Counting(), name="test", folder=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    extractor = Counting()
    again = reference_statistics(digits.test, extractor, name="test", folder=tmp_path)
    assert extractor.calls > 0 and torch.equal(again.stats.cov, truth.stats.cov)
    assert len(path.read_bytes()) == len(whole)  # mended
    # statistics of other features under this file's name are not taken
    other_folder = tmp_path / "other"
    reference_statistics(digits.test[:100], Counting(), name="test", folder=other_folder)
    (foreign,) = other_folder.iterdir()
    path.write_bytes(foreign.read_bytes())
    extractor = Counting()
    assert reference_statistics(digits.test, extractor, name="test", folder=tmp_path).n == 360
    assert extractor.calls > 0


def test_the_classifiers_accuracy_is_kept_too(digits, cnn, tmp_path):
    for _ in range(2):
        reference = reference_statistics(
            digits.test, cnn, name="test", labels=digits.test_labels, folder=tmp_path
        )
        assert reference.accuracy == pytest.approx(cnn.test_accuracy, abs=1.5 / 360)
    assert reference_statistics(digits.test, cnn, name="test", folder=tmp_path).accuracy is None

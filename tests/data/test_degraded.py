"""Spoilt copies: a function of position or seed whatever the batch, of the right law, beside their originals."""

import math

import numpy as np
import pytest
import torch

from diffusion_lab.data import DataError, DataModule, Degraded, Digits, InMemory
from diffusion_lab.data.degraded import Degradation
from diffusion_lab.images import to_float
from diffusion_lab.measurements import Colourise, GaussianBlur, Inpaint, PhaseRetrieval, SuperResolution

BLUR = GaussianBlur(size=9, std=1.5)


def degraded(operator=BLUR, noise=0.1, batch_size=16, **options):
    return Degraded(data=Digits(batch_size=batch_size, seed=3, **options), operator=operator, noise=noise)


def batches(data, n, **options):
    loader = iter(data.loader(**{"start": 0, **options}))
    return [next(loader) for _ in range(n)]


def whole(data, n):
    return {name: torch.cat([b[name] for b in batches(data, n)]) for name in ("x0", "label", "image")}


def test_a_copy_is_the_spoilt_example_and_noise():
    clean, noisy = whole(degraded(noise=0.0), 60), whole(degraded(), 60)
    x0 = to_float(clean["x0"])
    assert torch.equal(clean["image"], BLUR(x0)) and clean["image"].dtype == torch.float32
    assert torch.equal(clean["x0"], noisy["x0"]) and torch.equal(clean["label"], noisy["label"])
    n = (noisy["image"] - clean["image"]) / 0.1
    assert abs(float(n.mean())) < 4 / math.sqrt(n.numel())
    assert abs(float(n.var()) - 1) < 4 * math.sqrt(2 / n.numel())
    # neighbours and repetitions of an image have their own
    assert float(torch.corrcoef(n.flatten(1)[:100]).fill_diagonal_(0).abs().max()) < 0.6


def test_positions_alone_decide():
    one = whole(degraded(), 4)
    later = batches(degraded(), 2, start=32)
    assert torch.equal(torch.cat([b["image"] for b in later]), one["image"][32:])
    for rank in (0, 1):
        shares = batches(degraded(), 2, rank=rank, world=2)
        assert torch.equal(torch.cat([b["image"] for b in shares]), one["image"][:32][rank::2])
    other = Degraded(data=Digits(batch_size=16, seed=4), operator=BLUR, noise=0.1)
    # another run's noise, not only its order
    first, second = (batch["image"] - BLUR(to_float(batch["x0"])) for batch in (one, whole(other, 4)))
    assert float((first - second).abs().mean()) > 0.05


def test_workers_make_the_same_batches():
    inside, outside = degraded(num_workers=1), degraded()
    assert torch.equal(whole(inside, 2)["image"], whole(outside, 2)["image"])


class Mirrored(Digits):
    def __init__(self, **options):
        super().__init__(**options)
        self.flip = True


def test_a_mirrored_example_has_a_mirrored_copy():
    data = Degraded(data=Mirrored(batch_size=64, seed=0), operator=BLUR, noise=0.0)
    found, plain = (
        whole(data, 1),
        whole(Degraded(data=Digits(batch_size=64, seed=0), operator=BLUR, noise=0.0), 1),
    )
    assert torch.equal(found["image"], BLUR(to_float(found["x0"])))
    assert not torch.equal(found["image"], plain["image"])


def test_smaller_measurements_are_enlarged_and_blanks_get_noise():
    x0 = to_float(Digits(batch_size=4, seed=0).test_images()[0][:3])
    small = Degradation(operator=SuperResolution(factor=4), noise=0.0)(x0, range(3))
    assert small.shape == x0.shape and torch.equal(
        small[:, :, :4, :4], small[:, :, :1, :1].expand(-1, -1, 4, 4)
    )
    torch.testing.assert_close(small.mean((1, 2, 3)), x0.mean((1, 2, 3)))
    masked = Degradation(operator=Inpaint(), noise=0.5)(x0, range(3))
    assert float(masked[:, :, 2:6, 2:6].std()) > 0.3


# ---- what samples start from -----------------------------------------------------------------------------------------


def test_samples_start_from_test_images_of_their_class():
    data, seeds = degraded(), list(range(40))
    labels = torch.arange(40) % 10
    image, x0 = data.conditions(seeds, labels)["image"], data.originals(seeds, labels)
    images, classes = data.test_images()
    real = to_float(images)
    where = [int((real == x).flatten(1).all(1).nonzero()[0]) for x in x0]
    assert torch.equal(classes[where], labels) and len(set(where)) == 40
    assert abs(float((image - BLUR(x0)).std()) / 0.1 - 1) < 0.1
    # the batch does not matter, the seed does
    assert torch.equal(data.conditions(seeds[7:9], labels[7:9])["image"], image[7:9])
    again = data.conditions([seeds[3] + 10 * int((classes == 3).sum())], labels[3:4])
    # one whose turn comes again has other noise
    assert 0.5 < float((again["image"] - image[3:4]).std() / (0.1 * math.sqrt(2))) < 2
    # every test image of a class has its turn
    count = int((classes == 5).sum())
    turn = data.originals([5 + 10 * k for k in range(count)], torch.full((count,), 5))
    assert len(turn.flatten(1).unique(dim=0)) == len(real[classes == 5].flatten(1).unique(dim=0))


class Small(DataModule):
    name, shape = "small", (1, 8, 8)

    def __init__(self, labels, num_classes):
        super().__init__(batch_size=4, seed=0)
        self.labels, self.num_classes = labels, num_classes

    def source(self, split):
        images = torch.arange(4).to(torch.uint8)[:, None, None, None].expand(4, 1, 8, 8).clone()
        return InMemory(images, self.labels)


def test_without_labels_test_images_come_in_turn():
    data = Degraded(data=Small(None, 0), operator=BLUR, noise=0.0)
    found = data.originals([0, 1, 2, 3, 4, 9], None)[:, 0, 0, 0]
    assert torch.equal(found, to_float(torch.tensor([0, 1, 2, 3, 0, 1], dtype=torch.uint8)))
    assert set(next(iter(data.loader(start=0)))) == {"x0", "image"}


def test_a_class_without_a_test_image_is_refused_by_its_number():
    data = Degraded(data=Small(torch.tensor([0, 0, 2, 2]), 3), operator=BLUR, noise=0.0)
    with pytest.raises(DataError, match="class 1"):
        data.conditions([0, 1], torch.tensor([0, 1]))


def test_other_data_sets_give_no_conditions():
    data = Digits(batch_size=4, seed=0)
    assert data.conditions([0], torch.tensor([0])) == {} and data.originals([0], None) is None


def test_facts_are_those_of_the_data_set_inside():
    data, inside = degraded(), Digits(batch_size=16, seed=3)
    for name in ("name", "shape", "num_classes", "class_names", "batch_size", "seed"):
        assert getattr(data, name) == getattr(inside, name)
    assert torch.equal(data.test_images()[0], inside.test_images()[0])
    assert np.array_equal(data.train_images()[1], inside.train_images()[1])


@pytest.mark.parametrize(
    ("operator", "noise"),
    [(BLUR, -0.1), (BLUR, math.nan), (GaussianBlur(size=17, std=1.0), 0.1), (Colourise(), 0.1)],
)
def test_what_does_not_fit_is_refused_at_once(operator, noise):
    with pytest.raises(ValueError):
        degraded(operator, noise)


def test_what_is_no_image_is_refused():
    class Encoded(Small):
        pixels = False

    with pytest.raises(ValueError, match="Encoded holds no pixels"):
        Degraded(data=Encoded(None, 0), operator=BLUR, noise=0.0)


class Colour(Small):
    shape = (3, 8, 8)


def test_a_measurement_that_is_no_image_of_its_kind_is_refused():
    for data, operator in ((Colour(None, 0), Colourise()), (Small(None, 0), PhaseRetrieval())):
        with pytest.raises(ValueError, match="as many channels"):
            Degraded(data=data, operator=operator, noise=0.0)

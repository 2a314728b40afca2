"""Each data set: what it holds, and one clear line when it cannot be had."""

import gzip
import hashlib
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lab.data import MNIST, DataError, Digits, ImageFolder, Toy
from diffusion_lab.data import mnist as mnist_module
from diffusion_lab.process import VariancePreserving


def batches(data, n, **options):
    data.setup()
    return [data.on_after_batch_transfer(b, 0) for b in itertools.islice(iter(data.loader(**options)), n)]


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


# ---- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_the_real_ones_with_the_stated_split():
    from sklearn.datasets import load_digits

    data, digits = Digits(batch_size=8, seed=0), load_digits()
    (train, train_labels), (test, test_labels) = data.train_images(), data.test_images()
    assert train.shape == (1437, 1, 8, 8) and test.shape == (360, 1, 8, 8) and train.dtype == torch.uint8
    assert torch.equal(test_labels, torch.from_numpy(digits.target[::5]))
    assert np.array_equal(np.round(test[:, 0].numpy() / 255 * 16), digits.images[::5])
    assert len(np.unique(train)) == 17
    counts = torch.bincount(train_labels)
    assert len(counts) == 10 and int(counts.min()) > 130
    overlap = {hashlib.sha256(i.numpy().tobytes()).digest() for i in train} & {
        hashlib.sha256(i.numpy().tobytes()).digest() for i in test
    }
    assert not overlap


def test_digit_batches_are_floats_with_labels():
    (batch,) = batches(Digits(batch_size=16, seed=0), 1, start=0)
    assert batch["x0"].shape == (16, 1, 8, 8) and batch["x0"].dtype == torch.float32
    assert float(batch["x0"].min()) == -1.0 and float(batch["x0"].max()) == 1.0
    assert batch["label"].dtype == torch.int64


def test_two_processes_see_one_batch_and_a_later_start_continues():
    whole = batches(Digits(batch_size=16, seed=3), 4, start=0)
    halves = [batches(Digits(batch_size=16, seed=3), 4, start=0, rank=r, world=2) for r in range(2)]
    for k in range(4):
        assert torch.equal(halves[0][k]["x0"], whole[k]["x0"][0::2])
        assert torch.equal(halves[1][k]["x0"], whole[k]["x0"][1::2])
    later = batches(Digits(batch_size=16, seed=3), 2, start=32)
    assert torch.equal(later[0]["x0"], whole[2]["x0"]) and torch.equal(later[1]["label"], whole[3]["label"])


def test_workers_do_not_matter():
    without = batches(Digits(batch_size=64, seed=1), 5, start=64)
    with_two = batches(Digits(batch_size=64, seed=1, num_workers=2), 5, start=64)
    assert all(torch.equal(a["x0"], b["x0"]) for a, b in zip(without, with_two, strict=True))


def test_state_is_one_integer():
    data = Digits(batch_size=16, seed=0)
    data.load_state_dict({"images_seen": 48})
    assert data.state_dict() == {"images_seen": 48}


# ---- MNIST -----------------------------------------------------------------------------------------------------------


@pytest.mark.needs_data
def test_real_mnist(data_root):
    data = MNIST(root=data_root, batch_size=32, seed=0, download=False)
    (train, labels), (test, _) = data.train_images(), data.test_images()
    assert train.shape == (60_000, 1, 28, 28) and test.shape == (10_000, 1, 28, 28)
    assert float(train.float().mean()) / 255 == pytest.approx(0.1307, abs=1e-4)
    assert float(train.float().std()) / 255 == pytest.approx(0.3081, abs=1e-4)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]


def idx(array):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Four small IDX files and their checksums in place of the real ones."""
    rng = np.random.default_rng(0)
    for split, (images, labels) in mnist_module.FILES.items():
        n = 30 if split == "train" else 10
        for name, array in ((images, rng.integers(0, 256, (n, 28, 28))), (labels, rng.integers(0, 10, n))):
            payload = idx(array.astype(np.uint8))
            monkeypatch.setitem(mnist_module.SHA256, name, hashlib.sha256(payload).hexdigest())
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(payload))
    return tmp_path


def small(root):
    return MNIST(root=str(root), batch_size=4, seed=0, download=False)


def test_mnist_is_found_in_root_or_below_zipped_or_not(small_mnist, tmp_path):
    expected = small(small_mnist).train_images()[0]
    below = tmp_path / "other" / "mnist"
    below.mkdir(parents=True)
    for file in small_mnist.glob("*.gz"):
        (below / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert torch.equal(small(below.parent).train_images()[0], expected) and expected.shape == (30, 1, 28, 28)


def test_missing_mnist_is_one_line(tmp_path):
    with pytest.raises(DataError) as error:
        small(tmp_path).setup()
    text = one_line(error)
    assert "train-images" in text and str(tmp_path) in text and "DIFFUSION_LAB_DATA" in text


def test_failed_download_is_one_line(tmp_path, monkeypatch):
    def no_network(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(mnist_module.urllib.request, "urlopen", no_network)
    with pytest.raises(DataError) as error:
        MNIST(root=str(tmp_path / "new"), batch_size=4, seed=0).setup()
    assert "no route to host" in one_line(error)


def test_download_is_checked_and_kept(small_mnist, tmp_path, monkeypatch):
    name = mnist_module.FILES["train"][0]
    payload = (small_mnist / f"{name}.gz").read_bytes()

    class Reply:
        def __init__(self, content):
            self.content = content

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def read(self):
            return self.content

    (small_mnist / f"{name}.gz").unlink()
    monkeypatch.setattr(
        mnist_module.urllib.request, "urlopen", lambda *a, **k: Reply(gzip.compress(b"wrong"))
    )
    with pytest.raises(DataError, match="not the right file"):
        MNIST(root=str(small_mnist), batch_size=4, seed=0).setup()
    monkeypatch.setattr(mnist_module.urllib.request, "urlopen", lambda *a, **k: Reply(payload))
    MNIST(root=str(small_mnist), batch_size=4, seed=0).setup()
    assert (small_mnist / f"{name}.gz").read_bytes() == payload and not list(small_mnist.glob("*.part"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b[: len(b) // 2], "damaged"),
        (lambda b: gzip.compress(gzip.decompress(b)[:-1] + b"\x00\x01"), "SHA-256"),
        (lambda b: b"not gzip at all", "damaged"),
    ],
    ids=["truncated", "altered", "garbage"],
)
def test_damaged_mnist_is_named(small_mnist, spoil, message):
    file = small_mnist / f"{mnist_module.FILES['train'][0]}.gz"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        small(small_mnist).setup()
    assert file.name in one_line(error)


def test_truncated_idx_is_refused(tmp_path):
    payload = idx(np.zeros((3, 2, 2), dtype=np.uint8))
    assert mnist_module.read_idx(payload, tmp_path).shape == (3, 2, 2)
    for bad in (payload[:-1], payload[:6], b"", b"\x00\x00\x0d" + payload[3:]):
        with pytest.raises(DataError, match="complete IDX"):
            mnist_module.read_idx(bad, tmp_path)


# ---- toy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", ["ring", "grid", "moons", "spiral"])
def test_toy_examples_come_from_the_density_that_is_known(density):
    data = Toy(density=density, batch_size=8, seed=0, num_examples=5000)
    x0, label = data.train_images()
    assert x0.shape == (5000, 2) and set(label.tolist()) == {0, 1} and float(x0.abs().max()) < 1.3
    # E[-log q] over the examples is the entropy; over points from elsewhere it is much larger
    denoiser, clean = data.denoiser(VariancePreserving()), torch.tensor(math.inf)
    inside = denoiser.log_density(x0.double(), clean).mean()
    outside = denoiser.log_density(x0.double().roll(1, 1) * 1.3 + 0.2, clean).mean()
    assert float(inside) > float(outside) + 1
    assert not torch.equal(x0[:1000], data.test_images()[0])


def test_unknown_density():
    with pytest.raises(ValueError, match="ring, grid, moons"):
        Toy(density="star", batch_size=8, seed=0)


# ---- image folder ----------------------------------------------------------------------------------------------------


def folder(root, classes=("cat", "dog"), n=12, size=(20, 14)):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for k in range(n):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
                root / name / f"{k:02}.png"
            )
    return root


def pictures(root, num_classes=2, shape=(3, 8, 8), **options):
    return ImageFolder(root=str(root), shape=shape, num_classes=num_classes, batch_size=4, seed=0, **options)


def test_image_folder(tmp_path):
    data = pictures(folder(tmp_path))
    (train, labels), (test, _) = data.train_images(), data.test_images()
    assert train.shape == (22, 3, 8, 8) and test.shape == (2, 3, 8, 8) and set(labels.tolist()) == {0, 1}
    assert list(data.class_names) == ["cat", "dog"]
    assert pictures(tmp_path, shape=(1, 8, 8)).train_images()[0].shape == (22, 1, 8, 8)
    assert pictures(tmp_path, num_classes=0).train_images()[1] is None


def test_image_folder_with_its_own_splits(tmp_path):
    folder(tmp_path / "train", n=3)
    folder(tmp_path / "test", n=2)
    data = pictures(tmp_path)
    assert len(data.train_images()[0]) == 6 and len(data.test_images()[0]) == 4


def test_crop_is_centred_and_resizing_keeps_the_mean(tmp_path):
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 20:60] = 200  # exactly the centre square
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    (image,) = pictures(tmp_path, num_classes=0).train_images()[0]
    assert int(image[:, :, 1:-1].min()) >= 199


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named(tmp_path, workers):
    folder(tmp_path)
    broken = tmp_path / "cat" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError) as error:
        batches(pictures(tmp_path, num_workers=workers), 6, start=0)
    assert str(broken) in one_line(error) and "not a readable image" in str(error.value)


def test_wrong_folders_are_one_line(tmp_path):
    for make, message in [
        (lambda: pictures(tmp_path / "nowhere"), "no folder"),
        (lambda: pictures(tmp_path, num_classes=0), "no images"),
        (lambda: pictures(folder(tmp_path / "three", classes="abc")), "3 class folders"),
    ]:
        with pytest.raises(DataError, match=message) as error:
            make().setup()
        one_line(error)
    with pytest.raises(ValueError, match="shape"):
        pictures(tmp_path, shape=(3, 8, 9))


def test_flips_are_addressed(tmp_path):
    data = pictures(folder(tmp_path, size=(8, 8)), flip=True)
    plain = pictures(tmp_path)
    flipped = []
    for a, b in zip(batches(data, 10, start=0), batches(plain, 10, start=0), strict=True):
        for x, y in zip(a["x0"], b["x0"], strict=True):
            assert torch.equal(x, y) or torch.equal(x, y.flip(-1))
            flipped.append(not torch.equal(x, y))
    assert 8 < sum(flipped) < 32
    again = batches(pictures(tmp_path, flip=True, num_workers=2), 10, start=0)
    assert all(torch.equal(a["x0"], b["x0"]) for a, b in zip(again, batches(data, 10, start=0), strict=True))


def test_errors_survive_a_trip_between_processes():
    error = DataError("plain words")
    assert str(pickle.loads(pickle.dumps(error))) == "plain words"

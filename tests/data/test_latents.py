"""Latents on disk: what is read is what was written, shifted and scaled; what is wrong is named."""

import numpy as np
import pytest
import torch

from diffusion_lab.data.digits import Digits
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.latents import Latents


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train-x0.npy", rng.normal(size=(25, 2, 3, 3)).astype(np.float16))
    np.save(tmp_path / "train-label.npy", np.arange(25) % 4)
    return tmp_path


def latents(folder, **options):
    settings = dict(
        root=str(folder), shape=(2, 3, 3), num_classes=4, shift=(0.5,), scale=(2.0, 4.0), batch_size=4
    )
    return Latents(**{**settings, "seed": 0, **options})


def test_what_is_read_is_what_was_written_shifted_and_scaled(folder):
    x0 = torch.from_numpy(np.load(folder / "train-x0.npy").astype(np.float32))
    expected = (x0 - 0.5) * torch.tensor([2.0, 4.0])[:, None, None]
    data = latents(folder)
    rows = torch.tensor([k for k in range(25) if k % 10 != 9])
    images, labels = data.train_images()
    assert torch.equal(images, expected[rows]) and torch.equal(labels, rows % 4)
    assert torch.equal(data.test_images()[0], expected[[9, 19]])
    # any order, any repetition
    asked = np.array([7, 0, 7, 22, 3])
    again, told = data.source("train").read(asked)
    assert torch.equal(again, expected[rows[asked]]) and torch.equal(told, rows[asked] % 4)
    batch = next(iter(data.loader(start=0)))
    assert batch["x0"].dtype == torch.float32 and batch["x0"].shape == (4, 2, 3, 3)


def test_a_test_file_is_the_test_split(folder):
    np.save(folder / "test-x0.npy", np.zeros((3, 2, 3, 3), np.float32))
    np.save(folder / "test-label.npy", np.array([3, 2, 1]))
    data = latents(folder)
    assert len(data.train_images()[0]) == 25 and data.test_images()[1].tolist() == [3, 2, 1]
    assert latents(folder, num_classes=0).test_images()[1] is None


def test_what_is_wrong_is_named(folder):
    with pytest.raises(DataError, match=r"no file .*nowhere.train-x0.npy: set dataset.root"):
        latents(folder / "nowhere").train_images()
    with pytest.raises(DataError, match=r"shape \(2, 3, 3\), not \(4, 3, 3\)"):
        latents(folder, shape=(4, 3, 3), scale=(1.0,)).train_images()
    with pytest.raises(ValueError, match="scale needs one number, or one for each of 2 channels, got 3"):
        latents(folder, scale=(1.0, 1.0, 1.0))
    np.save(folder / "train-label.npy", np.arange(7))
    with pytest.raises(DataError, match="must hold 25 integers"):
        latents(folder).train_images()
    np.save(folder / "train-x0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="is not a readable"):
        latents(folder).train_images()


def test_larger_digits_are_the_same_digits():
    small, large = (Digits(size=size, batch_size=4, seed=0) for size in (8, 32))
    assert large.shape == (1, 32, 32) and large.name == "digits32" and small.name == "digits"
    (x, labels), (y, same) = small.test_images(), large.test_images()
    assert (
        torch.equal(labels, same)
        and torch.equal(y[:, :, ::4, ::4], x)
        and torch.equal(y[:, :, 3::4, 2::4], x)
    )
    with pytest.raises(ValueError, match="multiples of 8, got size=12"):
        Digits(size=12, batch_size=4, seed=0)

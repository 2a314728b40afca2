"""Pictures as people have them, MNIST as people name it, densities as the formula has them."""

import http.client

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lab.data import MNIST, DataError, ImageFolder, Toy
from diffusion_lab.data import mnist as mnist_module
from diffusion_lab.data.image_folder import read_picture
from diffusion_lab.process import VariancePreserving


def pictures(root, num_classes=0, shape=(3, 8, 8)):
    return ImageFolder(root=str(root), shape=shape, num_classes=num_classes, batch_size=4, seed=0)


def save(path, colour=128, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), colour).save(path)


def test_sixteen_bit_grey_keeps_its_levels(tmp_path):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    Image.fromarray(levels).save(tmp_path / "deep.png")
    read = read_picture(tmp_path / "deep.png", 8, 1)
    assert np.array_equal(read[0].numpy(), np.round(levels / 257))


def test_transparent_pixels_are_white(tmp_path):
    save(tmp_path / "clear.png", (10, 20, 30, 0), "RGBA")
    assert int(read_picture(tmp_path / "clear.png", 8, 3).min()) == 255
    save(tmp_path / "solid.png", (10, 20, 30, 255), "RGBA")
    assert read_picture(tmp_path / "solid.png", 8, 3)[:, 0, 0].tolist() == [10, 20, 30]


def test_a_picture_is_turned_upright(tmp_path):
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read = read_picture(tmp_path / "turned.png", 8, 1)[0]
    assert int(read[7].min()) == 255 and int(read[:7].max()) == 0


def test_pixels_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "floats.tiff")
    with pytest.raises(DataError, match=r"floats\.tiff.*mode F"):
        read_picture(tmp_path / "floats.tiff", 8, 1)


def test_shrinking_is_antialiased(tmp_path):
    lines = np.zeros((64, 64), dtype=np.uint8)
    lines[:, ::2] = 255  # finer than the result can show: without antialiasing it comes out black or white
    Image.fromarray(lines).save(tmp_path / "lines.png")
    read = read_picture(tmp_path / "lines.png", 8, 1).float()
    assert float((read - 127.5).abs().max()) < 2


def test_hidden_files_are_no_pictures(tmp_path):
    for k in range(3):
        save(tmp_path / "a" / f"{k}.png")
    (tmp_path / "a" / "._0.png").write_bytes(b"not a picture")
    save(tmp_path / ".thumbnails" / "0.png")
    assert len(pictures(tmp_path, num_classes=1).train_images()[0]) == 3


def test_a_test_split_with_other_classes_is_refused(tmp_path):
    for name in ("train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/emu/0.png"):
        save(tmp_path / name)
    data = pictures(tmp_path, num_classes=2)
    assert data.train_images()[1].tolist() == [0, 1]
    with pytest.raises(DataError, match="other class folders"):
        data.test_images()


def test_a_picture_outside_the_class_folders_is_named(tmp_path):
    save(tmp_path / "cat" / "0.png")
    save(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png is in no class folder"):
        pictures(tmp_path, num_classes=1).setup()


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(DataError, match="holds no images") as error:
        pictures(tmp_path).setup()
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_mnist_without_any_root_says_where_to_name_one(monkeypatch):
    monkeypatch.delenv("DIFFUSION_LAB_DATA", raising=False)
    with pytest.raises(DataError, match=r"dataset\.root.*DIFFUSION_LAB_DATA"):
        MNIST(batch_size=4, seed=0)


def test_mnist_takes_its_root_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSION_LAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=str(tmp_path)):
        MNIST(batch_size=4, seed=0, download=False).setup()


def test_a_download_cut_short_is_one_line(tmp_path, monkeypatch):
    def cut(*args, **options):
        raise http.client.IncompleteRead(b"")

    monkeypatch.setattr(mnist_module.urllib.request, "urlopen", cut)
    with pytest.raises(DataError, match="download failed") as error:
        MNIST(root=str(tmp_path / "new"), batch_size=4, seed=0).setup()
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


def test_a_missing_mnist_test_set_is_said_before_training(tmp_path, monkeypatch):
    asked = []

    def array(self, name):
        asked.append(name)
        if name.startswith("t10k"):
            raise DataError(f"no {name}")
        return np.zeros((2, 28, 28) if "images" in name else 2, dtype=np.uint8)

    monkeypatch.setattr(MNIST, "_array", array)
    with pytest.raises(DataError, match="t10k-images"):
        MNIST(root=str(tmp_path), batch_size=4, seed=0).setup()
    assert asked[:2] == list(mnist_module.FILES["train"])


@pytest.mark.parametrize(
    "bad", [b"\x00\x00\x08\x00", b"\x00\x00\x08\xff" + bytes(1020), b"\x00\x00\x08\x03" + b"\xff" * 12]
)
def test_idx_headers_that_lie_are_refused(bad, tmp_path):
    with pytest.raises(DataError, match="complete IDX"):
        mnist_module.read_idx(bad, tmp_path)


@pytest.mark.parametrize("density", ["ring", "grid", "moons", "spiral"])
def test_toy_labels_are_those_of_the_density(density):
    data = Toy(density=density, batch_size=8, seed=0, num_examples=4000)
    x0, label = data.train_images()
    denoiser, clean = data.denoiser(VariancePreserving()), torch.tensor(torch.inf, dtype=torch.float64)
    own = denoiser.log_density(x0.double(), clean, {"label": label})
    other = denoiser.log_density(x0.double(), clean, {"label": 1 - label})
    assert float((own > other).double().mean()) > 0.95
    # half the examples are of each class, and x0 is its own denoised self where there is no noise
    assert abs(float(label.double().mean()) - 0.5) < 0.05
    assert torch.allclose(denoiser(x0.double(), clean), x0.double(), atol=1e-12)


def test_a_strip_that_would_fill_the_memory_is_refused_and_a_long_picture_is_not(tmp_path):
    # 85 bytes in the file; resized whole before the crop it would be 256 x 2,560,000 pixels
    Image.new("L", (10_000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(DataError, match=r"strip.png.*too long and thin"):
        read_picture(tmp_path / "strip.png", 256, 1)
    Image.new("L", (4000, 20), 128).save(tmp_path / "long.png")
    assert read_picture(tmp_path / "long.png", 32, 1).unique().tolist() == [128]

"""FFHQ, CelebA and ImageNet: the preparation that papers use, and one line on how to get what is missing."""

import hydra
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from shard_files import write

from diffusion_lab.app.session import conf_folder
from diffusion_lab.data import FFHQ, CelebA, DataError, ImageFolder
from diffusion_lab.data.pictures import Preparation, read_pictures


def picture(path, width, height, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return Image.fromarray(pixels)


def chw(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def celeba(root, **options):
    return CelebA(root=str(root), shape=(3, 16, 16), batch_size=2, seed=0, **options)


def ffhq(root, **options):
    return FFHQ(root=str(root), shape=(3, 16, 16), batch_size=2, seed=0, **options)


def test_celeba_is_cut_and_split_as_published(tmp_path):
    originals = [picture(tmp_path / "img_align_celeba" / f"{k:06}.png", 178, 218, k) for k in range(1, 5)]
    lines = [f"{k:06}.png {part}\n" for k, part in ((1, 0), (2, 2), (3, 1), (4, 0))]
    (tmp_path / "list_eval_partition.txt").write_text("".join(lines))
    train, test = celeba(tmp_path).train_images()[0], celeba(tmp_path).test_images()[0]
    # DDIM: the 128 pixels around x = 89, y = 121
    expected = [
        chw(
            originals[k]
            .crop((89 - 64, 121 - 64, 89 + 64, 121 + 64))
            .resize((16, 16), Image.Resampling.BILINEAR)
        )
        for k in (0, 3)
    ]
    assert torch.equal(train, torch.stack(expected)) and len(test) == 1
    # score-SDE: the middle 140
    middle = celeba(tmp_path, box=[19, 39, 159, 179]).train_images()[0]
    whole = originals[0].crop(((178 - 140) // 2, (218 - 140) // 2, (178 + 140) // 2, (218 + 140) // 2))
    assert torch.equal(middle[0], chw(whole.resize((16, 16), Image.Resampling.BILINEAR)))
    (tmp_path / "img_align_celeba" / "000004.png").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 2 pictures.*mmlab"):
        celeba(tmp_path).setup()


def test_ffhq_is_resized_by_lanczos_and_split_by_number(tmp_path):
    originals = [picture(tmp_path / f"{k // 2:05}" / f"{k:05}.png", 64, 64, k) for k in range(4)]
    expected = torch.stack([chw(image.resize((16, 16), Image.Resampling.LANCZOS)) for image in originals])
    assert torch.equal(ffhq(tmp_path).train_images()[0], expected)
    assert torch.equal(ffhq(tmp_path).test_images()[0], expected)
    assert torch.equal(ffhq(tmp_path, test_from=3).test_images()[0], expected[3:])
    members = [(path.name, path.read_bytes()) for path in sorted(tmp_path.rglob("*.png"))]
    write(tmp_path / "shards" / "train-000.tar", members)
    assert torch.equal(ffhq(tmp_path / "shards").train_images()[0], expected)


def test_adm_preparation_is_the_box_filter_then_bicubic(tmp_path):
    """Dhariwal & Nichol's image_datasets: halve by box while twice as large, then bicubic, then the centre."""
    image = picture(tmp_path / "0.png", 71, 53)
    (found,) = read_pictures([tmp_path / "0.png"], Preparation(size=16, channels=3))
    expected = image.resize((35, 26), Image.Resampling.BOX)
    expected = expected.resize((round(35 * 16 / 26), 16), Image.Resampling.BICUBIC)
    left = (expected.width - 16) // 2
    assert torch.equal(found, chw(expected.crop((left, 0, left + 16, 16))))


def test_a_box_beyond_the_picture_is_named(tmp_path):
    picture(tmp_path / "0.png", 20, 20)
    with pytest.raises(
        DataError, match=r"0\.png is not a readable image: its 20x20 pixels do not hold the box"
    ):
        read_pictures([tmp_path / "0.png"], Preparation(size=8, channels=3, box=(0, 0, 21, 20)))
    for bad in ({"box": (0, 0, 0, 4)}, {"resize": "nearest"}, {"channels": 2}):
        with pytest.raises(ValueError):
            Preparation(**{"size": 8, "channels": 3, **bad})


def test_train_and_val_are_splits_and_train_alone_is_the_training_split(tmp_path):
    def images(num_classes):
        return ImageFolder(root=str(tmp_path), shape=(3, 8, 8), num_classes=num_classes, batch_size=2, seed=0)

    for k in range(12):
        picture(tmp_path / "train" / f"n{k % 2}" / f"{k:02}.png", 8, 8, k)
    assert len(images(2).train_images()[0]) == 11 and len(images(2).test_images()[0]) == 1
    for k in range(2):
        picture(tmp_path / "val" / f"n{k}" / "0.png", 8, 8, k)
    assert len(images(2).train_images()[0]) == 12 and len(images(2).test_images()[0]) == 2


def test_a_folder_of_pictures_may_hold_shards_instead(tmp_path):
    members = []
    for k in range(10):
        image = picture(tmp_path / "pictures" / f"{k}.png", 9, 9, k)
        assert image.size == (9, 9)
        members += [
            (f"{k}.png", (tmp_path / "pictures" / f"{k}.png").read_bytes()),
            (f"{k}.cls", str(k % 2).encode()),
        ]
    write(tmp_path / "shards" / "train-000.tar", members)
    pictures, shards = (
        ImageFolder(root=str(tmp_path / name), shape=(3, 8, 8), num_classes=n, batch_size=2, seed=0)
        for name, n in (("pictures", 0), ("shards", 2))
    )
    assert torch.equal(pictures.train_images()[0], shards.train_images()[0])
    assert shards.train_images()[1].tolist() == [k % 2 for k in range(9)] and list(shards.class_names) == [
        "0",
        "1",
    ]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar10", "curl -O https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
        ("cifar10_jpeg", "DIFFUSION_LAB_DATA"),
        ("ffhq", "github.com/NVlabs/ffhq-dataset"),
        ("celeba", "mmlab.ie.cuhk.edu.hk"),
        *((f"imagenet{side}", "image-net.org") for side in (32, 64, 128, 256, 512)),
        ("image_folder", "set dataset.root"),
    ],
)
def test_missing_data_are_one_line_that_says_how_to_get_them(name, hint, tmp_path):
    words = [f"dataset={name}", f"paths.data={tmp_path}"]
    words += [f"dataset.root={tmp_path / 'nowhere'}"] if name == "image_folder" else []
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", overrides=words)
    data = hydra.utils.instantiate(OmegaConf.to_container(cfg.dataset, resolve=True))
    with pytest.raises(DataError) as error:
        data.setup()
    text = str(error.value)
    assert hint in text and str(tmp_path) in text and "\n" not in text and len(text) < 400
    assert list(data.shape) == list(cfg.shape) and data.num_classes == cfg.num_classes

"""Conversion to shards: what comes out is what went in, whatever it lay in, and however often it was interrupted."""

import gzip
import io
import json
import os
import pickle
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import holding, train

from diffusion_lab import claims
from diffusion_lab.data import CIFAR10, CIFAR10JPEG, DataError, ImageFolder, Shards, convert
from diffusion_lab.data.archives import CIFAR_CLASSES, read_cifar, read_npz
from diffusion_lab.data.convert_sources import open_source


def shards(root, shape, num_classes=10, **options):
    return Shards(root=str(root), shape=shape, num_classes=num_classes, batch_size=4, seed=0, **options)


def run(*words):
    return convert.main([str(word) for word in words])


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=75)
    return file.getvalue()


def colour(n, side=32):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """30 pictures in two classes."""
    pixels = colour(30, 12)
    for k in range(30):
        path = tmp_path / "pets" / ("cat" if k < 17 else "dog") / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[k]).save(path)
    return tmp_path / "pets"


def by_key(root, shape, num_classes):
    """Pictures and labels in the order of the source, which the names of the samples tell."""
    data = shards(root, shape, num_classes, test="train-000000.tar")
    reader = data.source("train")
    x0, label = reader.read(np.arange(len(reader)))
    names = [int(reader.name_of(k).rpartition("'")[0].rpartition("'")[2]) for k in range(len(reader))]
    back = np.argsort(names)
    assert sorted(names) == list(range(len(names))) != names, "shuffled, unless told otherwise"
    return x0[back], None if label is None else label[back]


# ---- what goes in comes out ------------------------------------------------------------------------------------------


def test_a_folder_of_pictures(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, out, "--per-shard", 8, "--verify") == 0
    text = capsys.readouterr().out
    assert "30 samples in 4 shards" in text and "every shard is as it was written" in text
    files = ImageFolder(root=str(folder), shape=(3, 12, 12), num_classes=2, batch_size=4, seed=0)
    paths = sorted(folder.rglob("*.png"))
    x0, label = by_key(out, (3, 12, 12), 2)
    expected = [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in paths]
    assert torch.equal(x0, torch.stack(expected)) and label.tolist() == [0] * 17 + [1] * 13
    assert shards(out, (3, 12, 12), 2).class_names == ["cat", "dog"] == list(files.class_names)
    assert shards(out, (3, 12, 12), 2).name == "pets"
    # files are taken over as they are
    with tarfile.open(out / "train-000000.tar") as tar:
        info = next(i for i in tar if i.name.endswith(".png"))
        assert tar.extractfile(info).read() == paths[int(info.name[:9])].read_bytes()


def test_a_folder_with_its_own_splits_and_one_without_labels(folder, tmp_path):
    (folder / "cat").rename(folder.parent / "cats")
    both = tmp_path / "both"
    for split in ("train", "val"):
        (both / split / "cat").mkdir(parents=True)
    for k, path in enumerate(sorted((tmp_path / "cats").iterdir())):
        path.rename(both / ("val" if k < 5 else "train") / "cat" / path.name)
    assert run(both, tmp_path / "a") == 0 and run(both, tmp_path / "b", "--no-labels", "--in-order") == 0
    data = shards(tmp_path / "a", (3, 12, 12), 1)
    assert len(data.train_images()[0]) == 12 and len(data.test_images()[0]) == 5
    with pytest.raises(DataError, match=r"has no \.cls"):
        shards(tmp_path / "b", (3, 12, 12), 1).setup()
    assert len(shards(tmp_path / "b", (3, 12, 12), 0).train_images()[0]) == 12


def test_pictures_can_be_stored_prepared(folder, tmp_path):
    assert run(folder, tmp_path / "out", "--size", 8, "--resize", "lanczos", "--box", 0, 0, 10, 10) == 0
    stored, _ = by_key(tmp_path / "out", (3, 8, 8), 2)
    assert run(folder, tmp_path / "whole") == 0
    whole = shards(
        tmp_path / "whole", (3, 8, 8), 2, resize="lanczos", box=[0, 0, 10, 10], test="train-000000.tar"
    ).train_images()[0]
    assert sorted(map(bytes, stored.numpy())) == sorted(map(bytes, whole.numpy()))
    assert run(folder, tmp_path / "grey", "--size", 8, "--grey") == 0
    assert shards(tmp_path / "grey", (1, 8, 8), 2).train_images()[0].shape[1:] == (1, 8, 8)


def idx(array):
    return (
        b"\x00\x00\x08"
        + bytes([array.ndim])
        + b"".join(n.to_bytes(4, "big") for n in array.shape)
        + array.tobytes()
    )


def test_idx_files(tmp_path):
    rng, source = np.random.default_rng(0), tmp_path / "digits"
    source.mkdir()
    images, labels = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8), (np.arange(20) % 10).astype(np.uint8)
    for stem in ("train", "t10k"):
        (source / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (source / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
    assert run(source, tmp_path / "out") == 0
    x0, label = by_key(tmp_path / "out", (1, 28, 28), 10)
    assert np.array_equal(x0[:, 0], images) and np.array_equal(label, labels)
    assert len(shards(tmp_path / "out", (1, 28, 28)).test_images()[0]) == 20


@pytest.mark.parametrize("layout", ["nhwc", "nchw", "grey", "adm"])
def test_npz_of_arrays(tmp_path, layout):
    pixels, labels = colour(12, 8), np.arange(12) % 3
    arrays = {
        "nhwc": {"images": pixels, "labels": labels},
        "nchw": {"x": pixels.transpose(0, 3, 1, 2), "y": labels[:, None]},
        "grey": {"data": pixels[..., 0], "label": labels},
        "adm": {"arr_0": pixels, "arr_1": labels},
    }[layout]
    np.savez(tmp_path / "mine.npz", **arrays)
    assert run(tmp_path / "mine.npz", tmp_path / "out") == 0
    expected = pixels[..., :1] if layout == "grey" else pixels
    x0, label = by_key(tmp_path / "out", (expected.shape[-1], 8, 8), 3)
    assert np.array_equal(x0, expected.transpose(0, 3, 1, 2)) and np.array_equal(label, labels)


def jpegs(path, pixels, labels):
    files = [jpeg(image) for image in pixels]
    data = np.frombuffer(b"".join(files), dtype=np.uint8)
    lengths = np.array([len(f) for f in files], dtype=np.uint32)
    np.savez(
        path, data=data, lengths=lengths, labels=labels.astype(np.uint8), classes=np.array(CIFAR_CLASSES)
    )
    return files


def test_npz_of_jpeg_files_is_taken_over_as_it_is(tmp_path):
    pixels, labels = colour(14), np.arange(14) % 10
    files = {split: jpegs(tmp_path / f"x-jpeg-{split}.npz", pixels, labels) for split in ("train", "test")}
    assert run(tmp_path, tmp_path / "out") == 0
    data = shards(tmp_path / "out", (3, 32, 32))
    assert list(data.class_names) == list(CIFAR_CLASSES) and len(data.test_images()[0]) == 14
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        for info in tar:
            if info.name.endswith(".jpg"):
                assert tar.extractfile(info).read() == files["train"][int(info.name[:9])]
    memory = tmp_path / "memory"
    memory.mkdir()
    for split in ("train", "test"):
        jpegs(memory / f"cifar10-jpeg-{split}.npz", pixels, labels)
    kept = CIFAR10JPEG(root=str(memory), batch_size=4, seed=0)
    assert "lossy" in kept.name
    x0, label = by_key(tmp_path / "out", (3, 32, 32), 10)
    assert torch.equal(kept.train_images()[0], x0) and torch.equal(kept.train_images()[1], label)


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


def batch(pixels, labels):
    """A batch as Python 2 pickled those of cifar-10-python.tar.gz, written opcode by opcode: Python 3 cannot."""
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), 3072)
    raw = rows.tobytes()
    head = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = (
        b"(K\x01"
        + int4(len(rows))
        + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
    )
    state += b"J\xff\xff\xff\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    keys = (
        b"\x80\x02}(U\x04data"
        + (head + state)[2:]
        + b"U\x06labels]("
        + b"".join(b"K" + bytes([k]) for k in labels)
    )
    return keys + b"eu."


def int4(value):
    return b"J" + value.to_bytes(4, "little")


def cifar(root, kind, pixels, labels):
    """A small CIFAR-10 archive: five batches of two, and one for testing."""
    end = ".bin" if kind == "binary" else ""
    inside = "cifar-10-batches-bin" if kind == "binary" else "cifar-10-batches-py"
    path = root / f"cifar-10-{kind}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for k, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
            part = slice(2 * k, 2 * k + 2)
            if kind == "binary":
                rows = pixels[part].transpose(0, 3, 1, 2).reshape(2, 3072)
                content = np.concatenate([labels[part, None].astype(np.uint8), rows], 1).tobytes()
            else:
                content = batch(pixels[part], labels[part])
            info = tarfile.TarInfo(f"{inside}/{name}{end}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar_archives(tmp_path, kind):
    pixels, labels = colour(12), np.arange(12) % 10
    path = cifar(tmp_path, kind, pixels, labels)
    bundle = read_cifar(path, "train")
    assert np.array_equal(bundle.pixels, pixels[:10]) and bundle.labels.tolist() == labels[:10].tolist()
    assert run(path, tmp_path / "out") == 0
    x0, label = by_key(tmp_path / "out", (3, 32, 32), 10)
    assert np.array_equal(x0, pixels[:10].transpose(0, 3, 1, 2)) and label.tolist() == labels[:10].tolist()


def test_the_cifar10_data_set_takes_what_lies_there(tmp_path):
    pixels, labels = colour(12), np.arange(12) % 10
    places = {name: tmp_path / name for name in ("archive", "unpacked", "shards", "folder")}
    for place in places.values():
        place.mkdir()
    path = cifar(places["archive"], "python", pixels, labels)
    with tarfile.open(path) as tar:
        tar.extractall(places["unpacked"], filter="data")
    assert run(path, places["shards"], "--in-order") == 0
    for k in range(12):
        split = "train" if k < 10 else "test"
        for name in CIFAR_CLASSES:
            (places["folder"] / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[k]).save(places["folder"] / split / CIFAR_CLASSES[labels[k]] / f"{k:02}.png")
    for name, place in places.items():
        data = CIFAR10(root=str(place), batch_size=4, seed=0)
        data.setup()
        assert data.name == "cifar10" and list(data.class_names) == list(CIFAR_CLASSES)
        x0, label = data.train_images()
        order = np.argsort(label.numpy(), kind="stable") if name == "folder" else np.arange(10)
        assert np.array_equal(
            x0.numpy()[np.argsort(order)] if name == "folder" else x0, pixels[:10].transpose(0, 3, 1, 2)
        )
        assert data.test_images()[1].tolist() == [0, 1]


def test_a_hostile_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Owned:
        def __reduce__(self):
            return os.system, ("touch owned",)

    (tmp_path / "cifar-10-batches-py").mkdir()
    for k in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (tmp_path / "cifar-10-batches-py" / k).write_bytes(pickle.dumps({b"data": Owned(), b"labels": [1]}))
    with pytest.raises(DataError, match=r"not a whole CIFAR-10.*which no CIFAR batch does"):
        read_cifar(tmp_path / "cifar-10-batches-py", "train")
    objects = pickle.dumps({b"data": np.array([b"x", None], dtype=object), b"labels": [1]}, protocol=2)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(objects)
    with pytest.raises(DataError, match="not a whole CIFAR-10"):
        read_cifar(tmp_path / "cifar-10-batches-py", "train")
    np.savez(tmp_path / "a.npz", images=np.array([Owned()], dtype=object))
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        read_npz(tmp_path / "a.npz")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_a_damaged_cifar_archive_is_one_line(tmp_path, kind):
    path = cifar(tmp_path, kind, colour(12), np.arange(12) % 10)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="not a whole CIFAR-10") as error:
        CIFAR10(root=str(tmp_path), batch_size=4, seed=0).setup()
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.needs_data
def test_the_real_jpeg_copies(data_root):
    if not (Path(data_root) / "cifar10-jpeg-train.npz").is_file():
        pytest.skip("DIFFUSION_LAB_DATA has no cifar10-jpeg-train.npz")
    data = CIFAR10JPEG(root=data_root, batch_size=4, seed=0)
    test, labels = data.test_images()
    assert test.shape == (10_000, 3, 32, 32) and torch.bincount(labels).tolist() == [1000] * 10
    # the published mean of the test images is (0.4942, 0.4851, 0.4504)
    assert torch.allclose(
        test.float().mean((0, 2, 3)) / 255, torch.tensor([0.4942, 0.4851, 0.4504]), atol=2e-3
    )


# ---- interruptions, checks, mistakes ---------------------------------------------------------------------------------


def snapshot(root):
    return {p.name: p.read_bytes() for p in root.iterdir() if not p.name.endswith(".npz")}


def test_an_interrupted_conversion_goes_on_and_ends_the_same(folder, tmp_path, monkeypatch, capsys):
    assert run(folder, tmp_path / "whole", "--per-shard", 8) == 0
    expected, out = snapshot(tmp_path / "whole"), tmp_path / "out"
    write, calls = convert._write, []

    def interrupted(path, *rest):
        calls.append(path.name)
        if len(calls) == 3:
            (path.parent / f".{path.name}.part").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        return write(path, *rest)

    monkeypatch.setattr(convert, "_write", interrupted)
    assert run(folder, out, "--per-shard", 8) == 130
    assert "the same command goes on" in capsys.readouterr().err
    with pytest.raises(DataError, match="interrupted; the same command finishes it"):
        shards(out, (3, 12, 12), 2).setup()
    assert run(out, "--verify") == 2
    kept = (out / "train-000001.tar").stat().st_mtime_ns
    assert run(folder, out, "--per-shard", 8) == 0
    assert calls == [f"train-{k:06d}.tar" for k in (0, 1, 2, 2, 3)], "finished shards are not made again"
    assert snapshot(out) == expected and (out / "train-000001.tar").stat().st_mtime_ns == kept
    assert run(folder, out, "--per-shard", 8) == 0 and len(calls) == 5


def test_shards_do_not_depend_on_threads(folder, tmp_path):
    for workers in (1, 3):
        assert run(folder, tmp_path / str(workers), "--size", 8, "--workers", workers) == 0
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "3")


def test_verify_names_what_differs(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, out, "--per-shard", 8) == 0
    path = out / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    (out / "train-000002.tar").unlink()
    with (out / "train-000003.tar").open("ab") as file:
        file.write(b"\0")
    assert run(out, "--verify") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "train-000001.tar: its SHA-256 differs" in lines[0]
    assert "missing" in lines[1] and "bytes, not" in lines[2]
    with pytest.raises(DataError, match=r"train-000002\.tar is missing"):
        shards(out, (3, 12, 12), 2).setup()


def test_unreadable_pictures_are_left_out_and_listed(folder, tmp_path, capsys):
    broken = folder / "cat" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert run(folder, tmp_path / "out", "--per-shard", 8) == 0
    assert "1 unreadable ones left out" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    split = manifest["splits"]["train"]
    assert split["samples"] == 29 and sum(shard["samples"] for shard in split["shards"]) == 29
    assert [line.split(":")[0] for shard in split["shards"] for line in shard["skipped"]] == ["3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{t}/nowhere", "{t}/out"], "nothing at"),
        (["{t}/pets"], "name the folder for the shards"),
        (["{t}/pets/cat/00.png", "{t}/out"], "it can convert"),
        (["{t}/empty", "{t}/out"], "holds no images"),
        (["{t}/pets", "{t}/taken"], "of which no manifest.json tells"),
        (["{t}/pets", "{t}/out", "--per-shard", "0"], "at least 1"),
        (["{t}/pets", "{t}/out", "--grey"], "need --size"),
        (["{t}/taken", "--verify"], "no manifest.json to compare"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a.tar").write_bytes(b"")
    assert run(*(word.format(t=tmp_path) for word in words)) == 2
    text = capsys.readouterr().err
    assert message in text and text.count("\n") == 1


def test_another_source_is_not_mixed_in_and_the_line_says_what_differs(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, out, "--per-shard", 8) == 0
    grey = ["--per-shard", 8, "--size", 8, "--grey"]
    (folder / "cat" / "00.png").rename(tmp_path / "kept.png")
    for words, expected in (
        ([], "of another source: its train split had 30 samples, this one has 29"),
        (["--per-shard", 9], "made with --per-shard 8, and not with --per-shard 9"),
        (["--per-shard", 8, "--in-order"], "made in random order, and not with --in-order"),
        (["--per-shard", 8, "--no-labels"], "made with labels, and not with --no-labels"),
        (grey, "made of pictures as they are, and not with --size 8 --resize adm --grey"),
    ):
        capsys.readouterr()
        assert run(folder, out, *words) == 2
        assert (
            capsys.readouterr().err
            == f"error: {out} holds shards {expected}: choose another folder, or remove this one\n"
        )
        if not words:
            (tmp_path / "kept.png").rename(folder / "cat" / "00.png")
    (folder / "cat" / "00.png").rename(folder / "cat" / "other.png")
    assert run(folder, out, "--per-shard", 8) == 2
    assert "the files of its train split had other names or sizes" in capsys.readouterr().err
    np.savez(tmp_path / "a.npz", images=colour(3, 8))
    assert run(tmp_path / "a.npz", out, "--per-shard", 8) == 2
    assert "folder of pictures and not npz of arrays" in capsys.readouterr().err


def test_two_conversions_into_one_folder_are_refused_until_the_first_is_gone(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    other = holding(out / ".lock")
    try:
        assert run(folder, out) == 2
        assert capsys.readouterr().err == (
            f"error: {out} is being written by process 7 on here: wait until that has ended, or stop it\n"
        )
        assert [p.name for p in out.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.communicate(timeout=30)
    # the file that it left behind blocks nobody, and goes
    assert run(folder, out) == 0 and not (out / ".lock").exists()


def test_a_claim_on_a_file_that_its_holder_removed_is_none(tmp_path, monkeypatch):
    """Between opening and locking the holder may end, and remove the file: whoever comes next would lock a new one."""
    path, locked = tmp_path / ".lock", claims._locked

    def slow(handle):
        if not removed:
            removed.append(path.unlink())
        return locked(handle)

    removed = []
    monkeypatch.setattr(claims, "_locked", slow)
    with claims.claim(path, remove=True) as held:
        assert held and removed and path.exists()
    assert not path.exists()


def closing(text):
    """The command that `convert` prints, as a shell would part it."""
    line = next(line for line in text.splitlines() if line.startswith("use it"))
    words = shlex.split(line.removeprefix("use it  ").partition("    (")[0])
    assert words[:3] == ["python", "train.py", "dataset=shards"]
    return words[2:]


def test_the_command_at_the_end_trains(folder, tmp_path, capsys):
    out = tmp_path / "my shards, 2025"
    assert run(folder, out, "--size", 8, "--grey") == 0
    words = closing(capsys.readouterr().out)
    assert words[1:] == [f"dataset.root='{out}'", "shape=[1,8,8]", "num_classes=2", "model=unet_tiny"]
    ran = train(tmp_path / "runs", *words, "dataset.num_workers=0", max_images=32)
    assert (ran / "record.json").is_file()


def test_the_command_at_the_end_tells_the_shape(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "a") == 0
    assert closing(capsys.readouterr().out)[2:] == ["shape=[3,12,12]", "num_classes=2", "model=uvit_tiny"]
    np.savez(tmp_path / "grey.npz", data=colour(6, 8)[..., 0], labels=np.arange(6) % 3)
    assert run(tmp_path / "grey.npz", tmp_path / "b") == 0
    assert closing(capsys.readouterr().out)[2:] == ["shape=[1,8,8]", "num_classes=3", "model=unet_tiny"]
    Image.fromarray(colour(1, 40)[0][:21]).save(folder / "cat" / "00.png")
    (folder / "cat" / "01.png").write_bytes(b"none")
    assert run(folder, tmp_path / "c", "--no-labels") == 0
    text = capsys.readouterr().out
    assert closing(text)[2:] == ["shape=[3,8,8]", "num_classes=0", "model=unet_tiny"]
    assert "any other side too" in text
    assert run(folder, tmp_path / "d", "--size", 30) == 0
    assert closing(capsys.readouterr().out)[2:] == ["shape=[3,28,28]", "num_classes=2", "model=unet_mnist"]


def test_a_manifest_that_lies_is_one_line(folder, tmp_path):
    out = tmp_path / "out"
    assert run(folder, out) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = "../../etc/passwd"
    for text in (json.dumps(manifest), "{", '{"format": "diffusion_lab shards 1", "splits": 3}'):
        (out / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=r"manifest\.json is damaged") as error:
            shards(out, (3, 12, 12), 2).setup()
        assert "\n" not in str(error.value)


def test_sources_are_asked_by_number(folder):
    source = open_source(folder)
    assert source.kind == "folder of pictures" and list(source.classes) == ["cat", "dog"]
    extension, content, label = source.splits["train"].sample(20)
    assert (extension, label) == ("png", 1) and content == (folder / "dog" / "20.png").read_bytes()


@pytest.mark.slow
def test_the_command_line(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_lab.data.convert", str(folder), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dataset=shards" in done.stdout and "num_classes=2" in done.stdout


def test_a_misspelt_option_is_one_line_with_the_nearest(tmp_path, capsys):
    assert convert.main([str(tmp_path), "--verfy"]) == 2
    error = capsys.readouterr().err
    assert error == "error: unrecognized arguments: --verfy; did you mean --verify?\n"
    assert convert.main([]) == 2
    assert capsys.readouterr().err.endswith("source; see --help\n")

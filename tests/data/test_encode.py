"""Latents: encoded once, by whom is known, the same after an interruption; and decoded to images."""

import json
import shutil

import numpy as np
import pytest
import torch

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

from tiny_runs import holding, images_of, main, train

from diffusion_lab.app import latents as latents_app
from diffusion_lab.app.latents import decode_command, encode_command
from diffusion_lab.app.sampling.parts import to_array
from diffusion_lab.data import autoencoder as loading
from diffusion_lab.data import encode as encoding
from diffusion_lab.data.digits import Digits
from diffusion_lab.data.encode import Recipe, encode, moments
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.latents import Latents
from diffusion_lab.images import to_float, to_uint8, visible
from diffusion_lab.rng import derive_seed

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny AutoencoderKL with weights of any value."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            sample_size=8,
            mid_block_add_attention=False,
        )
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny(folder):
    return loading.load_autoencoder(str(folder))


def digits(size=8):
    return Digits(size=size, batch_size=16, seed=0)


def arrays(out):
    return {path.name: np.load(path) for path in sorted(out.glob("*.npy"))}


@pytest.fixture(scope="module")
def encoded(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "own"
    return out, encode(digits(), tiny, out, Recipe(), batch_size=100)


def test_row_k_is_the_posterior_mean_of_image_k(tiny, encoded):
    out, manifest = encoded
    found = arrays(out)
    assert {p.name for p in out.iterdir()} == {*found, "latents.json"} and len(found) == 4
    for split, images, labels in (("train", *digits().train_images()), ("test", *digits().test_images())):
        whole = found[f"{split}-x0.npy"]
        assert whole.shape == (len(images), 4, 4, 4) and whole.dtype == np.float16
        some = [0, 7, 101, len(images) - 1]
        x = to_float(images[some]).expand(-1, 3, -1, -1)
        with torch.no_grad():
            expected = tiny.module.encode(x).latent_dist.mean
        assert np.allclose(whole[some], expected.numpy(), rtol=1e-3, atol=1e-3)
        assert np.array_equal(found[f"{split}-label.npy"], labels.numpy())
    assert (
        manifest["autoencoder"]["sha256"] == tiny.sha256
        and manifest["autoencoder"]["scaling_factor"] == 0.18215
    )
    assert manifest["data"]["n"] == {"train": 1437, "test": 360}


def test_what_is_read_back_has_zero_mean_and_unit_variance(encoded):
    out, manifest = encoded
    data = Latents(
        root=str(out), shape=(4, 4, 4), num_classes=10, shift=manifest["shift"], scale=manifest["scale"],
        batch_size=4, seed=0,
    )  # fmt: skip
    x0, label = data.train_images()
    assert x0.double().mean((0, 2, 3)).abs().max() < 1e-3
    assert (x0.double().std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.equal(label, digits().train_images()[1])
    mean, std = moments(np.arange(24, dtype=np.float16).reshape(2, 3, 2, 2))
    assert mean == [7.5, 11.5, 15.5] and np.allclose(std, np.arange(24).reshape(2, 3, 4)[:, 0].std())


@pytest.mark.parametrize("latent", ["mean", "sample"])
def test_interrupted_and_resumed_is_the_same_bitwise(tiny, tmp_path, latent, monkeypatch):
    recipe = Recipe(latent=latent, mirror=True, dtype="float32")
    whole = tmp_path / "whole"
    encode(digits(), tiny, whole, recipe, batch_size=200)
    broken, calls, through = tmp_path / "broken", [0], tiny.encode

    def stops(images, noise=None):
        calls[0] += 1
        # within the mirrored half of the training images, and again within the test images
        if calls[0] in (11, 21):
            raise KeyboardInterrupt
        return through(images, noise)

    monkeypatch.setattr(tiny, "encode", stops)
    for done in ({"train": 1800, "test": 0}, {"train": 2874, "test": 200}):
        with pytest.raises(KeyboardInterrupt):
            encode(digits(), tiny, broken, recipe, batch_size=200)
        assert json.loads((broken / encoding.STATE).read_text())["done"] == done
    encode(digits(), tiny, broken, recipe, batch_size=200)
    monkeypatch.undo()
    mine, theirs = arrays(broken), arrays(whole)
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)
    x0 = theirs["train-x0.npy"]
    assert len(x0) == 2 * 1437 and len(theirs["test-x0.npy"]) == 360
    flipped = to_float(digits().train_images()[0][5:6].flip(-1))
    if latent == "mean":
        assert np.allclose(x0[1437 + 5], tiny.encode(flipped)[0].numpy(), rtol=1e-4, atol=1e-5)
    else:
        posterior = tiny.module.encode(flipped.expand(-1, 3, -1, -1)).latent_dist
        key = derive_seed("latents", 0, "train", 1437 + 5)
        noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(key))
        expected = posterior.mean + posterior.std * noise
        assert np.allclose(x0[1437 + 5], expected[0].numpy(), rtol=1e-4, atol=1e-5)
        again = tmp_path / "again"
        encode(digits(), tiny, again, Recipe(latent="sample", seed=1, dtype="float32"), batch_size=200)
        assert not np.allclose(arrays(again)["test-x0.npy"], theirs["test-x0.npy"], atol=1e-3)


class Spoilt(Digits):
    """Digits of which two cannot be read: the next one stands in for them, as in shards."""

    BAD = (30, 1001)

    def source(self, split):
        source = super().source(split)
        read = source.read

        def replaced(indices):
            bad = [k for k in indices if split == "train" and k in self.BAD]
            source.skipped = [f"train-000000.tar: '{k}': broken" for k in bad]
            return read(np.array([k + 1 if k in bad else k for k in indices]))

        source.read = replaced
        self.noted = {**getattr(self, "noted", {}), split: []}
        source.note = self.noted[split].extend
        return source


def test_what_cannot_be_read_is_counted_and_named(tiny, tmp_path, monkeypatch, capsys):
    data, out, calls, through = Spoilt(batch_size=16, seed=0), tmp_path / "out", [0], tiny.encode

    def stops(images, noise=None):
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return through(images, noise)

    monkeypatch.setattr(tiny, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        encode(data, tiny, out, Recipe(mirror=True), batch_size=300)
    assert json.loads((out / encoding.STATE).read_text())["skipped"] == {
        "train": ["train-000000.tar: '30': broken"]
    }
    manifest = encode(data, tiny, out, Recipe(mirror=True), batch_size=300)
    lines = [f"train-000000.tar: '{k}': broken" for k in data.BAD]
    assert (
        manifest["skipped"] == {"train": lines} == json.loads((out / "latents.json").read_text())["skipped"]
    )
    x0 = np.load(out / "train-x0.npy")
    assert np.allclose(x0[30], x0[31], atol=1e-2) and not np.allclose(x0[30], x0[32], atol=1e-2)
    latents_app._show(manifest, out)
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "unreadable 2 of train; in their rows the next readable ones come twice: train-000000.tar: '30'"
        in text
    )
    assert latents_app.unreadable({"train": ["a"] * 9}).endswith("a; a; a; ... (all in latents.json)")


def test_what_workers_met_is_added_up_here(tiny, tmp_path, monkeypatch):
    """Each worker counts only its own towards `max_corrupt`."""
    data = Spoilt(batch_size=16, seed=0)
    encode(data, tiny, tmp_path, Recipe(), batch_size=500)
    assert data.noted == {"train": [f"train-000000.tar: '{k}': broken" for k in data.BAD], "test": []}


def test_two_jobs_in_one_folder_are_refused(tiny, tmp_path, encoded):
    (tmp_path / "out").mkdir()
    other = holding(tmp_path / "out" / ".lock")
    try:
        with pytest.raises(DataError, match=r"out is being written by process 7 on here: wait"):
            encode(digits(), tiny, tmp_path / "out", Recipe())
    finally:
        other.kill()
        other.communicate(timeout=30)
    # what is finished is only read: no claim on a folder that may not be one's own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "alone", lambda out: pytest.fail("claimed"))
        assert encode(digits(), tiny, encoded[0], Recipe()) == encoded[1]


def test_other_settings_and_other_files_are_refused(tiny, encoded, tmp_path, folder):
    out, manifest = encoded
    assert encode(digits(), tiny, out, Recipe()) == manifest
    with pytest.raises(DataError, match="latents of another recipe are there"):
        encode(digits(), tiny, out, Recipe(mirror=True))
    with pytest.raises(DataError, match="latents of another data set are there"):
        encode(digits(16), tiny, out, Recipe())
    model = diffusers.AutoencoderKL.from_pretrained(folder)
    model.quant_conv.bias.data += 1.0
    with pytest.raises(DataError, match="latents of another autoencoder are there"):
        encode(digits(), loading.Autoencoder(model, "other"), out, Recipe())
    np.save(tmp_path / "train-x0.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"train-x0.npy is there, and no latents.json"):
        encode(digits(), tiny, tmp_path, Recipe())
    latents = Latents(
        root=str(out), shape=(4, 4, 4), num_classes=0, shift=(0.0,), scale=(1.0,), batch_size=4, seed=0
    )
    with pytest.raises(DataError, match="holds latents already"):
        encode(latents, tiny, tmp_path / "n", Recipe())


def test_what_is_no_autoencoder_is_one_line(folder, tmp_path, monkeypatch):
    load = loading.load_autoencoder
    with pytest.raises(DataError, match=r"^autoencoder=/nowhere: no such folder$"):
        load("/nowhere")
    other = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    other.save_pretrained(tmp_path / "unet")
    with pytest.raises(DataError, match=r"an AutoencoderKL is needed, this is a UNet2DModel$"):
        load(str(tmp_path / "unet"))
    with pytest.raises(DataError) as caught:
        (tmp_path / "empty").mkdir()
        load(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    assert load(str(tmp_path / "pipeline")).sha256 == load(str(folder)).sha256
    from safetensors.torch import load_file, save_file

    file = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "quant_conv" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="lacks 4 of the model's weights"):
        load(str(tmp_path / "pipeline"))
    with pytest.raises(DataError, match=r"it shrinks sides by 2, which \(3, 9, 8\) does not divide by"):
        load(str(folder)).check((3, 9, 8))
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(DataError, match=r"needs diffusers: pip install 'diffusion_lab\[latents\]'$"):
        load(str(folder))


def test_the_hub_is_asked_three_times_and_then_one_line_says_so(folder, monkeypatch):
    import importlib

    import huggingface_hub
    import huggingface_hub.errors as errors

    try:
        http = importlib.import_module("httpx2")
    except ModuleNotFoundError:
        http = importlib.import_module("httpx")
    asked, loads, answer = [], [], http.ConnectError("[Errno -2] Name or service not known\nand more")

    def model_info(self, name, timeout):
        asked.append(timeout)
        if isinstance(answer, Exception):
            raise answer

    def load_config(name, **where):
        loads.append(where)
        if where.get("local_files_only"):
            raise OSError("not in the cache")
        return {"_class_name": "AutoencoderKL"}

    def from_pretrained(name, **where):
        raise http.ReadError("connection reset")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", load_config)
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading, "WAIT_S", 0.0)

    def line():
        with pytest.raises(DataError) as caught:
            loading.load_autoencoder("some/vae", subfolder="vae")
        return str(caught.value)

    assert line() == (
        "autoencoder=some/vae: not in the hub's cache, and the Hugging Face hub cannot be reached "
        "([Errno -2] Name or service not known); a folder will do: autoencoder=<folder>"
    )
    assert asked == [10.0] * 3 and loads == [{"subfolder": "vae", "local_files_only": True}]
    missing = http.Response(404, request=http.Request("GET", "https://huggingface.co"))
    answer = errors.RepositoryNotFoundError("404", response=missing)
    assert "the Hugging Face hub shows no such model" in line() and len(asked) == 4
    answer = errors.OfflineModeIsEnabled("offline")
    assert "HF_HUB_OFFLINE is set" in line() and len(asked) == 5
    answer = None
    assert (
        "the download failed (connection reset); the same command tries again" in line() and len(asked) == 6
    )
    # what is in the cache is taken from there, and a folder is none of the hub's business
    monkeypatch.undo()
    module, told = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    monkeypatch.setattr(loading, "_read", lambda kind, name, where: loads.append(where) or (module, told))
    monkeypatch.setattr(loading, "_ask_hub", lambda name: pytest.fail("asked"))
    loading.load_autoencoder("some/vae")
    loading.load_autoencoder(str(folder))
    assert loads[-2:] == [{"local_files_only": True}, {}]


def test_images_to_latents_to_a_run_to_samples_to_images(folder, tmp_path, capsys):
    out = tmp_path / "latents"
    assert encode_command([f"autoencoder={folder}", f"out={out}", "dataset=digits", "batch_size=300"]) == 0
    printed = capsys.readouterr().out
    words = next(line for line in printed.splitlines() if "train.py" in line).split("train.py ")[1].split()
    assert words[:2] == ["dataset=latents", f"dataset.root={out}"]
    run = train(tmp_path / "runs", *[w.strip("'") for w in words], "dataset.num_workers=0", max_images=32)
    assert main("sample", f"run={run}", "num_samples=12", f"out={tmp_path}/drawn", "grid.steps=1") == 0
    latents, labels = images_of(tmp_path / "drawn")
    assert latents.dtype == np.float32 and latents.shape == (12, 4, 4, 4)
    assert (tmp_path / "drawn" / "grid.png").is_file()
    capsys.readouterr()

    assert decode_command([str(tmp_path / "drawn")]) == 0
    images, again = images_of(tmp_path / "drawn" / "decoded")
    assert images.dtype == np.uint8 and images.shape == (12, 8, 8, 3) and np.array_equal(labels, again)
    manifest = json.loads((out / "latents.json").read_text())
    shift, scale = (torch.tensor(manifest[key])[:, None, None] for key in ("shift", "scale"))
    vae = diffusers.AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        expected = to_uint8(vae.decode(torch.from_numpy(latents) / scale + shift).sample)
    assert np.abs(images.astype(int) - expected.permute(0, 2, 3, 1).numpy().astype(int)).max() <= 1
    assert decode_command([str(tmp_path / "drawn")]) == 2
    assert main("evaluate", f"run={run}", "num_samples=12") == 2
    assert "decode them" in capsys.readouterr().err


def test_samples_that_are_latents_are_kept_as_they_are():
    x = torch.linspace(-5, 5, 4 * 2 * 2).view(1, 4, 2, 2)
    assert np.array_equal(to_array(x, pixels=False), x.numpy()) and to_array(x).dtype == np.uint8
    shown = visible(x)
    assert (
        shown.shape == (1, 3, 2, 2)
        and shown.flatten()[0] == 0
        and shown.flatten()[7] == to_uint8(x.flatten()[7] / 3)
    )


@pytest.mark.parametrize(
    "words, line",
    [
        (["dataset=digits", "out=x"], "autoencoder=... is needed; --help says more"),
        (["autoencoder=x", "out=x"], "dataset=<option> is needed; --help says more"),
        (
            ["autoencoder=x", "out=x", "dataset=digit"],
            "dataset=digit: no option 'digit' in group 'dataset'; did you mean",
        ),
        (
            ["autoencoder=x", "out=x", "dataset=digits", "miror=true"],
            "miror=true: no such setting; did you mean 'mirror'?",
        ),
        (["autoencoder=x", "out=x", "dataset=digits", "dataset.sise=8"], "dataset.sise=8: no key"),
        (["autoencoder=x", "out=x", "dataset=image_folder"], "dataset.root=... is needed"),
        (["autoencoder=x", "out=x", "dataset=digits", "latent=men"], "latent=men: mean or sample is meant"),
        (["autoencoder=/x/y", "out=x", "dataset=digits"], "autoencoder=/x/y: no such folder"),
        (["autoencoder=x", "out=x", "dataset=digits", "precision=16"], "precision=16; there are"),
    ],
)
def test_mistakes_of_the_command_line_are_one_line(words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert encode_command(words) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {line}") and text.count("\n") == 1, text
    assert not list(tmp_path.iterdir())


def test_decoding_says_what_it_misses(tmp_path, capsys):
    np.savez(tmp_path / "samples.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.zeros(2))
    for words, line in (
        ([str(tmp_path)], "these samples are no latents"),
        ([str(tmp_path / "none")], "no samples of sample.py there"),
        ([str(tmp_path), "autoencodr=x"], "did you mean 'autoencoder'?"),
    ):
        assert decode_command(words) == 2
        assert line in capsys.readouterr().err

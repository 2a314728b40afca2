"""DINOv2 and CLIP of random weights: what transformers' own pipeline gives, and every way in which there are none."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from diffusion_lab.metrics import vision_transformers
from diffusion_lab.metrics.features import FeatureExtractor
from diffusion_lab.metrics.vision_transformers import CLIP, DINOv2, interpolated, resize

transformers = pytest.importorskip("transformers")


def dinov2_of(folder, image_size):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=image_size, patch_size=14,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Dinov2Model(config)
        network.embeddings.position_embeddings.data.normal_(std=0.5)
        network.embeddings.cls_token.data.normal_()
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    return dinov2_of(tmp_path_factory.mktemp("dinov2"), 224)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower["initializer_factor"] = 4.0
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPConfig(
        vision_config={**tower, "image_size": 56, "patch_size": 14, "projection_dim": 12},
        text_config={**tower, "vocab_size": 20, "projection_dim": 12, "max_position_embeddings": 8},
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CLIPModel(config)
        network.visual_projection.weight.data.normal_()
    network.save_pretrained(folder)  # with the text encoder, as on the hub
    return folder


def pictures(height, width, n=3, channels=3):
    rng = torch.Generator().manual_seed(height)
    coarse = torch.rand(n, channels, 5, 5, generator=rng)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (255 * (0.8 * smooth + 0.2 * torch.rand(n, channels, height, width, generator=rng))).to(
        torch.uint8
    )


def pillows(images):
    return [Image.fromarray(np.moveaxis(image.numpy(), 0, -1)) for image in images]


@pytest.mark.parametrize("shape", [(32, 32), (260, 300), (224, 224)])
def test_dinov2_is_the_pipeline_of_transformers(dinov2_folder, shape):
    """With the processor told to resize to 224x224 as dgm-eval does."""
    from transformers import BitImageProcessorPil, Dinov2Model

    ours, images = DINOv2(model=dinov2_folder), pictures(*shape)
    assert isinstance(ours, FeatureExtractor) and (ours.name, ours.dim) == ("dinov2-32", 32)
    weights = (dinov2_folder / "model.safetensors").read_bytes()
    assert ours.sha256 == hashlib.sha256(weights).hexdigest()
    features = ours(images)
    assert features.shape == (3, 32) and features.dtype == torch.float32
    processor = BitImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, resample=Image.BICUBIC,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    with torch.no_grad():
        pixels = processor(images=pillows(images), return_tensors="pt")["pixel_values"]
        truth = Dinov2Model.from_pretrained(dinov2_folder).eval()(pixels).last_hidden_state[:, 0]
    bilinear = F.interpolate(images.float(), size=(224, 224), mode="bilinear", antialias=True)
    assert_same(features, truth, ours(bilinear.round().to(torch.uint8)), resized=shape != (224, 224))


def assert_same(found, truth, otherwise, *, resized):
    """Equal; a resize may differ by a level in a pixel of ten thousand, but not as another resize does."""
    if resized:
        assert (found - truth).abs().max() < 0.02 * (otherwise - truth).abs().max()
    else:
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 32), (90, 70), (40, 75), (56, 56)])
def test_clip_is_the_pipeline_of_transformers(clip_folder, shape):
    from transformers import CLIPImageProcessorPil, CLIPModel

    ours, images = CLIP(model=clip_folder), pictures(*shape)
    assert (ours.name, ours.dim, ours.side) == ("clip-vit-32-patch14-56", 12, 56)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    with torch.no_grad():
        network = CLIPModel.from_pretrained(clip_folder).eval()
        truth = network.visual_projection(
            network.vision_model(
                processor(images=pillows(images), return_tensors="pt")["pixel_values"]
            ).pooler_output
        )
    features = ours(images)
    bilinear = F.interpolate(images[:, :, : min(shape), : min(shape)].float(), size=(56, 56), mode="bilinear")
    truth = truth / truth.norm(dim=1, keepdim=True)
    assert_same(features, truth, ours(bilinear.round().to(torch.uint8)), resized=shape != (56, 56))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("shape", [(30, 41), (32, 32), (260, 500), (512, 512)])
def test_the_resize_is_that_of_pillow(shape):
    """Shapes of which every version of Pillow takes the rows first."""
    images = pictures(*shape, n=2)
    truth = np.stack([np.asarray(x.resize((224, 224), Image.BICUBIC)) for x in pillows(images)])
    found = resize(images, (224, 224)).permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(int) - truth.astype(int)).max() <= 1 and (found != truth).mean() < 1e-3
    assert torch.equal(resize(images, shape), images)


def test_position_embeddings_are_interpolated_as_by_their_authors(tmp_path):
    """16.1/37 of the original, not 16/37 of transformers; one number of it by hand."""
    positions = torch.zeros(1, 1 + 37 * 37, 1)
    positions[0, 0] = 5.0
    positions[0, 1:, 0] = (torch.arange(37.0) ** 2).repeat(37)  # the square of the column

    def cubic(column, a=-0.75):
        first, t = divmod(column, 1)
        near = [((a + 2) * u - (a + 3)) * u * u + 1 for u in (t, 1 - t)]
        far = [((u - 5) * u + 8) * u * a - 4 * a for u in (1 + t, 2 - t)]
        squares = [(first + k) ** 2 for k in (-1, 0, 1, 2)]
        return sum(w * x for w, x in zip((far[0], *near, far[1]), squares, strict=True))

    made = interpolated(positions, 16)
    assert made.shape == (1, 257, 1) and made[0, 0] == 5.0
    assert made[0, 1 + 16 * 4 + 7, 0].item() == pytest.approx(cubic((7 + 0.5) * 37 / 16.1 - 0.5), rel=1e-5)
    assert made[0, 1 + 16 * 4 + 7, 0].item() != pytest.approx(cubic((7 + 0.5) * 37 / 16 - 0.5), rel=1e-3)

    network = DINOv2(model=dinov2_of(tmp_path, 518)).network
    trained = transformers.Dinov2Model.from_pretrained(tmp_path).embeddings
    kept = network.embeddings.position_embeddings
    assert torch.equal(kept, interpolated(trained.position_embeddings, 16))
    theirs = trained.interpolate_pos_encoding(torch.zeros(1, 257, 32), 224, 224)
    assert (kept - theirs).abs().max() > 0.01
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network.embeddings.interpolate_pos_encoding(torch.zeros(1, 257, 32), 224, 224), kept)
    assert network(pixels).last_hidden_state.shape == (1, 257, 32)


def test_the_resize_of_edm2_does_not_round(dinov2_folder):
    images = pictures(40, 40)
    rounded, floats = DINOv2(model=dinov2_folder), DINOv2(model=dinov2_folder, rounded=False)
    assert (rounded.resize, floats.resize) == ("bicubic 224", "bicubic 224, not rounded")
    pixels = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (rounded.mean, rounded.std))
    truth = floats.network((pixels - mean) / std).pooler_output
    torch.testing.assert_close(floats(images), truth, rtol=1e-5, atol=1e-5)
    assert (rounded(images) - truth).abs().max() > 1e-3


def test_grey_images_are_repeated_and_only_bytes_pass(dinov2_folder, clip_folder):
    for ours in (DINOv2(model=dinov2_folder), CLIP(model=clip_folder)):
        grey = pictures(28, 28, n=2, channels=1)
        torch.testing.assert_close(ours(grey), ours(grey.repeat(1, 3, 1, 1)), rtol=1e-5, atol=1e-6)
        with pytest.raises(TypeError, match="uint8"):
            ours(grey.float())
        with pytest.raises(ValueError, match="takes images"):
            ours(grey.repeat(1, 2, 1, 1))


def test_a_pickled_file_of_tensors_is_read_too(dinov2_folder, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
    torch.save(load_file(dinov2_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    images = pictures(28, 28)
    ours = DINOv2(model=tmp_path)
    torch.testing.assert_close(ours(images), DINOv2(model=dinov2_folder)(images))
    assert ours.sha256 == hashlib.sha256((tmp_path / "pytorch_model.bin").read_bytes()).hexdigest()


def test_what_is_no_such_model_is_one_clear_line(dinov2_folder, clip_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    def message(kind, *of, model):
        with pytest.raises(of) as caught:
            kind(model=model)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds a clip model, not dinov2" in message(DINOv2, ValueError, model=clip_folder)
    assert "holds a dinov2 model, not clip" in message(CLIP, ValueError, model=dinov2_folder)
    assert "neither model.safetensors nor" in message(CLIP, FileNotFoundError, model=tmp_path)
    state = load_file(dinov2_folder / "model.safetensors")
    dropped = state.pop("layernorm.weight")
    assert dropped.shape == (32,)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "no config.json" in message(DINOv2, ValueError, model=tmp_path)
    (tmp_path / "config.json").write_bytes((dinov2_folder / "config.json").read_bytes())
    assert "lacks 1 weights of dinov2, such as layernorm.weight" in message(
        DINOv2, ValueError, model=tmp_path
    )
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert "does not hold a dinov2 model" in message(DINOv2, ValueError, model=tmp_path)


def test_without_a_network_the_message_says_what_and_where(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def fails(name, file, *, local_files_only):
        asked.append((file, local_files_only))
        raise LocalEntryNotFoundError("not in the cache")

    def unreachable(self, name, *, timeout):
        asked.append((name, timeout))
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    for kind, name, size in ((DINOv2, "facebook/dinov2-large", "1.2 GB"), (CLIP, None, "1.7 GB")):
        with pytest.raises(FileNotFoundError) as caught:
            kind(**({} if name is None else {"model": name}))
        for part in (
            name or "openai/clip-vit-large-patch14-336",
            size,
            "hf download",
            "https://huggingface.co/",
            "no route",
            "then metrics.model=<that folder>",
        ):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    # the cache, then one question; no download, which would try for half a minute and tell each try
    assert [how for _, how in asked] == [True, True, vision_transformers.TIMEOUT_S] * 2
    with pytest.raises(FileNotFoundError, match=r"no folder \./nowhere"):
        DINOv2(model="./nowhere")


def test_what_the_hub_gives_is_used(monkeypatch, dinov2_folder, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def gives(name, file, *, local_files_only):
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        return str(dinov2_folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gives)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, *, timeout: None)
    assert DINOv2(model="some/one").sha256 == DINOv2(model=dinov2_folder).sha256


def test_without_transformers_the_message_says_how_to_get_it(monkeypatch, dinov2_folder):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'diffusion_lab\[features\]'"):
        DINOv2(model=dinov2_folder)


def test_names_are_those_of_the_hub():
    names = [vision_transformers.word(width) for width in (384, 768, 1024, 1280, 1536, 32)]
    assert names == ["small", "base", "large", "huge", "giant", "32"]

r"""Features of DINOv2 and CLIP, through `transformers`: for FD-DINOv2 and CMMD.

    bytes --resize, as bytes--> bytes --normalise--> network --> features

DINOv2's are the class token after the last norm, of images resized to 224x224 whatever their shape; CLIP's are the
image embeddings of unit length, of images whose shorter side is resized to the network's and that are then cropped in
the middle. Both resizes are Pillow's, bicubic with antialiasing and rounded to bytes, as for the published numbers; a
resize of floats, or without antialiasing, gives other, incomparable ones.

DINOv2 was trained at 518x518: its position embeddings, 37x37, are interpolated to 16x16. The original code does so with
a scale of 16.1/37, `transformers` with 16/37. FD-DINOv2 is defined by the original, so its embeddings are interpolated
here in its way, once.

The weights are a folder as `save_pretrained` writes them, or a name on the Hugging Face hub, then downloaded to its
cache. The identity of the features is the SHA-256 of the weights file.

References:
    Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023.
    Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024 (EDM2; resizes floats).
    Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion
    models", 2023 (FD-DINOv2; ViT-L/14, resize and features as in dgm-eval).
    Jayasumana et al., "Rethinking FID", 2024 (CMMD; CLIP ViT-L/14 at 336).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""A folder holds one of them; the first that is there is read."""

TIMEOUT_S = 10.0
HUB_NAME = "facebook/dinov2-large"
SIZES = {
    "facebook/dinov2-small": "88 MB",
    "facebook/dinov2-base": "346 MB",
    "facebook/dinov2-large": "1.2 GB",
    "facebook/dinov2-giant": "4.5 GB",
    "openai/clip-vit-large-patch14-336": "1.7 GB",
    "openai/clip-vit-large-patch14": "1.7 GB",
    "openai/clip-vit-base-patch32": "605 MB",
}
WORDS = {384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}


class VisionTransformer(nn.Module):
    """What both networks share.

    Args:
        model: A folder with `config.json` and the weights, or a name on the hub.
        kind: The `model_type` that the folder must be of.

    Raises:
        ModuleNotFoundError: If `transformers` is not installed.
        FileNotFoundError: If there are no weights and they cannot be had.
        ValueError: If the folder holds another model, or not all of its weights.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    side: int

    def __init__(self, model: str | Path, kind: str) -> None:
        super().__init__()
        weights = weights_file(model)
        self.network = self._load(weights.parent, kind)
        self.sha256 = sha256_of(weights)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features `(N, dim)`, float32, of uint8 `(N, C, H, W)`; grey images (C = 1) are repeated.

        Raises:
            TypeError: If the images are not uint8.
            ValueError: On another shape.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"{self.name} takes uint8 images, not {images.dtype}")
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"{self.name} takes images (N, 3, H, W) or (N, 1, H, W), not {tuple(images.shape)}"
            )
        mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (self.mean, self.std))
        with torch.no_grad():
            pixels = self._resized(images).float() / 255
            return self._features((pixels.expand(-1, 3, -1, -1) - mean) / std)

    def _resized(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _features(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def _load(self, folder: Path, kind: str) -> Any:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} holds no config.json of a {kind} model: {first_line(error)}"
            ) from error
        if config.model_type != kind and config.model_type != f"{kind}_vision_model":
            raise ValueError(f"{folder} holds a {config.model_type} model, not {kind}")
        try:
            with quiet():
                network, info = self._class().from_pretrained(
                    folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
                )
        except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
            raise ValueError(f"{folder} does not hold a {kind} model: {first_line(error)}") from error
        if info["missing_keys"]:
            # transformers would go on with random numbers in their place
            raise ValueError(
                f"{folder} lacks {len(info['missing_keys'])} weights of {kind}, such as {min(info['missing_keys'])}"
            )
        return network

    def _class(self) -> Any:
        raise NotImplementedError


class DINOv2(VisionTransformer):
    """The class token of DINOv2, the features of FD-DINOv2.

    Args:
        model: A folder, or a name on the hub; ViT-L/14 is what FD-DINOv2 means.
        rounded: Round to bytes after the resize, as dgm-eval does; EDM2's code by default does not.

    Raises:
        ModuleNotFoundError: If `transformers` is not installed.
        FileNotFoundError: If there are no weights and they cannot be had.
        ValueError: If the folder holds another model, or not all of its weights.
    """

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    side = 224

    def __init__(self, *, model: str | Path = HUB_NAME, rounded: bool = True) -> None:
        super().__init__(model, "dinov2")
        config = self.network.config
        self.name = f"dinov2-{word(config.hidden_size)}"
        self.dim: int | None = config.hidden_size
        self.rounded = rounded
        self.resize = f"bicubic {self.side}" + ("" if rounded else ", not rounded")
        embeddings = self.network.embeddings
        embeddings.position_embeddings = nn.Parameter(
            interpolated(embeddings.position_embeddings, self.side // config.patch_size), requires_grad=False
        )

    def _class(self) -> Any:
        from transformers import Dinov2Model

        return Dinov2Model

    def _resized(self, images: Tensor) -> Tensor:
        size = (self.side, self.side)
        if self.rounded:
            return resize(images, size)
        return F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.network(pixels).pooler_output


class CLIP(VisionTransformer):
    """The image embedding of CLIP, of unit length: the features of CMMD.

    Args:
        model: A folder, or a name on the hub; ViT-L/14 at 336 is what CMMD means.

    Raises:
        ModuleNotFoundError: If `transformers` is not installed.
        FileNotFoundError: If there are no weights and they cannot be had.
        ValueError: If the folder holds another model, or not all of its weights.
    """

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, *, model: str | Path = "openai/clip-vit-large-patch14-336") -> None:
        super().__init__(model, "clip")
        config = self.network.config
        self.side = config.image_size
        side = "" if self.side == 224 else f"-{self.side}"
        self.name = f"clip-vit-{word(config.hidden_size)}-patch{config.patch_size}{side}"
        self.dim: int | None = config.projection_dim
        self.resize = f"bicubic {self.side}"

    def _class(self) -> Any:
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection

    def _resized(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        shorter = min(height, width)
        images = resize(images, (self.side * height // shorter, self.side * width // shorter))
        top, left = (images.shape[-2] - self.side) // 2, (images.shape[-1] - self.side) // 2
        return images[..., top : top + self.side, left : left + self.side]

    def _features(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.network(pixels).image_embeds, dim=1)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return bytes `(N, C, H, W)` resized as Pillow does: bicubic, antialiased, along each row, then each column.

    Pillow rounds to bytes after either pass. Libraries that do both at once differ from it by a level or two, and
    Pillow differs from itself since version 13, which takes the columns first where heights shrink more than widths.
    """
    x = images.float()
    for target in ((images.shape[-2], size[1]), size):
        if tuple(x.shape[-2:]) != target:
            x = F.interpolate(x, size=target, mode="bicubic", antialias=True, align_corners=False)
            x = (x + 0.5).floor().clamp(0, 255)
    return x.to(torch.uint8)


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Return DINOv2's position embeddings `(1, 1 + n n, d)` for `side` x `side` patches, as its own code does."""
    trained = round((positions.shape[1] - 1) ** 0.5)
    if trained == side:
        return positions.detach()
    grid = positions[:, 1:].detach().unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / trained
    grid = F.interpolate(grid.float(), scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1].detach(), grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def word(width: int) -> str:
    """Return what the hub calls a transformer of this width, `large` for 1024; the width where it has no word."""
    return WORDS.get(width, str(width))


def weights_file(model: str | Path) -> Path:
    """Return the weights file of a folder, or of a name on the hub, which is downloaded if it has to be.

    Raises:
        ModuleNotFoundError: If `transformers` is not installed.
        FileNotFoundError: If there is none; the message says what it is, how large, and where to get it.
    """
    try:
        import transformers  # noqa: F401
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the features of {model} need transformers: pip install 'diffusion_lab[features]'"
        ) from error
    folder = Path(model).expanduser()
    if folder.is_dir():
        found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}")
        return found[0]
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no folder {model}: metrics.model=<folder> has config.json and {WEIGHTS[0]}; or name a model of the hub, "
            f"such as {HUB_NAME}"
        )
    reason = f"the hub has neither {WEIGHTS[0]} nor {WEIGHTS[1]} of it"
    # what was downloaded before is taken without asking the hub for a newer one: its hash names the features anyway
    for offline in (True, False):
        if not offline and (why := refusal(name)):
            reason = why
            break
        for file in WEIGHTS:
            try:
                hf_hub_download(name, "config.json", local_files_only=offline)
                return Path(hf_hub_download(name, file, local_files_only=offline))
            except LocalEntryNotFoundError as error:
                reason = first_line(error)
                if not offline:
                    break
            except EntryNotFoundError:
                continue
            # every way in which a network fails, and the hub's own errors; its HTTP library is not ours to import
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                break
    size = f" ({SIZES[name]})" if name in SIZES else ""
    raise FileNotFoundError(
        f"no weights of {name}{size}: {reason}. Where there is a network, `hf download {name} config.json "
        f"{WEIGHTS[0]}` (or {WEIGHTS[1]}) gets them from https://huggingface.co/{name}; then "
        "metrics.model=<that folder>"
    )


def refusal(name: str) -> str:
    """Return why the hub does not give a model, or "": asked once, while a download tells of half a minute of tries."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=TIMEOUT_S)
    # as for the downloads
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def first_line(error: BaseException) -> str:
    """Return an error's first line, for a message of one."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and tables of keys off the screen: a text encoder that is not needed is no news."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

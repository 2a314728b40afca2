"""A frozen autoencoder between images and latents: diffusers' AutoencoderKL, which the extra `latents` brings.

    images in [-1, 1]  --encode-->  latents, the posterior's mean or a draw  --decode-->  images in [-1, 1]

It is a folder, or a model of the Hugging Face hub: the one in the hub's cache if it is there, else it is downloaded.
Only safetensors are read, and only a file that holds every weight: nothing is unpickled, and nothing is left as it was
initialised. The latents are the autoencoder's own, unscaled.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.data.errors import DataError

CLASS = "AutoencoderKL"
TRIES, WAIT_S, TIMEOUT_S = 3, 2.0, 10.0
"""How often the hub is asked, with what pauses, and how long each time."""


class Autoencoder:
    """A loaded autoencoder.

    Args:
        module: The AutoencoderKL, on its device.
        name: The folder or hub id that it came from.
        lowered: Whether it runs in bfloat16 where that is safe (autocast).

    Attributes:
        sha256: Hash of its weights: what tells whose latents these are.
    """

    def __init__(self, module: Any, name: str, *, lowered: bool = False) -> None:
        self.module, self.name, self.lowered = module.eval().requires_grad_(False), name, lowered
        self.device = next(module.parameters()).device
        total = hashlib.sha256()
        for key, value in sorted(module.state_dict().items()):
            value = value.detach().cpu().contiguous()
            total.update(f"{key}|{value.dtype}|{tuple(value.shape)}|".encode())
            total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        self.sha256 = total.hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of it."""
        config = self.module.config
        return {
            "name": self.name,
            "sha256": self.sha256,
            "scaling_factor": config.get("scaling_factor"),
            "shift_factor": config.get("shift_factor"),
        }

    @property
    def factor(self) -> int:
        """Pixels along a side for one of a latent."""
        return 2 ** (len(self.module.config.block_out_channels) - 1)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse images that it cannot encode.

        Raises:
            DataError: If examples of `shape` are no images of its channels, or their side is no multiple of `factor`.
        """
        takes = int(self.module.config.in_channels)
        if len(shape) != 3 or shape[0] not in (1, takes):
            raise DataError(f"autoencoder={self.name}: it takes images of {takes} channels, not {shape}")
        if shape[1] % self.factor or shape[2] % self.factor:
            raise DataError(
                f"autoencoder={self.name}: it shrinks sides by {self.factor}, which {shape} does not divide by"
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.lowered)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return latents `(B, C', H / factor, W / factor)`, float32, on the CPU.

        Args:
            images: `(B, C, H, W)` in [-1, 1]; one channel is repeated where it takes three.
            noise: Standard normal numbers of the latents' shape, to draw from the posterior; None for its mean.
        """
        x = images.to(self.device)
        if x.shape[1] == 1:
            x = x.expand(-1, int(self.module.config.in_channels), -1, -1)
        with self._autocast():
            posterior = self.module.encode(x).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(self.device)
        return latents.float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images `(B, C, H, W)`, float32, in about [-1, 1], on the CPU."""
        with self._autocast():
            return self.module.decode(latents.float().to(self.device)).sample.float().cpu()


def load_autoencoder(
    name: str, *, subfolder: str | None = None, device: torch.device | str = "cpu", lowered: bool = False
) -> Autoencoder:
    """Load an autoencoder.

    Args:
        name: A folder (of the model, or of a pipeline with `vae/` in it), or an id of the Hugging Face hub.
        subfolder: Where in it, e.g. "vae"; found by itself in a local pipeline.
        device: Where to.
        lowered: See `Autoencoder`.

    Raises:
        DataError: If diffusers is not installed, or there is no whole AutoencoderKL of that name.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise DataError(
            f"autoencoder={name}: this needs diffusers: pip install 'diffusion_lab[latents]'"
        ) from error
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (
            subfolder is None
            and not (folder / "config.json").is_file()
            and (folder / "vae" / "config.json").is_file()
        ):
            subfolder = "vae"
        name = str(folder.resolve())
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise DataError(f"autoencoder={name}: no such folder")
    where = {} if subfolder is None else {"subfolder": subfolder}
    try:
        module, told = _local_or_hub(AutoencoderKL, name, where, hub=not folder.is_dir())
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"autoencoder={name}: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:
        # a download that breaks off raises what the library below the hub's has
        if not type(error).__module__.startswith(("httpx", "requests", "urllib3")):
            raise
        raise DataError(
            f"autoencoder={name}: the download failed ({_why(error)}); the same command tries again"
        ) from error
    if told["missing_keys"]:
        raise DataError(
            f"autoencoder={name}: its file lacks {len(told['missing_keys'])} of the model's weights"
        )
    return Autoencoder(
        module.to(device), name if subfolder is None else f"{name}:{subfolder}", lowered=lowered
    )


def _local_or_hub(kind: Any, name: str, where: Mapping[str, str], *, hub: bool) -> tuple[Any, dict[str, Any]]:
    """Load a folder; or a model of the hub, from its cache where it is there whole, so that no network is needed."""
    if not hub:
        return _read(kind, name, where)
    try:
        return _read(kind, name, {**where, "local_files_only": True})
    except OSError:
        _ask_hub(name)
    return _read(kind, name, where)


def _read(kind: Any, name: str, where: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    found = kind.load_config(name, **where).get("_class_name")
    if found != CLASS:
        raise DataError(f"autoencoder={name}: an {CLASS} is needed, this is a {found}")
    return kind.from_pretrained(
        name, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False, **where
    )


def _ask_hub(name: str) -> None:
    """Ask whether the hub has a model: diffusers would take half a minute of retries for a network that is not there.

    Raises:
        DataError: If it cannot be reached, or has no such model.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    why = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT_S)
        try:
            HfApi().model_info(name, timeout=TIMEOUT_S)
            return
        except RepositoryNotFoundError as error:
            raise DataError(
                f"autoencoder={name}: the Hugging Face hub shows no such model; "
                "a private or gated one needs `hf auth login`"
            ) from error
        except OfflineModeIsEnabled as error:
            raise DataError(
                f"autoencoder={name}: not in the hub's cache, and HF_HUB_OFFLINE is set"
            ) from error
        except HfHubHTTPError as error:
            why = _why(error)
        except Exception as error:
            if not isinstance(error, OSError) and not type(error).__module__.startswith(
                ("httpx", "requests")
            ):
                raise
            why = _why(error)
    raise DataError(
        f"autoencoder={name}: not in the hub's cache, and the Hugging Face hub cannot be reached ({why}); "
        "a folder will do: autoencoder=<folder>"
    )


def _why(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]

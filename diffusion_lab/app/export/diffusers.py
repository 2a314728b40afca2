r"""Our U-Net as a diffusers folder, for whoever samples with diffusers.

    <folder>/
        model_index.json                            a DDIMPipeline of these two
        unet/config.json                            UNet2DModel
        unet/diffusion_pytorch_model.safetensors    our tensors under its names
        scheduler/scheduler_config.json             DDIMScheduler, or any other that counts integer timesteps

The two networks are the same function where their settings agree, and one line names the setting that does not. What
is left is what they are told. Ours hears log-SNR, diffusers counts timesteps k = 0 ... 999; so timestep k is the level
of the run's schedule at u = (k + 1) / 1000,

    beta_k = 1 - abar_k / abar_{k-1},     abar_k = sigmoid(logsnr_k)                  -> trained_betas
    row k  = [cos(f_j logsnr_k), sin(f_j logsnr_k)]_j                                 -> time_proj, a learned table

and the table's rows go through the same perceptron as ours. diffusers keeps 1 - beta and abar in float32, which near 1
has few digits of noise; each beta is chosen from the abar that diffusers will really have, so errors do not add up, and
the rows are those of that abar: network and scheduler agree on the level. With `timestep_spacing="trailing"` and a
number of steps that divides 1000, DDIM visits the levels of our grid `uniform_u`.

The network must see x as it is, c_in = 1, which is `sigma_data=1` (in whatever interpolant it was trained: it is the
same network in the variance-preserving process, see `denoisers/network.py`).

Nothing here imports diffusers. Names of modules and settings are those of its UNet2DModel and DDIMScheduler, 0.36.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lab.app.build import Loaded, instantiate, seeded
from diffusion_lab.app.errors import UserError
from diffusion_lab.denoisers import LearnedVarianceDenoiser, NetworkDenoiser
from diffusion_lab.denoisers.prediction import EDM, X0, Eps, V
from diffusion_lab.files import write_atomically
from diffusion_lab.networks.embeddings import LOGSNR_LIMIT
from diffusion_lab.networks.unet import Stage, UNet

LEVELS = 1000
VERSION = "0.36.0"
# levels are cut here: the last bit of float32's abar is worth exp(-17)
FURTHEST = 20.0
NULL = "none"
# what our network predicts, in diffusers' words, and the sign that makes it so
PREDICTIONS = {
    Eps: ("epsilon", 1.0),
    V: ("v_prediction", 1.0),
    X0: ("sample", 1.0),
    EDM: ("v_prediction", -1.0),
}


def write_diffusers(
    loaded: Loaded, folder: Path, *, label: str | None = None, facts: Mapping[str, str]
) -> list[str]:
    """Write a denoiser as a diffusers folder.

    Args:
        loaded: The denoiser and the config of its run.
        folder: Where to; must not exist, or be empty.
        label: For a model of several classes: a class, or "none", whose vector becomes part of the network, which then
            takes no labels; None keeps the table of labels, the last of which (num_classes) means "no label".
        facts: What the safetensors file says about itself.

    Returns:
        Remarks for the user, a line each.

    Raises:
        UserError: If diffusers has no such network, or the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"--diffusers {folder}: something is there already; name another folder, or remove it"
        )
    settings = checked_settings(loaded)
    kind, sign = _prediction(loaded)
    with seeded("init", 0), torch.no_grad():
        abar, betas = levels(instantiate(loaded.config["schedule"], "schedule"))
    network: UNet = loaded.denoiser.network  # type: ignore[assignment]
    tensors = renamed(network)
    tensors["time_proj.weight"] = _features(network, torch.logit(abar.double()))
    remarks, classes = [], int(settings["num_classes"])
    if label is not None:
        row = _row(label, classes)
        tensors["time_embedding.linear_2.bias"] = (
            tensors["time_embedding.linear_2.bias"] + tensors.pop("class_embedding.weight")[row]
        )
        classes = 0
    if isinstance(loaded.denoiser, LearnedVarianceDenoiser):
        remarks.append("the learned variance is left out: diffusers' DDIM has no use for it")
    channels = int(settings["in_channels"])
    for name in ("conv_out.weight", "conv_out.bias"):
        tensors[name] = sign * tensors[name][:channels]
    _write(folder, tensors, unet_config(network, settings, classes), scheduler_config(betas, kind), facts)
    if classes:
        remarks.append(
            f"it takes labels: unet(x, t, class_labels=...), {classes} for none; DDIMPipeline passes none, so use "
            "--label, or the loop in docs/interop.md"
        )
    for part in ("guidance", "modifiers"):
        node = loaded.config.get(part)
        if node and "unguided" not in str(node).lower():
            remarks.append(f"the run samples with {part}, which are no part of the folder")
    return remarks


# ---- what may be exported --------------------------------------------------------------------------------


def checked_settings(loaded: Loaded) -> dict[str, Any]:
    """Return the U-Net's settings, defaults filled in.

    Raises:
        UserError: If UNet2DModel has nothing that equals it; names the setting.
    """
    if not isinstance(loaded.denoiser, NetworkDenoiser):
        raise UserError(
            f"method: diffusers' pipelines need a denoiser, and this is {type(loaded.denoiser).__name__}"
        )
    network, sigma = loaded.denoiser.network, loaded.denoiser.sigma_data
    if type(network) is not UNet:
        raise UserError(
            f"model: diffusers' UNet2DModel is our UNet, and this run's network is {type(network).__name__}"
        )
    if sigma != 1.0:
        raise UserError(
            f"method.denoiser.sigma_data={sigma}: diffusers' schedulers do not scale the input; 1.0 is needed"
        )
    node = loaded.config["method"]["denoiser"]["network"]
    defaults = {name: item.default for name, item in inspect.signature(UNet).parameters.items()}
    settings = {**defaults, **{key: value for key, value in node.items() if key in defaults}}
    for name, missing in (
        ("scalars", "scalars"),
        ("token_width", "text tokens"),
        ("image_channels", "images"),
    ):
        if settings[name]:
            raise UserError(
                f"model.{name}={settings[name]}: UNet2DModel has no {missing} among its conditions"
            )
    if settings["patch"] != 1:
        raise UserError(f"model.patch={settings['patch']}: UNet2DModel works on pixels: 1")
    blocks, multipliers = settings["blocks"], list(settings["multipliers"])
    if multipliers[0] != 1:
        raise UserError(
            f"model.multipliers={multipliers}: UNet2DModel begins with the channels of its first level: 1"
        )
    if not isinstance(blocks, int) and len(set(blocks)) > 1:
        raise UserError(f"model.blocks={list(blocks)}: UNet2DModel has one number of blocks for all levels")
    groups = {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}
    if len(groups) > 1:
        raise UserError(
            f"model.channels={settings['channels']}: its group norms have {min(groups)} to {max(groups)} groups, and "
            "UNet2DModel has one number for all; channels from 128 on that 32 divides give 32 everywhere"
        )
    return settings


def _prediction(loaded: Loaded) -> tuple[str, float]:
    kind = type(loaded.denoiser.prediction)
    # EDM's residual for data of unit variance is -v
    if kind not in PREDICTIONS or (kind is EDM and loaded.denoiser.prediction.sigma_data != 1.0):  # type: ignore[attr-defined]
        raise UserError(
            f"prediction={kind.__name__}: diffusers' DDIM knows epsilon, v_prediction and sample: prediction=eps, v, x0"
        )
    return PREDICTIONS[kind]


def _row(label: str, classes: int) -> int:
    if not classes:
        raise UserError(f"--label {label}: this model was trained without labels")
    if label != NULL and not (label.isdigit() and int(label) < classes):
        raise UserError(f"--label {label}: a class is meant, 0 to {classes - 1}, or {NULL}")
    return classes if label == NULL else int(label)


# ---- levels ----------------------------------------------------------------------------------------------


def levels(schedule: Any) -> tuple[Tensor, list[float]]:
    """Return diffusers' abar `(1000,)` float32 and the betas that make it, for u = 1/1000 ... 1 of a schedule."""
    u = torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS
    logsnr = schedule(u).double().clamp(-FURTHEST, FURTHEST)
    betas, now = [], 1.0
    for wanted in torch.sigmoid(logsnr).tolist():
        beta = torch.tensor(max(0.0, 1.0 - wanted / now), dtype=torch.float32)
        betas.append(float(beta))
        now *= float(1.0 - beta)
    # as a scheduler makes it
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32), dim=0), betas


def _features(network: UNet, logsnr: Tensor) -> Tensor:
    frequencies = network.conditioning.level_embedding.frequencies.cpu()
    angles = logsnr.float().clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def scheduler_config(betas: list[float], kind: str) -> dict[str, Any]:
    """Return the settings of a DDIMScheduler that follows the run's own levels and clips nothing."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": LEVELS,
        "trained_betas": betas,
        "prediction_type": kind,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }


# ---- the network -----------------------------------------------------------------------------------------


def unet_config(network: UNet, settings: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """Return the settings of the UNet2DModel that is this network, with a table of `classes` labels or none."""
    size, multipliers, blocks = settings["size"], list(settings["multipliers"]), settings["blocks"]
    attends = [(size >> level) in settings["attention"] for level in range(len(multipliers))]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": size,
        "in_channels": settings["in_channels"],
        "out_channels": settings["in_channels"],
        "time_embedding_type": "learned",
        "num_train_timesteps": LEVELS,
        "layers_per_block": blocks if isinstance(blocks, int) else blocks[0],
        "block_out_channels": [settings["channels"] * multiplier for multiplier in multipliers],
        "down_block_types": ["AttnDownBlock2D" if yes else "ResnetDownsampleBlock2D" for yes in attends],
        "up_block_types": ["AttnUpBlock2D" if yes else "ResnetUpsampleBlock2D" for yes in reversed(attends)],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "add_attention": settings["middle_attention"],
        "attention_head_dim": settings["head_channels"],
        "norm_num_groups": network.norm_out.num_groups,
        "attn_norm_num_groups": network.norm_out.num_groups,
        "norm_eps": network.norm_out.eps,
        "act_fn": "silu",
        # a matter of training; one number for all blocks
        "dropout": settings["dropout"] if settings["dropout_max_side"] is None else 0.0,
        "class_embed_type": None,
        "num_class_embeds": classes + 1 if classes else None,
    }


def renamed(network: UNet) -> dict[str, Tensor]:
    """Return the network's tensors under the names of UNet2DModel, all but the table of levels."""
    found: dict[str, Tensor] = {}

    def put(name: str, module: nn.Module) -> None:
        found.update({f"{name}.{key}": value.detach().cpu() for key, value in module.state_dict().items()})

    put("conv_in", network.conv_in)
    put("time_embedding.linear_1", network.conditioning.level_embedding.layers[0])
    put("time_embedding.linear_2", network.conditioning.level_embedding.layers[2])
    if network.conditioning.label_embedding is not None:
        put("class_embedding", network.conditioning.label_embedding.table)
    for name, stage in _stages(network):
        block = stage.block
        prefix, _, place = name.rpartition(".resnets.")
        for theirs, ours in (
            ("norm1", block.norm_in),
            ("conv1", block.conv_in),
            ("time_emb_proj", block.modulation),
            ("norm2", block.norm_out),
            ("conv2", block.conv_out),
            ("conv_shortcut", block.skip),
        ):
            put(f"{name}.{theirs}", ours)
        if stage.attention is not None:
            attention = f"{prefix}.attentions.{place}"
            put(f"{attention}.group_norm", stage.attention.norm)
            # 1x1 convolutions here, linear there
            of = {
                key: value.detach().cpu().squeeze(-1).squeeze(-1)
                for key, value in stage.attention.state_dict().items()
            }
            for kind in ("weight", "bias"):
                for word, part in zip("qkv", of[f"qkv.{kind}"].chunk(3), strict=True):
                    found[f"{attention}.to_{word}.{kind}"] = part
                found[f"{attention}.to_out.0.{kind}"] = of[f"out.{kind}"]
    put("conv_norm_out", network.norm_out)
    put("conv_out", network.conv_out)
    return found


def _stages(network: UNet) -> Iterator[tuple[str, Stage]]:
    """Yield every residual block's name in UNet2DModel, and the stage that holds it here."""
    for ours, theirs, samplers in (
        (network.down, "down_blocks", "downsamplers"),
        (network.up, "up_blocks", "upsamplers"),
    ):
        level, place = 0, 0
        for stage in ours:
            assert isinstance(stage, Stage)
            if stage.block.change == "none":
                yield f"{theirs}.{level}.resnets.{place}", stage
                place += 1
            else:
                # a change of resolution ends a level, and attends to nothing
                yield f"{theirs}.{level}.{samplers}.0", stage
                level, place = level + 1, 0
    for place, stage in enumerate(network.middle):
        assert isinstance(stage, Stage)
        yield f"mid_block.resnets.{place}", stage


def _write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    unet: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    facts: Mapping[str, str],
) -> None:
    from safetensors.torch import save_file

    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}
    save_file(
        whole, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt", **facts}
    )
    write_atomically(folder / "unet" / "config.json", json.dumps(unet, indent=2) + "\n")
    write_atomically(folder / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2) + "\n")
    # last, so that a folder with an index is whole
    index = {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    write_atomically(folder / "model_index.json", json.dumps(index, indent=2) + "\n")

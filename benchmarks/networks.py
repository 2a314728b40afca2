"""Networks beside the same networks elsewhere: time and memory of a forward and of a training pass.

    U-Net (ADM)     diffusers UNet2DModel, the same blocks, resampling, attention and widths
    U-Net, 36 M     denoising-diffusion-pytorch Unet at its defaults (its own blocks, linear attention at every side),
                    beside ours of as many levels and about as many parameters
    DiT-S/2         diffusers DiTTransformer2DModel, the same block; it embeds the noise level anew in every block

    python benchmarks/networks.py [--device cpu|cuda] [--rounds 5]

Contenders take turns in one process, on one thread of a CPU; ratios are theirs over ours, so above 1 ours is faster or
smaller. Memory is the peak of a training pass above what the weights take: of the process, in one of its own, on a CPU
(of Linux); of the allocator on a GPU, where everything runs compiled in bf16 too and model FLOP utilisation is given
against the matrix products measured in the same run.

A second table says what skip connections hold: peak of live feature maps in a forward pass of U-ViT and of SiD2's
residual U-ViT with 1 to 8 blocks a level, and what checkpointing saves in a training pass. Results:
benchmarks/results/networks_<device>.json. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import torch
from common import ROOT, interleaved, median_ratio, report
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.networks import DiT, ResidualUViT, UNet, UViT

BATCH = {"cpu": 2, "cuda": 128}


class Theirs(nn.Module):
    """A network of another library, called as ours are."""

    def __init__(
        self, network: nn.Module, call: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: Tensor, logsnr: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Map `(B, C, H, W)` to the same shape."""
        return self.call(self.network, x, logsnr, cond["label"])


def unets() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """ADM's U-Net at 32 pixels: 128, 256, 256, 256 channels, two blocks a level, attention at 16 and 8."""
    from diffusers import UNet2DModel

    plain, attending = (
        ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    )
    theirs = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
        down_block_types=(plain[0], plain[1], plain[1], plain[0]),
        up_block_types=(attending[0], attending[1], attending[1], attending[0]),
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
        attention_head_dim=64, norm_num_groups=32, num_class_embeds=10,
    )  # fmt: skip
    ours = UNet(
        in_channels=3, size=32, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16, 8), head_channels=64,
        num_classes=10,
    )  # fmt: skip
    return ours, Theirs(theirs, lambda net, x, t, label: net(x, t, class_labels=label).sample), (3, 32, 32)


def lucidrains() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """The default U-Net of denoising-diffusion-pytorch, dim 64."""
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Unet

    ours = UNet(
        in_channels=3,
        size=32,
        channels=56,
        multipliers=(1, 2, 4, 8),
        blocks=1,
        attention=(4,),
        head_channels=56,
    )
    return ours, Theirs(Unet(dim=64), lambda net, x, t, label: net(x, t)), (3, 32, 32)


def dits() -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """DiT-S/2 on latents of 32 pixels, with a learned variance as published."""
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12, sample_size=32,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    ours = DiT(
        in_channels=4, size=32, patch=2, width=384, depth=12, heads=6, num_classes=1000, out_channels=8
    )
    return (
        ours,
        Theirs(theirs, lambda net, x, t, label: net(x, timestep=t.long(), class_labels=label).sample),
        (4, 32, 32),
    )


PAIRS: dict[str, tuple[str, Callable[[], tuple[nn.Module, nn.Module, tuple[int, ...]]]]] = {
    "U-Net (ADM)": ("diffusers", unets),
    "U-Net, 36 M": ("denoising-diffusion-pytorch", lucidrains),
    "DiT-S/2": ("diffusers", dits),
}


def batch(shape: Sequence[int], device: str, size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Inputs of a network."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size, *shape, generator=g).to(device)
    return x, torch.linspace(0, 5, size, device=device), {"label": torch.arange(size, device=device) % 10}


def passes(network: nn.Module, given: Any, train: bool, lowered: bool) -> Callable[[], None]:
    """A forward pass, or a training pass, to be timed."""
    device = given[0].device.type

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=lowered):
            if train:
                network(*given).float().square().mean().backward()
                network.zero_grad(set_to_none=True)
            else:
                with torch.no_grad():
                    network(*given)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def pair(name: str, device: str, rounds: int, lowered: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Time one pair."""
    peer, make = PAIRS[name]
    ours, theirs, shape = make()
    networks = {"diffusion_lab": ours.to(device), peer: theirs.to(device)}
    given = batch(shape, device, BATCH[device])
    rows, ratios, mode = [], {}, " bf16, compiled" if lowered else ""
    if lowered:
        networks = {key: torch.compile(network) for key, network in networks.items()}  # type: ignore[misc]
    for kind in ("forward", "training"):
        contenders = {key: passes(net, given, kind == "training", lowered) for key, net in networks.items()}
        seconds = interleaved(contenders, rounds, warmup=2)
        ratios[f"{name}, {kind}{mode}: {peer}"] = median_ratio(seconds[peer], seconds["diffusion_lab"])
        for key, times in seconds.items():
            row = {
                "network": name,
                "by": key,
                "pass": kind + mode,
                "ms": 1000 * sorted(times)[len(times) // 2],
            }
            row["parameters, M"] = sum(p.numel() for p in networks[key].parameters()) / 1e6
            if device == "cuda":
                row["GB"] = peak_on_gpu(contenders[key])
                row["MFU"] = utilisation(networks[key], given, kind == "training", row["ms"] / 1000, lowered)
            rows.append(row)
    return rows, ratios


def peak_on_gpu(run: Callable[[], None]) -> float:
    """Gigabytes above what was there."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def utilisation(network: nn.Module, given: Any, train: bool, seconds: float, lowered: bool) -> float:
    """Share of the measured peak of matrix products; a training pass is three forward passes."""
    plain = getattr(network, "_orig_mod", network)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(*given)
    return counter.get_total_flops() * (3 if train else 1) / seconds / matmul_peak(lowered)


def matmul_peak(lowered: bool) -> float:
    """Floating-point operations a second of a large matrix product, a multiplication and an addition counted as two."""
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16 if lowered else torch.float32)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    return 10 * 2 * n**3 / (time.perf_counter() - began)


# ---- memory ----------------------------------------------------------------------------------------------------


def peak_of_process(name: str, whose: str) -> float:
    """Megabytes that a training pass takes above the weights, measured in a process of its own."""
    words = [sys.executable, __file__, "--memory", name, whose]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def resident(field: str) -> float:
    """Megabytes that this process holds (VmRSS) or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure_memory(name: str, whose: str) -> float:
    """See `peak_of_process`."""
    torch.set_num_threads(1)
    ours, theirs, shape = CHECKPOINTED[name]() if name in CHECKPOINTED else PAIRS[name][1]()
    network = ours if whose == "ours" else theirs
    given = batch(shape, "cpu", 16)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = resident("VmRSS")
    network(*given).square().mean().backward()
    return resident("VmHWM") - before


def checkpointed(make: Callable[..., nn.Module], shape: tuple[int, ...]) -> Callable[[], Any]:
    """A network with and without checkpointing, as a pair."""
    return lambda: (make(checkpointing=True), make(checkpointing=False), shape)


UVIT = dict(
    in_channels=3, size=64, patch=2, channels=64, multipliers=(1, 2, 4), head_channels=64, embedding=256
)
CHECKPOINTED = {
    "U-Net, checkpointing": checkpointed(
        lambda **o: UNet(in_channels=3, size=32, channels=64, multipliers=(1, 2, 4, 8), blocks=2, **o),
        (3, 32, 32),
    ),
    "DiT-S/2, checkpointing": checkpointed(
        lambda **o: DiT(in_channels=4, size=32, patch=2, width=384, depth=12, heads=6, **o),
        (4, 32, 32),
    ),
    "residual U-ViT, checkpointing": checkpointed(
        lambda **o: ResidualUViT(**UVIT, blocks=(3, 3, 8), num_classes=10, **o), (3, 64, 64)
    ),
}  # fmt: skip


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, without gradients: every storage an operation returns, until it dies.

    Args:
        weights: What is there anyway, and not counted.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata: 0 for t in weights}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._meet(tensor)
        return out

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)


@torch.no_grad()
def skips() -> list[dict[str, Any]]:
    """Peak of live feature maps of a forward pass, by blocks a level."""
    rows = []
    for blocks in (1, 2, 4, 8):
        row: dict[str, Any] = {"blocks a level": blocks}
        for name, make, levels in (
            ("U-ViT", UViT, (blocks, blocks, 4)),
            ("residual U-ViT", ResidualUViT, (blocks, blocks, 4)),
        ):
            network = make(**UVIT, blocks=levels, num_classes=10).eval()
            given = batch((3, 64, 64), "cpu", 4)
            with Live([*network.parameters(), *network.buffers()]) as live:
                network(*given)
            row[f"{name}, MB"] = live.peak / 1e6
        rows.append(row)
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Time every pair and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.memory:
        print(measure_memory(*options.memory))
        return
    torch.set_num_threads(1)
    # one precision for convolutions and products, or utilisation would compare two
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for name, (peer, _) in PAIRS.items():
        for lowered in (False, True) if options.device == "cuda" else (False,):
            found, more = pair(name, options.device, options.rounds, lowered)
            ratios.update(more)
            if options.device == "cpu":
                used = {
                    key: peak_of_process(name, whose)
                    for key, whose in (("diffusion_lab", "ours"), (peer, "theirs"))
                }
                ratios[f"{name}, memory of training: {peer}"] = used[peer] / used["diffusion_lab"]
                for row in found:
                    if row["pass"] == "training":
                        row["MB at batch 16"] = used[row["by"]]
            rows += found
            print(name, json.dumps(more), flush=True)
    table: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    if options.device == "cpu":
        held = skips()
        ratios["live maps at 8 blocks a level: U-ViT"] = (
            held[-1]["U-ViT, MB"] / held[-1]["residual U-ViT, MB"]
        )
        for name in CHECKPOINTED:
            with_, without = (peak_of_process(name, whose) for whose in ("ours", "theirs"))
            table.append({"network": name.partition(",")[0], "MB": without, "MB, checkpointing": with_})
    report(f"networks_{options.device}", rows, ratios, {"skips": held, "checkpointing": table})


if __name__ == "__main__":
    main()

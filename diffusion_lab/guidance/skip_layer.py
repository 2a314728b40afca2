r"""Skip-layer guidance: guide a network with itself, some of its layers skipped.

    x0_hat = x0_skip + scale (x0 - x0_skip)        for logsnr in [low, high]
    x0_hat = x0                                    elsewhere, without calling the network again

x0_skip is the answer of the same network under the same condition, in which the named layers return their first
argument. It is autoguidance whose weak model costs no training; scale = 1 + the papers' scale. Stable Diffusion 3.5
adds the difference to classifier-free guidance and skips a few layers of the middle, for the first fifth of the steps.

The weak network is a copy of the modules that shares all parameters and buffers, so it costs no memory, follows the
weights, and leaves the network itself alone: sampling runs in threads, where a hook that one sets another would meet.

A layer can be skipped if its output has the shape of its input: attention blocks, residual blocks that keep channels
and resolution. What a block's class tells is checked at once; every skipped layer is run once, on the first call of the
weak network, to compare shapes.

References:
    Hyung et al., "Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling", 2024 (skipped
    attention and skipped residual blocks).
    Stability AI, "Stable Diffusion 3.5" reference code, 2024 (skip-layer configuration).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from diffusion_lab.guidance.autoguidance import AutoGuidance
from diffusion_lab.guidance.interval import EVERYWHERE
from diffusion_lab.networks.layers import AttentionBlock, ResidualBlock
from diffusion_lab.networks.mlp import PerceptronBlock
from diffusion_lab.networks.mmdit import MMDiTBlock
from diffusion_lab.networks.transformer import DiTBlock
from diffusion_lab.networks.unet import Stage
from diffusion_lab.networks.vit_blocks import TransformerBlock
from diffusion_lab.samplers.counting import BlankDenoiser, CountingDenoiser
from diffusion_lab.typing import Cond, DenoiserFn, conditional_of


class SkipLayer(AutoGuidance):
    """A denoiser guided away from itself with layers skipped. Two evaluations; one at scale 0 or 1.

    The weak answer is that of the model below all guidance (`conditional_of`), whatever `denoiser` wraps it in.

    Args:
        denoiser: A denoiser with a `network`, or a wrapper around one.
        layers: Dotted names of modules below the network, or patterns such as `"*attention*"`, in which `*` stands for
            dots too. Of modules inside each other the outermost is skipped.
        scale: Guidance scale; 1 is off, 1 + s where a paper says s.
        interval: `(low, high)`: guide where low <= logsnr <= high.

    Raises:
        ValueError: If there is no network, no layers are named, a name matches no module, a layer cannot be skipped, or
            the interval is not ordered.
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        layers: Sequence[str],
        scale: float,
        interval: Sequence[float] = EVERYWHERE,
    ) -> None:
        super().__init__(denoiser, skipping(conditional_of(denoiser), layers), scale, interval)


def skipping(denoiser: DenoiserFn, layers: Sequence[str]) -> DenoiserFn:
    """Return a denoiser with the network of `denoiser`, in which `layers` return their first argument.

    Weights are shared; what counts evaluations goes on counting.

    Raises:
        ValueError: See `SkipLayer`.
    """
    if isinstance(denoiser, CountingDenoiser):
        return _SameCount(skipping(denoiser.denoiser, layers), denoiser)
    if isinstance(denoiser, BlankDenoiser):
        return denoiser
    if not isinstance(getattr(denoiser, "network", None), nn.Module):
        raise ValueError(f"layers can only be skipped in a network, and {type(denoiser).__name__} has none")
    # deepcopy takes what is in the memo for already copied: weights are shared, modules are not
    network: nn.Module = denoiser.network  # type: ignore[attr-defined]
    shared = [*network.parameters(), *network.buffers()]
    weak: Any = copy.deepcopy(denoiser, {id(tensor): tensor for tensor in shared})
    for name, module in find_layers(weak.network, layers).items():
        # the object stays what it is, since a network may look at its blocks; the instance's forward wins
        module.forward = _Skip(name, module.forward)
    return weak  # type: ignore[no-any-return]


def find_layers(network: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules that names and patterns stand for, by dotted name; none of them inside another.

    Raises:
        ValueError: If no layers are named, a name matches no module, or a module is known to change shapes.
    """
    modules = {
        name: module
        for name, module in network.named_modules()
        # the network itself is no layer of it, and lists are not called
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    }
    keeping = [name for name, module in modules.items() if _keeps_shape(module)]
    choice = f"it has {', '.join(keeping or modules)}"
    if not layers or isinstance(layers, str):
        raise ValueError(f"name a list of layers of the network to skip, got {layers!r}: {choice}")
    found: set[str] = set()
    for pattern in layers:
        matches = {name for name in modules if fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(f"the network has no layer {pattern!r} to skip: {choice}")
        found |= matches
    outermost = {name: modules[name] for name in modules if name in found and not _inside(name, found)}
    for name, module in outermost.items():
        if _keeps_shape(module) is False:
            raise ValueError(f"layer {name!r} changes the shape of its input and cannot be skipped: {choice}")
    return outermost


def _inside(name: str, others: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:k]) in others for k in range(1, len(parts)))


def _keeps_shape(module: nn.Module) -> bool | None:
    """Whether a module's output has the shape of its first argument; None where its class does not tell."""
    if isinstance(module, Stage):
        return _keeps_shape(module.block)
    if isinstance(module, ResidualBlock):
        return module.change == "none" and isinstance(module.skip, nn.Identity)
    keeping = AttentionBlock | PerceptronBlock | DiTBlock | MMDiTBlock | TransformerBlock
    return True if isinstance(module, keeping) else None


class _Skip:
    """The `forward` of a skipped module: its first argument, once it is known that the module keeps its shape."""

    def __init__(self, name: str, forward: Any) -> None:
        self.name, self.forward, self.checked = name, forward, False

    def __call__(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        if not self.checked:
            shapes = [getattr(v, "shape", None) for v in (x, self.forward(x, *rest, **named))]
            if shapes[0] is None or shapes[0] != shapes[1]:
                before, after = ("no tensor" if shape is None else str(tuple(shape)) for shape in shapes)
                raise ValueError(
                    f"layer {self.name!r} makes {after} of {before} and cannot be skipped: choose one whose output has "
                    "the shape of its input"
                )
            self.checked = True
        return x


class _SameCount(CountingDenoiser):
    """Counts what another denoiser is asked on the count of `counter`."""

    def __init__(self, denoiser: DenoiserFn, counter: CountingDenoiser) -> None:
        super().__init__(denoiser, counter.batch)
        self.counter = counter

    def __call__(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Tensor:
        """Count, and return E[x0 | x]."""
        before = self.calls
        x0 = super().__call__(x, logsnr, cond)
        self.counter.calls += self.calls - before
        return x0

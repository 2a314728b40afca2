r"""Regression of a bridge's velocity and denoiser (`process/stochastic_interpolant.py`).

    tau ~ U(margin, 1 - margin),      x = a source + b data + g xi,
    loss_i = 1/2 mean |v(x, tau) - (a' source + b' data + g' xi)|^2 + xi_weight / 2 mean |xi(x, tau) - xi|^2

means being over the data's dimensions. The minima are the velocity of the law of x and E[xi | x] = -g score. The
velocity's target has variance c / (4 tau) near an end, so its loss is infinite over the whole of (0, 1), though its
minimum is not: hence the margin.

References:
    Albergo, Boffi & Vanden-Eijnden, "Stochastic Interpolants: A Unifying Framework for Flows and Diffusions", 2023,
        section 2 (regressions of velocity and denoiser).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from diffusion_lab.denoisers.bridge import SOURCE
from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import LossTerms
from diffusion_lab.process.stochastic_interpolant import Field, StochasticInterpolant, bridge, velocity_target
from diffusion_lab.rng import StepRNG
from diffusion_lab.typing import Cond


@dataclass(frozen=True, kw_only=True)
class BridgeTerms(LossTerms):
    """What `StochasticInterpolantLoss` returns; `logsnr` is that of `StochasticInterpolant.logsnr`.

    Attributes:
        velocity: Half the mean squared error of the velocity of each example, `(B,)`.
        xi: Half the mean squared error of the denoiser, `(B,)`; zero where the bridge has no noise.
    """

    velocity: Tensor
    xi: Tensor


class StochasticInterpolantLoss(nn.Module):
    """Losses of velocity and denoiser of a batch of pairs.

    Args:
        interpolant: The bridge.
        margin: Times closer to an end are not drawn, in [0, 1/2).
        xi_weight: Weight of the denoiser's loss.
        label_dropout: Probability of hiding an example's label.

    Raises:
        ValueError: If an argument is out of its range, or a bridge with noise has no margin.
    """

    def __init__(
        self,
        *,
        interpolant: StochasticInterpolant,
        margin: float = 1e-3,
        xi_weight: float = 1.0,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= margin < 0.5:
            raise ValueError(f"margin must be in [0, 1/2), got {margin}")
        if margin == 0.0 and interpolant.noise > 0.0:
            raise ValueError(
                "a bridge with noise needs a margin: its velocity's loss is infinite over (0, 1)"
            )
        if xi_weight < 0.0:
            raise ValueError(f"xi_weight must not be negative, got {xi_weight}")
        if not 0.0 <= label_dropout <= 1.0:
            raise ValueError(f"label_dropout must be in [0, 1], got {label_dropout}")
        self.interpolant, self.margin = interpolant, margin
        self.xi_weight, self.label_dropout = xi_weight, label_dropout

    def forward(
        self,
        field: Field,
        x0: Tensor,
        cond: Cond | None,
        rng: StepRNG,
        *,
        tau: Tensor | None = None,
    ) -> BridgeTerms:
        """Return the losses of a batch.

        Args:
            field: What is judged.
            x0: Clean data `(B, *D)`: the bridge's end at tau = 1.
            cond: Conditions; `cond["image"]` `(B, *D)` is the source of each example, which is standard normal noise
                where there is none.
            rng: Random numbers of this step for these rows.
            tau: `(B,)` times to use instead of drawing them.

        Raises:
            ValueError: If source and data have different shapes.
        """
        if tau is None:
            tau = self.margin + (1.0 - 2.0 * self.margin) * rng.stratified("noise_level")
        logsnr, tau = self.interpolant.logsnr(tau), tau.to(x0.dtype)
        if cond is not None and SOURCE in cond:
            source = cond[SOURCE].to(x0.dtype)
            if source.shape != x0.shape:
                raise ValueError(
                    f"source {tuple(source.shape)} and data {tuple(x0.shape)} must have the same shape"
                )
        else:
            source = rng.randn("noise", x0.shape[1:], dtype=x0.dtype)
        xi = rng.randn("latent_noise", x0.shape[1:], dtype=x0.dtype)
        x = bridge(self.interpolant, source, x0, xi, tau)
        v_hat, xi_hat = field(x, tau, drop_labels(cond, self.label_dropout, rng))
        of_v = _half_mean_square(v_hat - velocity_target(self.interpolant, source, x0, xi, tau))
        of_xi = of_v.new_zeros(of_v.shape)
        if xi_hat is not None and self.interpolant.noise > 0.0:
            of_xi = _half_mean_square(xi_hat - xi)
        per_example = of_v + self.xi_weight * of_xi
        return BridgeTerms(
            total=per_example.mean(), per_example=per_example, logsnr=logsnr, velocity=of_v, xi=of_xi
        )


def _half_mean_square(error: Tensor) -> Tensor:
    return 0.5 * error.square().flatten(1).mean(1)

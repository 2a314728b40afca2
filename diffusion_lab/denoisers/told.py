"""A network that is told one number more than the noise level: what students are told, and their teachers were not.

The number is a scalar of the network's (`networks/conditioning.py`), which hears it at about unit size, and declares
that it does: `scalars: [<name>]`. A new one can be silenced, so that a student begins as its teacher whatever it is
told.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from diffusion_lab.denoisers.network import NetworkDenoiser, Output
from diffusion_lab.denoisers.prediction import Prediction
from diffusion_lab.process.interpolants import Interpolant
from diffusion_lab.typing import Cond


class ToldDenoiser(NetworkDenoiser):
    """A denoiser conditioned on `cond[scalar]` `(B,)`.

    Args:
        network: See `NetworkDenoiser`; it hears the scalar.
        interpolant: See `NetworkDenoiser`.
        prediction: See `NetworkDenoiser`.
        sigma_data: See `NetworkDenoiser`.

    Raises:
        ValueError: If the network does not hear the scalar.
    """

    scalar: ClassVar[str]
    """Its key in a `Cond`, and its name in the network."""
    words: ClassVar[str]
    """What it is, for messages."""

    def __init__(
        self,
        *,
        network: nn.Module,
        interpolant: Interpolant,
        prediction: Prediction,
        sigma_data: float = 1.0,
    ) -> None:
        super().__init__(
            network=network, interpolant=interpolant, prediction=prediction, sigma_data=sigma_data
        )
        conditioning = getattr(network, "conditioning", None)
        if conditioning is not None and self.scalar not in conditioning.scalar_embeddings:
            raise ValueError(
                f"the network must hear the {self.words}: model.scalars=[{self.scalar}], beside what it hears already"
            )

    def heard(self, value: Tensor) -> Tensor:
        """Return what the network is told of the number, of its shape and about unit size."""
        raise NotImplementedError

    def silence(self) -> None:
        """Make the number add nothing to the network's answer until it has learnt to listen.

        Raises:
            ValueError: If the network keeps magnitudes.
        """
        conditioning = getattr(self.network, "conditioning", None)
        if conditioning is not None:
            conditioning.scalar_embeddings[self.scalar].silence()

    def predict(self, x: Tensor, logsnr: Tensor, cond: Cond | None = None) -> Output:
        """See `NetworkDenoiser`; `cond` has the number."""
        assert cond is not None
        return super().predict(x, logsnr, {**cond, self.scalar: self.heard(cond[self.scalar])})

"""Training objectives: what is weighted (weightings), where noise is drawn (noise levels), and the loss itself."""

from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import DenoisingLoss, LossTerms, eps_error
from diffusion_lab.losses.noise_levels import NoiseLevels
from diffusion_lab.losses.weightings import (
    ELBO,
    P2,
    SNR,
    VMSE,
    EDMWeighting,
    EpsMSE,
    MinSNR,
    SigmoidWeighting,
    SNRPlusOne,
    TruncatedSNR,
    VelocityMSE,
    Weighting,
)

__all__ = [
    "ELBO",
    "P2",
    "SNR",
    "VMSE",
    "DenoisingLoss",
    "EDMWeighting",
    "EpsMSE",
    "LossTerms",
    "MinSNR",
    "NoiseLevels",
    "SNRPlusOne",
    "SigmoidWeighting",
    "TruncatedSNR",
    "VelocityMSE",
    "Weighting",
    "drop_labels",
    "eps_error",
]

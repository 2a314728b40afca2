"""Training objectives: what is weighted (weightings), where noise is drawn (noise levels), and the loss itself."""

from diffusion_lab.losses.adaptive import Adaptive, AdaptiveDenoisingLoss
from diffusion_lab.losses.conditioning import drop_labels
from diffusion_lab.losses.denoising import DenoisingLoss, LossTerms, eps_error
from diffusion_lab.losses.hybrid import HybridLoss
from diffusion_lab.losses.input_perturbation import InputPerturbationLoss
from diffusion_lab.losses.loss_aware import LossAware, LossAwareTerms
from diffusion_lab.losses.multiscale import MultiscaleLoss
from diffusion_lab.losses.noise_levels import DiscreteNoiseLevels, NoiseLevels
from diffusion_lab.losses.uncertainty import LogUncertainty, UncertaintyLoss
from diffusion_lab.losses.vlb import BoundTerms, VariationalBound, VDMLoss
from diffusion_lab.losses.vlb_terms import Levels
from diffusion_lab.losses.weightings import (
    ELBO,
    P2,
    SNR,
    VMSE,
    EDMMonotonic,
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
    "Adaptive",
    "AdaptiveDenoisingLoss",
    "BoundTerms",
    "DenoisingLoss",
    "EDMMonotonic",
    "DiscreteNoiseLevels",
    "EDMWeighting",
    "EpsMSE",
    "HybridLoss",
    "InputPerturbationLoss",
    "LogUncertainty",
    "LossAware",
    "LossAwareTerms",
    "Levels",
    "LossTerms",
    "MinSNR",
    "MultiscaleLoss",
    "NoiseLevels",
    "SNRPlusOne",
    "SigmoidWeighting",
    "TruncatedSNR",
    "UncertaintyLoss",
    "VDMLoss",
    "VariationalBound",
    "VelocityMSE",
    "Weighting",
    "drop_labels",
    "eps_error",
]

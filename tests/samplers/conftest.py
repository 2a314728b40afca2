"""What the comparisons with public code share."""

import peers
import pytest


@pytest.fixture
def sampling():
    """k-diffusion's samplers."""
    try:
        return peers.k_diffusion_sampling()
    except ModuleNotFoundError:
        pytest.skip("k-diffusion is not installed")

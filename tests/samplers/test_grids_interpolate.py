"""Published lists of noise levels, and other numbers of steps out of them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from problems import D64

from diffusion_lab.samplers.base import check_grid
from diffusion_lab.samplers.grids import from_sigmas, interpolated

CONF = Path(__file__).parents[2] / "conf" / "grid"
TABLES = {
    "sd15": "StableDiffusionSigmas",
    "sdxl": "StableDiffusionXLSigmas",
    "svd": "StableDiffusionVideoSigmas",
}


def conf(name):
    return yaml.safe_load((CONF / f"ays_{name}.yaml").read_text())


@pytest.mark.parametrize("name", TABLES)
def test_the_published_tables(name):
    node = conf(name)
    assert len(node["sigmas"]) == 11 and node["steps"] == 10
    grid = interpolated(node["sigmas"], 10)
    assert torch.equal(grid, from_sigmas(node["sigmas"][:10]))
    utils = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    published = torch.tensor(utils.AysSchedules[TABLES[name]], dtype=D64)
    # to the last bit but two of an exponential; its last level is 0 as well
    torch.testing.assert_close(torch.exp(-grid / 2), published, rtol=1e-14, atol=0)


@pytest.mark.parametrize("steps", [1, 5, 10, 20, 37])
def test_interpolation_is_that_of_the_quickstart_page(steps):
    """The page interpolates log sigma from the clean end up, to steps + 1 levels; ComfyUI then sets the last to 0."""
    sigmas = conf("sdxl")["sigmas"]
    index = np.linspace(0, 1, len(sigmas))
    page = np.exp(np.interp(np.linspace(0, 1, steps + 1), index, np.log(sigmas[::-1])))[::-1].copy()
    grid = interpolated(sigmas, steps)
    assert grid.shape == (steps + 1,) and torch.equal(check_grid(grid), grid)
    torch.testing.assert_close(torch.exp(-grid[:-1] / 2), torch.from_numpy(page[:-1]), rtol=1e-12, atol=0)


def test_half_the_steps_are_every_other_level():
    sigmas = conf("sd15")["sigmas"]
    torch.testing.assert_close(interpolated(sigmas, 5), from_sigmas(sigmas[:10:2]), rtol=1e-14, atol=0)
    assert math.isclose(float(interpolated(sigmas, 20)[1]), -math.log(sigmas[0] * sigmas[1]), rel_tol=1e-12)


@pytest.mark.parametrize(
    ("sigmas", "steps"),
    [([2.0, 1.0], 0), ([2.0], 3), ([2.0, 1.0, 0.0], 3), ([1.0, 2.0], 3), ([2.0, -1.0], 3)],
)
def test_bad_settings_are_refused(sigmas, steps):
    with pytest.raises(ValueError, match=r"grid|interpolated|from_sigmas"):
        interpolated(sigmas, steps)

"""docs/networks.md says which network fits which images: every row is built and run there, on the meta device."""

import re
from pathlib import Path

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf

from diffusion_lab.data.convert_settings import MODELS, SMALL, STEP

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf" / "model"
# as large as these, building them takes a second each
LARGE = re.compile(r"imagenet|edm2_[^t]|dit_(b|l|xl)|mmdit_24|vdm_c")


def table():
    """Rows of the page: what for, and the models that are named."""
    text = (
        (ROOT / "docs" / "networks.md").read_text().split("## Which one for my images")[1].split("\n## ")[0]
    )
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return {line.split("|")[1].strip(): re.findall(r"`(\w+)`", line.split("|", 2)[2]) for line in lines}


def shapes(images):
    if images == "points":
        return [(2,)]
    if images.startswith("any side"):
        assert f"that {STEP} divides" in images
        return [(3, side, side) for side in (12, 20, 28, 64, 100)]
    side = int(re.search(r"(\d+)x\1", images)[1])
    return [(4 if images.startswith("latents") else 3, side, side)]


def run(name, shape):
    """Build a model for images of a shape and call it; return the shape of what comes out."""
    node = CONF / f"{name}.yaml"
    loaded = OmegaConf.load(node)
    for base in loaded.pop("defaults", []):
        if base != "_self_":
            loaded = OmegaConf.merge(OmegaConf.load(CONF / f"{base}.yaml"), loaded)
    cfg = OmegaConf.create({"shape": list(shape), "num_classes": 10, "model": loaded})
    found = OmegaConf.to_container(cfg, resolve=True)["model"]
    with torch.device("meta"):
        network = hydra.utils.instantiate(found, _convert_="all")
        return tuple(network(torch.zeros(2, *shape), torch.zeros(2), None).shape)


def cases(large):
    return [
        pytest.param(name, shape, id=f"{name}-{shape[-1]}")
        for images, names in table().items()
        for name in names
        for shape in shapes(images)
        if bool(LARGE.search(name)) == large
    ]


def test_every_network_is_in_the_table():
    named = {name for names in table().values() for name in names}
    assert named == {path.stem for path in CONF.glob("*.yaml")} - {"classifier_tiny"}
    assert len(named) > 30


@pytest.mark.parametrize(("name", "shape"), cases(large=False))
def test_it_fits(name, shape):
    assert run(name, shape) == (2, *shape)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), cases(large=True))
def test_it_fits_too(name, shape):
    assert run(name, shape) == (2, *shape)


def test_what_the_converter_proposes_is_what_the_page_proposes():
    first = {images.partition("x")[0]: names[0] for images, names in table().items() if images[0].isdigit()}
    assert {str(side): name for side, name in MODELS.items()} == first
    assert table()[f"any side that {STEP} divides"][0] == SMALL


def test_a_unet_for_another_side():
    """As the page says."""
    line = "model=unet_64 model.attention=[24,12]"
    assert f"`{line}` for 96x96" in (ROOT / "docs" / "networks.md").read_text()
    node = OmegaConf.load(CONF / "unet_64.yaml")
    node.attention = [24, 12]
    cfg = OmegaConf.create({"shape": [3, 96, 96], "num_classes": 0, "model": node})
    with torch.device("meta"):
        network = hydra.utils.instantiate(OmegaConf.to_container(cfg, resolve=True)["model"], _convert_="all")
        assert network(torch.zeros(1, 3, 96, 96), torch.zeros(1), None).shape == (1, 3, 96, 96)
    with pytest.raises(Exception, match="attention at sides"):
        run("unet_64", (3, 96, 96))

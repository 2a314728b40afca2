"""The code on the page runs."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_the_page_runs(index, capsys):
    names = {"__name__": "page"}
    exec(BLOCKS[index], names)
    out = capsys.readouterr().out
    if index == 1:
        assert out.startswith("FD@200 (pixels) = ")
    if "RowMeans" in names:
        import torch

        from diffusion_lab.metrics import Real, evaluate_images

        images = torch.randint(0, 256, (60, 1, 5, 4), generator=torch.Generator().manual_seed(0)).to(
            torch.uint8
        )
        (record,) = evaluate_images(images, None, Real(images=images[:30], name="test"), names["RowMeans"]())
        assert record.label == "FD@60 (row-means)" and record.value > 0


def test_the_page_has_its_examples():
    assert len(BLOCKS) == 3

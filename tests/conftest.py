"""What all tests share: the torchvision cure first, then a quiet and repeatable machine."""

import os

import diffusion_lab  # noqa: F401  (lays the import hook before anything imports lightning or torchmetrics)

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch


@pytest.fixture
def double():
    """Make float64 the default dtype for one test: exact problems are checked at full precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def data_root():
    """The folder with real data, or a skip that says how to provide it."""
    root = os.environ.get("DIFFUSION_LAB_DATA")
    if not root:
        pytest.skip("set DIFFUSION_LAB_DATA to the folder that holds mnist/ to run this test")
    return root

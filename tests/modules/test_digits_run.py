"""The real data module under the real loop: interrupted runs see the same digits."""

import pytest
import torch
from tiny_training import assert_equal, everything, fit, make_module

from diffusion_lab.callbacks.base import StepCallback
from diffusion_lab.data.digits import Digits
from diffusion_lab.networks import MLP


class Flatten(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mlp = MLP(dim=64, width=32, depth=2, num_classes=10)

    def forward(self, x, logsnr, cond=None):
        return self.mlp(x.flatten(1), logsnr, cond).view_as(x)


class Labels(StepCallback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch["label"].clone())


def run(folder, max_images, *, workers=0, resume=None, accumulate=1, seen=None):
    module = make_module(global_batch_size=96)
    module.denoiser.network = Flatten()
    data = Digits(batch_size=96, seed=0, num_workers=workers)
    extra = [] if seen is None else [seen]
    return fit(
        folder,
        max_images,
        module=module,
        data=data,
        every=960,
        resume=resume,
        accumulate=accumulate,
        extra=extra,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_an_epoch_and_across_its_end(tmp_path, workers):
    whole, halves = Labels(), Labels()
    a = everything(*run(tmp_path / "a", 30 * 96, seen=whole))
    run(tmp_path / "b", 10 * 96, workers=workers, seen=halves)
    b = run(
        tmp_path / "b",
        30 * 96,
        workers=workers,
        resume=tmp_path / "b" / "checkpoints" / "images-0000000960.ckpt",
        seen=halves,
    )
    assert_equal(a, everything(*b))
    assert len(whole.seen) == len(halves.seen) == 30
    assert all(torch.equal(x, y) for x, y in zip(whole.seen, halves.seen, strict=True))
    first_epoch = torch.cat(whole.seen)[:1000]
    assert len(set(first_epoch.tolist())) == 10

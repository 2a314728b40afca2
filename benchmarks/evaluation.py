"""Evaluation: images a second from bytes to FID statistics, and memory that does not grow with the number of images.

    python benchmarks/evaluation.py [--images 128] [--size 32] [--batch 16] [--rounds 5] [--threads 1]
                                    [--memory-images 10000]

First part: the same images in memory, through the same Inception network (random weights; they cost what the published
ones do), to mean and covariance in float64. Contenders, in turn within each round: `diffusion_lab` (`collect`), and
torch-fidelity and pytorch-fid, each as its own code loops: a DataLoader without further processes, its network, its
statistics. Before it is timed, the features are compared: ours differ by rounding only. pytorch-fid resizes in its own
way, so its features are another network's; its work is the same.

Second part (Linux): a process that collects everything (moments, a bank, a score) of n images through 2028 cheap
features, and one of 4 n; their peak memory. Images come from a stream, as from a sampler or a folder. The ratio is that
of n to 4 n: 1.0 says that memory does not grow.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import numpy as np
import torch
from common import ROOT, interleaved, median_ratio, report
from torch import Tensor, nn

from diffusion_lab.metrics.collect import Moments, collect, pieces_of
from diffusion_lab.metrics.inception import Inception

MEMORY = """
import sys
import diffusion_lab, torch
from diffusion_lab.metrics.collect import Bank, Moments, collect
from diffusion_lab.metrics.features import Pixels
from diffusion_lab.metrics.measures.inception_score import Classes

class Cheap(Pixels):
    outputs = ("features", "logits")
    def extract(self, images, outputs):
        return dict.fromkeys(outputs, self(images))

def memory(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind))

torch.set_num_threads(1)
n, most = int(sys.argv[1]), int(sys.argv[2])
rng = torch.Generator().manual_seed(0)
def stream():
    for start in range(0, n, 250):
        index = torch.arange(start, min(start + 250, n))
        yield index, torch.randint(0, 256, (len(index), 3, 26, 26), generator=rng, dtype=torch.uint8), None
before = memory("VmRSS:")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew: importing torch takes more than all that follows
wanted = [Moments(), Bank(most=most), Classes()]
found = collect(stream(), Cheap(), wanted, n=n, shape=(3, 26, 26))
assert found.moments().n == n and len(found.kept[wanted[1]].rows) == min(most, n)
print(before, memory("VmHWM:"))
"""


class Images(torch.utils.data.Dataset):
    """Images in memory, for the peers' loaders; with `floats` in [0, 1], as pytorch-fid's own data set gives them."""

    def __init__(self, images: Tensor, floats: bool) -> None:
        self.images, self.floats = images, floats

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].float() / 255 if self.floats else self.images[index]


def random_weights(path: Path) -> None:
    """Write a file of the published weights' layout."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with (
        mock.patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}),
        mock.patch.object(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)


def contenders(images: Tensor, weights: Path, batch: int) -> dict[str, Callable[[], None]]:
    """Return what is timed, by name."""
    from pytorch_fid import inception as theirs
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics
    from torch_fidelity.utils import get_featuresdict_from_dataset

    ours = Inception(weights_path=weights, verify=False)
    fidelity = FeatureExtractorInceptionV3("theirs", ["2048"], str(weights))
    # pytorch-fid knows only its own download, the same weights without the batch norms' counters and the scores' bias
    state = torch.load(weights, weights_only=True)
    with (
        mock.patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: state),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        fid = theirs.InceptionV3([3]).eval()

    def run_ours() -> None:
        found = collect(
            pieces_of(images, None, batch), ours, [Moments()], n=len(images), shape=images.shape[1:]
        )
        assert found.moments().cov.shape == (2048, 2048)

    def run_fidelity() -> None:
        found = get_featuresdict_from_dataset(Images(images, False), fidelity, batch, False, True, False)
        fid_features_to_statistics(found["2048"])

    def run_fid() -> None:
        loader = torch.utils.data.DataLoader(Images(images, True), batch_size=batch)
        features, start = np.empty((len(images), 2048)), 0
        for part in loader:
            with torch.no_grad():
                made = fid(part)[0].squeeze(3).squeeze(2).numpy()
            features[start : start + len(made)] = made
            start += len(made)
        np.mean(features, axis=0), np.cov(features, rowvar=False)

    with torch.no_grad():
        mine, truth = ours(images[:2]), fidelity(images[:2])[0]
    apart = ((mine - truth).abs().max() / truth.abs().max()).item()
    assert apart < 1e-5, f"features differ from torch-fidelity's by {apart:.2g} of the largest"
    return {"diffusion_lab": run_ours, "torch-fidelity": run_fidelity, "pytorch-fid": run_fid}


def peak(n: int, most: int) -> tuple[float, float]:
    """Return the memory in MiB of a process before it collects `n` images, and its peak while it does."""
    command = [sys.executable, "-c", MEMORY, str(n), str(most)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=900)
    before, after = done.stdout.split()
    return int(before) / 1024, int(after) / 1024


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-images", type=int, default=10_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.images, 3, args.size, args.size), generator=rng, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.pth"
        random_weights(weights)
        runs = contenders(images, weights, args.batch)
        seconds = interleaved(runs, rounds=args.rounds)
    rows: list[dict[str, object]] = [
        {
            "what": f"bytes to FID statistics: {name}",
            "images a second": args.images / min(times),
            "n": args.images,
        }
        for name, times in seconds.items()
    ]
    ratios = {
        f"speed against {name}": median_ratio(times, seconds["diffusion_lab"])
        for name, times in seconds.items()
        if name != "diffusion_lab"
    }
    # the bank is full at n already, as it is in an evaluation of many images
    peaks = {}
    for n in (args.memory_images, 4 * args.memory_images):
        before, peaks[n] = peak(n, most=args.memory_images // 2)
        rows.append({"what": "peak memory of collecting, MiB", "n": n, "MiB": peaks[n], "MiB before": before})
    few, many = peaks
    ratios["peak memory, n over 4 n"] = peaks[few] / peaks[many]
    report("evaluation", rows, ratios)


if __name__ == "__main__":
    main()

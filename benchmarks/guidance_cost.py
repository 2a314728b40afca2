"""What a guidance costs: time and memory of one evaluation over those of the bare denoiser.

The quickstart's network on 64 images in the midst of sampling. Time: rounds alternate between the bare denoiser and the
wrapped one. Memory: the peak of what tensors take at once during one evaluation, from the profiler's record of every
allocation, weights not counted.

    python benchmarks/guidance_cost.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import ROOT, interleaved, median_ratio, report
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from diffusion_lab.app.build import instantiate, plain
from diffusion_lab.measurements import Inpaint
from diffusion_lab.typing import MEASUREMENT, SEED

BATCH = 64
# these steer samples between steps: what they cost is the number of copies or corrections
BETWEEN_STEPS = {"particles", "feynman_kac", "predictor_corrector", "red_diff"}


def wrappers(denoiser: Any, config: dict[str, Any]) -> dict[str, Callable[..., Tensor]]:
    """Every guidance of conf/guidance that is a wrapper, on the same denoiser."""
    from diffusion_lab.denoisers.classifier import NetworkClassifier
    from diffusion_lab.networks.classifier import NoisyClassifier

    classifier = NetworkClassifier(
        network=NoisyClassifier(
            in_channels=1, size=8, num_classes=10, channels=24, multipliers=[1, 2], blocks=1, attention=[4],
            head_channels=16,
        ),
        interpolant=denoiser.interpolant,
    ).eval().requires_grad_(False)  # fmt: skip
    stored = {"weak": denoiser, "classifier": classifier}
    found = {}
    for file in sorted((ROOT / "conf" / "guidance").glob("*.yaml")):
        if file.stem in BETWEEN_STEPS:
            continue
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            words = ["run=x", f"guidance={file.stem}", "measurement=inpaint", "grid=uniform_logsnr"]
            node = OmegaConf.to_container(compose("sample", words).guidance, resolve=True)
        assert isinstance(node, dict)
        given = {key: stored[key] for key in stored if node.pop(key, None) is not None}
        found[file.stem] = instantiate(node, "guidance")(denoiser, **given)
    return found


def peak(run: Callable[[], Any]) -> int:
    """Return the most bytes that tensors took at once while `run` ran, beyond what was there before."""
    run()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    """Measure every wrapper and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        config = plain(compose("train", ["experiment=digits/quickstart", "name=benchmark"]))
    torch.manual_seed(0)
    denoiser = instantiate(config["method"]["denoiser"], "denoiser").eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        # a network that answers zero has no derivative to spend time on
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw)
    x = torch.randn(BATCH, *config["shape"], generator=draw)
    logsnr = torch.zeros(BATCH)
    cond = {
        "label": torch.arange(BATCH) % 10, MEASUREMENT: Inpaint()(torch.rand(x.shape, generator=draw)),
        SEED: torch.arange(BATCH),
    }  # fmt: skip

    def call(f: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                f(x, logsnr, cond)

        return run

    bare, rows = call(denoiser), []
    alone = peak(bare)
    for name, wrapped in wrappers(denoiser, config).items():
        seconds = interleaved({"bare": bare, "guided": call(wrapped)}, options.rounds)
        rows.append(
            {
                "guidance": name,
                "ms": 1e3 * statistics.median(seconds["guided"]),
                "time / bare": median_ratio(seconds["guided"], seconds["bare"]),
                "MiB": peak(call(wrapped)) / 2**20,
                "memory / bare": peak(call(wrapped)) / alone,
            }
        )
    report("guidance_cost", rows, {})


if __name__ == "__main__":
    main()

"""What more devices bring and cost: speed of two processes, of accumulation, and memory by rank with FSDP2.

On CPUs, each process on one thread, all at the same global batch:

    one, two (DDP), two (FSDP2)      images/s; two over one is the ratio, 2 would be perfect on two idle cores
    accumulate 1, 2, 4               images/s; what micro-batches cost
    DDP, FSDP2                       bytes that a process holds: weights, averages, optimizer's slots, gradients

With --device cuda, on one GPU, each in a process of its own: images/s, peak memory and model FLOP utilisation of a
training step by precision (fp32, TF32 matrix products, bf16, fp16 with a loss scaler), eager and compiled.

    python benchmarks/scaling.py [--steps 30] [--rounds 5] [--batch 512]
    python benchmarks/scaling.py --device cuda [--steps 30] [--rounds 5] [--batch 256] [--model unet_cifar10]

Results: benchmarks/results/scaling_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusion_lab  # noqa: F401  (first: it cures torchvision)

# isort: split

import torch
from common import ROOT, report

LIMIT_S = 900
WARMUP = 5
CPU_CASES: dict[str, dict[str, Any]] = {
    "one process": {"world": 1},
    "two, DDP": {"world": 2, "trainer": "ddp"},
    "two, FSDP2": {"world": 2, "trainer": "fsdp2"},
    "one, accumulate 2": {"world": 1, "accumulate": 2},
    "one, accumulate 4": {"world": 1, "accumulate": 4},
}
PRECISIONS = {
    "fp32": ("32-true", "highest"),
    "TF32": ("32-true", "high"),
    "bf16": ("bf16-mixed", "high"),
    "fp16": ("16-mixed", "high"),
}
# data of the model's size without a file: noise, made once
CUDA_SHAPE = [3, 32, 32]


def configured(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Compose the run of a case: everything a run has but what happens only now and then."""
    from hydra import compose, initialize_config_dir

    from diffusion_lab.app.build import plain

    never = "every_images=1_000_000_000"
    words = [
        "experiment=digits/quickstart", "~callbacks.frechet", f"model={case['model']}", f"paths.run={folder}",
        "name=benchmark", "max_images=1_000_000_000", f"batch_size={case['batch']}",
        f"trainer={case.get('trainer', 'auto')}", f"trainer.devices={case['world']}",
        f"trainer.accelerator={'gpu' if case['device'] == 'cuda' else 'cpu'}",
        f"trainer.accumulate_grad_batches={case.get('accumulate', 1)}", f"trainer.precision={case['precision']}",
        f"method.compile_network={case.get('compile', False)}", "~callbacks.sample_grid", "~callbacks.progress",
        f"callbacks.checkpoints.{never}",
    ]  # fmt: skip
    if case["device"] == "cuda":
        words += [f"shape=[{','.join(map(str, CUDA_SHAPE))}]"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("train", words)
    cfg.logger = {}
    return plain(cfg)


def noise(batch: int, micros: int) -> Any:
    """Return a data module that gives the same noise at every step, on the device from the second one on."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, IterableDataset

    class Noise(IterableDataset):
        def __iter__(self):  # noqa: ANN204
            g = torch.Generator().manual_seed(0)
            x0 = torch.rand(batch // micros, *CUDA_SHAPE, generator=g) * 2 - 1
            given = {"x0": x0, "label": torch.arange(len(x0)) % 10}
            while True:
                yield given

    class Data(pl.LightningDataModule):
        shape, num_classes, seed = CUDA_SHAPE, 10, 0

        def train_dataloader(self) -> DataLoader:
            return DataLoader(Noise(), batch_size=None)

        def transfer_batch_to_device(self, given: Any, device: torch.device, dataloader_idx: int) -> Any:
            if not hasattr(self, "there"):
                self.there = {name: value.to(device) for name, value in given.items()}
            return dict(self.there)

    return Data()


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps in this process, one of several perhaps; return seconds of each round and what is held."""
    import lightning.pytorch as pl

    from diffusion_lab.app import assemble
    from diffusion_lab.callbacks.base import synchronize
    from diffusion_lab.callbacks.throughput import flop_per_example
    from diffusion_lab.sharded import local_bytes

    seconds, steps, total = list[float](), case["steps"], case["rounds"]
    held: dict[str, Any] = {}

    class Watch(pl.Callback):
        began = 0.0

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if module.step == WARMUP:
                gradients = [p.grad for p in module.parameters() if p.grad is not None]
                slots = [
                    v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
                ]
                averages = [p for average in module.averages.values() for p in average.parameters()]
                held["MB weights"] = local_bytes(module.parameters()) / 1e6
                held["MB gradients"] = local_bytes(gradients) / 1e6
                held["MB optimizer"] = local_bytes(slots) / 1e6
                held["MB averages"] = local_bytes(averages) / 1e6

        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            done = module.step - WARMUP
            if not module.stepped or done < 0 or done % steps:
                return
            synchronize(module.device)
            now = time.perf_counter()
            if done == 0 and module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if done:
                seconds.append(now - self.began)
            self.began = time.perf_counter()
            trainer.should_stop = len(seconds) == total

    torch.set_float32_matmul_precision(case["matmul"])
    with tempfile.TemporaryDirectory() as folder:
        config = configured(Path(folder), case)
        if case["device"] == "cuda":
            # the shape is the model's, not that of the data set named in the config
            assemble._compare_shapes = lambda config, data: None  # type: ignore[assignment]
        parts = assemble.assemble(config)
        # last but for the checkpoints
        parts.trainer.callbacks.append(Watch())
        data = noise(case["batch"], case.get("accumulate", 1)) if case["device"] == "cuda" else parts.data
        parts.trainer.fit(parts.module, datamodule=data)
        told: dict[str, Any] = {"seconds": seconds, **held}
        if case["device"] == "cuda":
            told["GB peak"] = torch.cuda.max_memory_allocated() / 1e9
            few = {
                "x0": torch.zeros(2, *CUDA_SHAPE, device="cuda"),
                "label": torch.zeros(2, dtype=torch.int64).cuda(),
            }
            told["flop"] = flop_per_example(parts.module.denoiser.cuda(), few)
    return told


def run(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure a case in processes of its own; return what each told."""
    from diffusion_lab.app.launch import free_port, rank_environment

    port, processes = free_port(), []
    for rank in range(case["world"]):
        env = rank_environment(rank, case["world"], port) if case["world"] > 1 else dict(os.environ)
        if case["device"] == "cpu":
            env["OMP_NUM_THREADS"] = "1"
        words = [sys.executable, __file__, "--case", json.dumps(case)]
        processes.append(subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{case} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def on_cpu(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Two processes over one, accumulation, memory by rank. Cases take turns, so that a drifting machine is fair."""
    common = {
        "device": "cpu", "model": options.model or "unet_tiny", "batch": options.batch or 512, "steps": options.steps,
        "rounds": 1, "precision": "32-true", "matmul": "highest",
    }  # fmt: skip
    speeds: dict[str, list[float]] = {name: [] for name in CPU_CASES}
    told: dict[str, list[dict[str, Any]]] = {}
    for round_ in range(options.rounds):
        for name, case in CPU_CASES.items():
            told[name] = run({**common, **case})
            speeds[name].append(common["batch"] * common["steps"] / max(t["seconds"][0] for t in told[name]))
            print(
                f"round {round_ + 1} of {options.rounds}  {name}: {speeds[name][-1]:.1f} images/s", flush=True
            )
    rows = []
    for name, ranks in told.items():
        for rank, found in enumerate(ranks):
            row: dict[str, Any] = {"case": name, "rank": rank, "images/s": statistics.median(speeds[name])}
            row |= {key: value for key, value in found.items() if key.startswith("MB")}
            row["MB in all"] = sum(value for key, value in found.items() if key.startswith("MB"))
            rows.append(row)

    def over(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(speeds[a], speeds[b], strict=True))

    def largest(name: str) -> float:
        return max(row["MB in all"] for row in rows if row["case"] == name)

    ratios = {
        "two processes (DDP) over one, images/s": over("two, DDP", "one process"),
        "two processes (FSDP2) over one, images/s": over("two, FSDP2", "one process"),
        "accumulate 2 over 1, images/s": over("one, accumulate 2", "one process"),
        "accumulate 4 over 1, images/s": over("one, accumulate 4", "one process"),
        "memory of a rank, DDP over FSDP2": largest("two, DDP") / largest("two, FSDP2"),
    }
    return rows, ratios


def on_gpu(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Speed, memory and utilisation by precision and compilation."""
    from networks import matmul_peak

    rows, peaks = [], {}
    for lowered in (False, True):
        torch.set_float32_matmul_precision("highest")
        peaks[lowered] = matmul_peak(lowered)
    torch.set_float32_matmul_precision("high")
    tf32 = matmul_peak(False)
    torch.cuda.empty_cache()
    for name, (precision, matmul) in PRECISIONS.items():
        for compiled in (False, True):
            case = {
                "device": "cuda", "world": 1, "model": options.model or "unet_cifar10", "batch": options.batch or 256,
                "steps": options.steps, "rounds": options.rounds, "precision": precision, "matmul": matmul,
                "compile": compiled,
            }  # fmt: skip
            (found,) = run(case)
            speed = case["batch"] * case["steps"] / statistics.median(found["seconds"])
            peak = tf32 if name == "TF32" else peaks[name in ("bf16", "fp16")]
            rows.append(
                {
                    "precision": name,
                    "compiled": compiled,
                    "images/s": speed,
                    "GB peak": found["GB peak"],
                    "TFLOP/s": speed * found["flop"] / 1e12,
                    "MFU": speed * found["flop"] / peak,
                    "peak TFLOP/s": peak / 1e12,
                }
            )
            print(f"{name}{', compiled' if compiled else ''}: {speed:,.0f} images/s", flush=True)
    base = rows[0]["images/s"]
    ratios = {
        f"{row['precision']}{', compiled' if row['compiled'] else ''} over fp32, images/s": row["images/s"]
        / base
        for row in rows[1:]
    }
    return rows, ratios


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--model", default=None)
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(json.loads(options.case))), flush=True)
        return
    rows, ratios = (on_gpu if options.device == "cuda" else on_cpu)(options)
    report(f"scaling_{options.device}", rows, ratios)


if __name__ == "__main__":
    main()

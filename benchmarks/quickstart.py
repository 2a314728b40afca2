"""What the quickstart reaches: trained from scratch, sampled and scored, over several seeds.

For each seed the three commands of the README run as a user would run them. Besides the package's own score, a support
vector machine trained on the real training digits says how many of 1,000 samples it recognises as the class asked for.

    python benchmarks/quickstart.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, report
from sklearn.datasets import load_digits
from sklearn.svm import SVC


def command(*words: str) -> float:
    """Run one of the entry scripts and return its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    return time.perf_counter() - began


def recogniser() -> tuple[SVC, float]:
    """Return a classifier of the real training digits (counts 0..16) and its accuracy on the real test digits."""
    digits = load_digits()
    test = np.arange(len(digits.target)) % 5 == 0
    svc = SVC(gamma=0.001, C=10.0).fit(digits.data[~test], digits.target[~test])
    return svc, float(svc.score(digits.data[test], digits.target[test]))


def main() -> None:
    """Run all seeds and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    svc, real = recogniser()
    rows = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            run = f"{folder}/digits/quickstart/run"
            seconds = command(
                "train.py",
                "experiment=digits/quickstart",
                f"seed={seed}",
                f"paths.runs={folder}",
                "run_id=run",
            )
            drawn = f"{folder}/samples"
            seconds += command(
                "sample.py", f"run={run}", "num_samples=1437", "batch_size=200", f"out={drawn}"
            )
            seconds += command("evaluate.py", f"run={run}", f"samples={drawn}")
            latest = json.loads((Path(run) / "metrics.json").read_text())["evaluations"][-1]
            distance = next(record for record in latest["records"] if record["metric"] == "frechet")
            samples = np.load(f"{drawn}/samples.npz")
        images, labels = samples["images"][:1000], samples["labels"][:1000]
        accuracy = float(svc.score(images.reshape(1000, -1) / 255 * 16, labels))
        rows.append(
            {
                "seed": seed,
                "FD@1437 (digits-cnn)": float(distance["value"]),
                "real train to test": float(distance["real"]),
                "SVC accuracy on 1,000 samples": accuracy,
                "SVC accuracy on real test digits": real,
                "seconds, all three commands": round(seconds, 1),
            }
        )
    worst = min(row["SVC accuracy on 1,000 samples"] for row in rows)
    slowest = max(row["seconds, all three commands"] for row in rows)
    furthest = max(row["FD@1437 (digits-cnn)"] for row in rows)
    ratios = {
        "worst_svc_accuracy_over_0.95": worst / 0.95,
        "120_s_over_slowest": 120.0 / slowest,
        "floor_over_worst_fd": rows[0]["real train to test"] / furthest,
    }
    report("quickstart", rows, ratios)


if __name__ == "__main__":
    main()

"""Own classes, in an own package: trained freely, sampled and scored when the user vouches for them."""

import json
import os
import subprocess
import sys

import pytest
import tiny_runs

from diffusion_lab.app.config import allowlist
from diffusion_lab.app.errors import UserError

PACKAGE = '''
import os
from functools import partial

from diffusion_lab.process import Cosine


class Mine(Cosine):
    """A schedule of one's own."""

    def __init__(self, *, logsnr_min: float = -10.0, logsnr_max: float = 10.0, slope: float = 1.0) -> None:
        super().__init__(logsnr_min=logsnr_min, logsnr_max=logsnr_max)
        self.slope = slope


def run(command: str) -> int:
    return os.system(command)
'''

PROGRAM = """
import json, os, sys
from diffusion_lab.app.cli import main

for app, trust, words in json.loads(sys.argv[1]):
    os.environ.pop("DIFFUSION_LAB_TRUST", None)
    if trust:
        os.environ["DIFFUSION_LAB_TRUST"] = trust
    print("CODE", app, main(app, words), flush=True)
"""


@pytest.fixture
def own(tmp_path):
    """A folder with my_package (once with, once without __init__.py) and my_conf."""
    (tmp_path / "lib" / "my_package").mkdir(parents=True)
    (tmp_path / "lib" / "my_package" / "schedules.py").write_text(PACKAGE)
    (tmp_path / "my_conf" / "schedule").mkdir(parents=True)
    (tmp_path / "my_conf" / "schedule" / "mine.yaml").write_text(
        "_target_: my_package.schedules.Mine\nslope: 2.0\n"
    )
    return tmp_path


@pytest.mark.slow
def test_own_classes_are_trained_resumed_in_ranks_sampled_and_scored(own):
    (own / "lib" / "my_package" / "__init__.py").touch()
    train = [
        "--config-dir",
        "my_conf",
        *tiny_runs.TINY,
        *tiny_runs.NO_PICTURES,
        "schedule=mine",
        "paths.runs=runs",
    ]
    two = ["resume=auto", "max_images=320", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    run = "run=runs/digits/quickstart/latest"
    jobs = [
        ("train", None, [*train, "max_images=160", "run_id=a"]),
        ("train", None, [*train, *two]),
        ("sample", None, [run, "num_samples=8"]),
        ("sample", "my_package", [run, "num_samples=8", "out=drawn"]),
        ("evaluate", "other, my_package", [run, "num_samples=16"]),
        ("sample", "my_package", ["run=runs/digits/quickstart/a/export", "num_samples=8", "out=exported"]),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(jobs)],
        cwd=own, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{own / 'lib'}{os.pathsep}{tiny_runs.ROOT}"},
    )  # fmt: skip
    codes = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("CODE")]
    assert codes == [[app, "2" if i == 2 else "0"] for i, (app, *_) in enumerate(jobs)], done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.endswith(
        "schedule._target_ = 'my_package.schedules.Mine' is not among the targets that a stored config may name; "
        "if my_package is your own code, say so with DIFFUSION_LAB_TRUST=my_package"
    )
    assert "goes on at 160 images" in done.stdout
    assert "DIFFUSION_LAB_TRUST=my_package python sample.py run=runs/digits/quickstart/a" in done.stdout
    assert "Initializing distributed" not in done.stderr + done.stdout
    folder = own / "runs" / "digits" / "quickstart" / "a"
    assert tiny_runs.images_in(folder) == 320
    assert "--config-dir=my_conf" in tiny_runs.record_of(folder)["command"]
    command = json.loads((folder / "metrics.json").read_text())["evaluations"][0]["command"]
    assert command == (
        "DIFFUSION_LAB_TRUST='other, my_package' "
        "python evaluate.py run=runs/digits/quickstart/latest num_samples=16"
    )
    assert (own / "drawn" / "samples.npz").is_file() and (own / "exported" / "samples.npz").is_file()


@pytest.mark.parametrize("marked", [True, False])
def test_only_what_a_trusted_package_defines_passes(own, monkeypatch, marked):
    name = f"own_{'with' if marked else 'without'}_init"
    folder = (own / "lib" / "my_package").rename(own / "lib" / name)
    if marked:
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(own / "lib"))

    def check(target):
        allowlist.check_targets({"a": {"_target_": target}}, "config.yaml")

    for target in (f"{name}.schedules.Mine", f"{name}.schedules.run"):
        monkeypatch.delenv(allowlist.TRUST, raising=False)
        with pytest.raises(UserError, match=f"say so with DIFFUSION_LAB_TRUST={name}$"):
            check(target)
        monkeypatch.setenv(allowlist.TRUST, name)
        check(target)
    for target in (
        f"{name}.schedules.os.system", f"{name}.schedules.partial", f"{name}.schedules.nothing",
        f"{name}2.schedules.Mine", "os.system",
    ):  # fmt: skip
        with pytest.raises(UserError, match="is not among the targets"):
            check(target)


def test_nobody_is_advised_to_trust_pythons_own_modules(monkeypatch):
    monkeypatch.delenv(allowlist.TRUST, raising=False)
    for target in ("os.system", "builtins.eval", "torch.load", "diffusion_lab.app.cli.main"):
        with pytest.raises(UserError) as error:
            allowlist.check_targets({"_target_": target}, "config.yaml")
        assert allowlist.TRUST not in str(error.value)
    assert allowlist.needs_trust({"a": [{"_target_": "mine.A", "b": {"_target_": "torch.optim.Adam"}}]}) == [
        "mine"
    ]

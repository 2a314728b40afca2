"""`python -m diffusion_lab.app.export <run> [<ema>] [--diffusers <folder> [--label <class>]]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffusion_lab.app.build import load_denoiser
from diffusion_lab.app.errors import UserError
from diffusion_lab.app.export.diffusers import write_diffusers
from diffusion_lab.app.export.tensors import export_average, facts_of
from diffusion_lab.app.runs.run import RunFolder
from diffusion_lab.modules.errors import RunError


def _diffusers(folder: Path, ema: str | None, out: Path, label: str | None = None) -> list[str]:
    """Write the weights of a run or an export as a folder for diffusers."""
    loaded = load_denoiser(folder.resolve(), ema)
    facts = facts_of(
        RunFolder(folder.resolve()), loaded.config, loaded.ema, loaded.images_seen, loaded.sha256
    )
    return write_diffusers(loaded, out, label=label, facts=facts)


def main() -> int:
    """Export weights: `python -m diffusion_lab.app.export <run> [<ema>] [--diffusers <folder> [--label <class>]]`."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_lab.app.export",
        description="Export one average of a run: to <run>/export, or as a folder for diffusers.",
    )
    parser.add_argument("run", type=Path, help="the run folder; with --diffusers also an export")
    parser.add_argument(
        "ema",
        nargs="?",
        help="the name of an average, raw, or posthoc_<width>[@<images>]; default: the first average",
    )
    parser.add_argument(
        "--diffusers", type=Path, metavar="FOLDER", help="write a diffusers folder here instead"
    )
    parser.add_argument(
        "--label", help="with --diffusers: fix the class (a number, or none), so that no labels are needed"
    )
    words = parser.parse_args()
    try:
        if words.diffusers is None:
            if words.label is not None:
                raise UserError("--label: only with --diffusers")
            print(f"weights  {export_average(words.run, words.ema)}")
        else:
            for line in _diffusers(words.run, words.ema, words.diffusers, words.label):
                print(line)
            print(f"diffusers  {words.diffusers}")
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

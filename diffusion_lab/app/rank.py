"""One process of several: `python -m diffusion_lab.app.rank train <run folder> [checkpoint]`, or `sample <job file>`,
or `features <job file>`.

Started by `launch.py`, never by hand. What to do stands in files, so all ranks do the same.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import diffusion_lab  # noqa: F401  (first: it cures torchvision)
from diffusion_lab.app.errors import UserError, one_line
from diffusion_lab.app.launch import end_with_parent


def main(arguments: Sequence[str]) -> int:
    """Do one rank's share; return the exit code."""
    end_with_parent()
    job, where, *rest = arguments
    try:
        if job == "train":
            from diffusion_lab.app.runs.run import RunFolder
            from diffusion_lab.app.train import fit

            fit(RunFolder(Path(where)), Path(rest[0]) if rest else None)
        elif job == "sample":
            from diffusion_lab.app.sampling.parts import work

            work(Path(where), rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]))
        elif job == "features":
            from diffusion_lab.app.scoring.measuring import work as look

            look(Path(where), rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]))
        else:
            raise UserError(f"no such job: {job}")
    except Exception as error:
        from diffusion_lab.app.config.messages import translate

        line = translate(error, [], [], list)
        if line is None:
            traceback.print_exception(error)
            return 1
        logs = Path(os.environ["DIFFUSION_LAB_LOGS"])
        (logs / f"rank-{os.environ['RANK']}.error").write_text(one_line(line) + "\n")
        return 2
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    gc.freeze()  # see `cli._run`
    sys.exit(code)

"""Sample a trained run: `python sample.py run=<folder>`; `python sample.py --help` lists the rest."""

from diffusion_lab.app.cli import sample

# the words @hydra.main must stand in this file: Hydra's shell completion looks for them
if __name__ == "__main__":
    sample()

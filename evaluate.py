"""Score a trained run: `python evaluate.py run=<folder>`; `python evaluate.py --help` lists the rest."""

from diffusion_lab.app.cli import evaluate

# the words @hydra.main must stand in this file: Hydra's shell completion looks for them
if __name__ == "__main__":
    evaluate()

"""Train a model: `python train.py experiment=digits/quickstart`; `python train.py --help` lists the rest."""

from diffusion_lab.app.cli import train

# the words @hydra.main must stand in this file: Hydra's shell completion looks for them
if __name__ == "__main__":
    train()

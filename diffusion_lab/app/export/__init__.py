"""Weights to give away: one safetensors file for each average, and the config that rebuilds the denoiser.

    export/
        ema.safetensors       tensors of the denoiser; metadata: what `tensors.facts_of` says
        config.yaml           the run's config without this machine's folders and without what only training needs
        README.md             the model card, see `model_card.py`

`sample.py` and `evaluate.py` take an export like a run. Averages that were never tracked and are made from a run's
snapshots (`runs/posthoc.py`) are put among the exported by `tensors.export_average`; weights that a run kept under a
name of their own (`<run>/kept/`, `callbacks/kept_weights.py`) are exported too. safetensors hold
nothing but tensors and strings, and the config is checked against the allow-list, so an export from a stranger is data.
With `--diffusers` the weights go to a folder for diffusers instead (`diffusers.py`).
"""

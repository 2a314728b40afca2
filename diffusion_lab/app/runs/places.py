"""Where to put what is made of a model: into its run folder, but never into an export.

    <run>             <run>/samples/...                    <run>/fitted/...    <run>/comparisons/...
    <run>/export      as for the run that it belongs to
    <export>          samples/<its name>/samples/...       below the folder that the command was given in

An export is given away as it is, has hashes in its card, and may lie where nothing can be written.
"""

from __future__ import annotations

from pathlib import Path

HERE = "samples"


def is_export(folder: Path) -> bool:
    """Whether a folder is an export: a config beside weights, and no run around them."""
    return (
        (folder / "config.yaml").is_file()
        and not (folder / "record.json").exists()
        and not (folder / "checkpoints").exists()
        and any(folder.glob("*.safetensors"))
    )


def workplace(folder: Path) -> Path:
    """Return the folder for what is made of the model in a run folder or export; it need not exist yet."""
    folder = folder.resolve()
    if not is_export(folder):
        return folder
    run = folder.parent
    if (run / "config.yaml").is_file() and (run / "record.json").is_file():
        return run
    return Path(HERE).absolute() / folder.name

"""The command lines of the latents stage: `python -m diffusion_lab.data.encode` and `... .decode`, key=value both.

    encode  dataset=<option> [dataset.<key>=...] autoencoder=... out=...      -> data/encode.py
    decode  <samples> [autoencoder=...] [out=...]                             -> data/decode.py

The data set is composed from `conf/dataset` as for train.py. Decoding is told by the record of the samples which run
they are of, by the run's config how its latents were shifted and scaled, and by the data folder's latents.json whose
latents they are.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lab.app.config.choices import override
from diffusion_lab.app.errors import UserError, did_you_mean, one_line
from diffusion_lab.app.runs import record
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.pictures import reason
from diffusion_lab.files import replacing

SHARED = {
    "autoencoder": None,
    "subfolder": None,
    "out": None,
    "batch_size": "32",
    "device": "auto",
    "precision": "32-true",
}
ENCODE = {**SHARED, "latent": "mean", "seed": "0", "mirror": "false", "dtype": "float16"}
DECODE = {**SHARED}
USAGE_ENCODE = """python -m diffusion_lab.data.encode dataset=<option> autoencoder=<folder|hub id> out=<folder>

Encode a data set once, for dataset=latents. An interrupted job goes on with the same command.

  dataset=, dataset.<key>=   the images, as for train.py; also shape=, num_classes=, paths.data=, --config-dir=
  autoencoder=               a folder of diffusers' AutoencoderKL (or of a pipeline with vae/), or an id of the hub
  subfolder=                 where in it, e.g. vae
  out=                       folder for train-x0.npy, train-label.npy, test-x0.npy, test-label.npy, latents.json
  latent=mean                mean | sample: of the posterior
  seed=0                     of the noise of latent=sample
  mirror=false               training images a second time, mirrored
  dtype=float16              float16 | float32, of the files
  batch_size=32  device=auto|cpu|cuda  precision=32-true|bf16-mixed
"""
USAGE_DECODE = """python -m diffusion_lab.data.decode <samples> [key=value]

Make images of latents that sample.py drew: samples.npz, grid.png and record.json in <samples>/decoded.

  <samples>                  a folder of sample.py
  autoencoder=               a folder or hub id; default: the one in latents.json of the run's data
  subfolder=                 where in it, e.g. vae
  out=                       another folder
  batch_size=32  device=auto|cpu|cuda  precision=32-true|bf16-mixed
"""


def encode_command(words: Sequence[str] | None = None) -> int:
    """Run `python -m diffusion_lab.data.encode`; return the exit code."""
    return _guarded(_encode, words, USAGE_ENCODE)


def decode_command(words: Sequence[str] | None = None) -> int:
    """Run `python -m diffusion_lab.data.decode`; return the exit code."""
    return _guarded(_decode, words, USAGE_DECODE)


def _guarded(work: Callable[[list[str]], None], words: Sequence[str] | None, usage: str) -> int:
    given = list(sys.argv[1:] if words is None else words)
    if not given or {"-h", "--help"} & set(given):
        print(usage, end="")
        return 0 if given else 2
    try:
        work(given)
    except (UserError, DataError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _split(words: Sequence[str], known: Mapping[str, str | None]) -> tuple[dict[str, Any], list[str]]:
    """Part our own settings from the rest."""
    own, rest = dict(known), []
    for word in words:
        key, mark, value = word.partition("=")
        if mark and key in known:
            own[key] = None if value in ("", "null") else value
        else:
            rest.append(word)
    for key in ("batch_size", "seed"):
        if key in own and not str(own[key]).isdigit():
            raise UserError(f"{key}={own[key]}: a number is needed")
    if not int(str(own["batch_size"])):
        raise UserError("batch_size=0: a positive number is needed")
    if own["precision"] not in ("32-true", "bf16-mixed"):
        raise UserError(
            f"precision={own['precision']}{did_you_mean(str(own['precision']), ['32-true', 'bf16-mixed'])}"
        )
    return own, rest


def _load(own: Mapping[str, Any]) -> Any:
    from diffusion_lab.app.sampling.job import device_of
    from diffusion_lab.data.autoencoder import load_autoencoder

    return load_autoencoder(
        str(own["autoencoder"]),
        subfolder=own["subfolder"],
        device=device_of(str(own["device"])),
        lowered=own["precision"] == "bf16-mixed",
    )


# ---- encode ----------------------------------------------------------------------------------------------


def _encode(words: list[str]) -> None:
    own, rest = _split(words, ENCODE)
    if (key := next((key for key in ("autoencoder", "out") if own[key] is None), None)) is not None:
        raise UserError(f"{key}=... is needed; --help says more")
    if str(own["mirror"]).lower() not in ("true", "false"):
        raise UserError(f"mirror={own['mirror']}: true or false is meant")
    node = dataset_node(rest)
    from diffusion_lab.app.build import instantiate
    from diffusion_lab.data.encode import Recipe, encode

    recipe = Recipe(
        latent=str(own["latent"]),
        seed=int(own["seed"]),
        mirror=str(own["mirror"]).lower() == "true",
        dtype=str(own["dtype"]),
    )
    data = _told(lambda: instantiate(node, "dataset"), rest)
    facts = {
        "created": record.now(),
        "command": shlex.join(["python", "-m", "diffusion_lab.data.encode", *words]),
        "versions": record.versions(),
        "git": record.git_state(),
    }
    out = Path(str(own["out"]))
    manifest = encode(data, _load(own), out, recipe, batch_size=int(own["batch_size"]), facts=facts)
    _show(manifest, out)


def dataset_node(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the data set that a command line names, resolved.

    Args:
        overrides: `dataset=<option>`, what belongs to it, and perhaps `--config-dir=<folder>`.

    Raises:
        UserError: If it names none, or what does not exist.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from diffusion_lab.app.session import conf_folder

    words = [word for word in overrides if not word.startswith("-")]
    own = [word.removeprefix("--config-dir=") for word in overrides if word.startswith("--config-dir=")]
    for word in overrides:
        if word.startswith("-") and not word.startswith("--config-dir="):
            raise UserError(f"{word}: no such option; --help says more")
        key = word.partition("=")[0].lstrip("+~").partition(".")[0]
        if not word.startswith("-") and key not in ("dataset", "shape", "num_classes", "paths"):
            raise UserError(
                f"{word}: no such setting{did_you_mean(key, [*ENCODE, 'dataset', 'shape', 'num_classes'])}"
            )
    if not any(word.startswith("dataset=") for word in words):
        raise UserError("dataset=<option> is needed; --help says more")
    search = (
        [f"hydra.searchpath=[{','.join(f'file://{Path(folder).resolve()}' for folder in own)}]"]
        if own
        else []
    )

    def composed() -> dict[str, Any]:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            cfg = compose("train", overrides=[*words, *search])
        found = OmegaConf.to_container(cfg.dataset, resolve=True, throw_on_missing=True)
        assert isinstance(found, dict)
        return {str(key): value for key, value in found.items()}

    return _told(composed, words)


def _told(work: Callable[[], Any], words: Sequence[str]) -> Any:
    """Do something with a config; what Hydra has to say about it becomes one line."""
    from omegaconf.errors import MissingMandatoryValue

    from diffusion_lab.app.config.messages import check_options, translate
    from diffusion_lab.app.session import conf_folder

    check_options([word for word in words if not word.startswith("-")], [conf_folder()])
    try:
        return work()
    except MissingMandatoryValue as error:
        key = str(getattr(error, "full_key", "") or "root")
        raise UserError(f"{key if key.startswith('dataset') else f'dataset.{key}'}=... is needed") from error
    except Exception as error:
        line = translate(error, list(words), [conf_folder()], list)
        if line is None:
            raise
        raise UserError(line) from error


def _show(manifest: Mapping[str, Any], out: Path) -> None:
    from diffusion_lab.app.display import facts_table, show

    def numbers(values: Sequence[float]) -> str:
        return ", ".join(f"{value:.4g}" for value in values)

    scale = manifest["autoencoder"].get("scaling_factor")
    shape = manifest["shape"]
    command = [
        "python", "train.py", "dataset=latents", override("dataset.root", str(out)),
        f"shape=[{','.join(map(str, shape))}]",
        f"num_classes={manifest['num_classes']}",
        f"dataset.shift=[{','.join(map(str, manifest['shift']))}]",
        f"dataset.scale=[{','.join(map(str, manifest['scale']))}]",
    ]  # fmt: skip
    counts = manifest["data"]["n"]
    twice = " (training images also mirrored)" if manifest["recipe"]["mirror"] else ""
    rows = [
        (
            "latents",
            f"{' x '.join(map(str, shape))}, of {counts['train']:,} + {counts['test']:,} images{twice}",
        ),
        ("mean", numbers(manifest["mean"])),
        ("std", numbers(manifest["std"])),
        ("autoencoder", f"{manifest['autoencoder']['name']}, {manifest['autoencoder']['sha256'][:12]}"),
        (
            "its own scale",
            f"{scale} (std with it: {numbers([scale * s for s in manifest['std']])})" if scale else "none",
        ),
        *([("unreadable", unreadable(skipped))] if (skipped := manifest.get("skipped")) else []),
        ("files", str(out)),
        ("train", shlex.join(command)),
    ]
    show(facts_table(rows, f"encoded {manifest['data']['name']}"))


def unreadable(skipped: Mapping[str, Sequence[str]]) -> str:
    """Tell of the images that could not be read, by split: how many, what stands there, and the first ones."""
    from diffusion_lab.data.encode import MANIFEST

    counts = [f"{len(lines):,} of {split}" for split, lines in skipped.items()]
    lines = [line for some in skipped.values() for line in some]
    named = "; ".join(lines[:3]) + (f"; ... (all in {MANIFEST})" if len(lines) > 3 else "")
    return f"{' and '.join(counts)}; in their rows the next readable ones come twice: {named}"


# ---- decode ----------------------------------------------------------------------------------------------


def _decode(words: list[str]) -> None:
    own, rest = _split(words, DECODE)
    wrong = next((word for word in rest if "=" in word or word.startswith("-")), None)
    if wrong is not None:
        raise UserError(f"{wrong}: no such setting{did_you_mean(wrong.partition('=')[0], DECODE)}")
    if len(rest) != 1:
        raise UserError("one folder of sample.py is needed; --help says more")
    samples = Path(rest[0])
    out = Path(own["out"]) if own["out"] else samples / "decoded"
    if (out / "samples.npz").exists():
        raise UserError(f"out={out}: samples are there already; name another folder, or remove this one")
    told = record.read(samples / "record.json")
    latents, labels = _read(samples)
    dataset = _dataset(samples, told)
    manifest = _manifest(dataset)
    of = (manifest.get("autoencoder") or {}).get("name")
    if own["autoencoder"] is None:
        if of is None:
            raise UserError(f"autoencoder=... is needed: no latents.json in {dataset.get('root')} names one")
        own["autoencoder"], _, inside = str(of).partition(":")
        own["subfolder"] = own["subfolder"] or inside or None
    autoencoder = _load(own)
    known = manifest.get("sha256_of_autoencoder")
    if known not in (None, autoencoder.sha256):
        print(f"note: the latents were encoded by another autoencoder, {of}")
    from diffusion_lab.app.sample import save_grid
    from diffusion_lab.data.decode import decode

    images = decode(
        latents,
        autoencoder,
        shift=dataset["shift"],
        scale=dataset["scale"],
        batch_size=int(own["batch_size"]),
    )
    out.mkdir(parents=True, exist_ok=True)
    save_grid(images, labels, int((told.get("settings") or {}).get("num_classes") or 0), out / "grid.png")
    record.write(
        out / "record.json", {**told, "decoded": {"from": str(samples), "autoencoder": autoencoder.facts}}
    )
    with replacing(out / "samples.npz") as aside, aside.open("wb") as file:
        np.savez(file, images=images, labels=labels)
    print(f"picture  {out / 'grid.png'}\nimages   {out / 'samples.npz'}")


def _read(samples: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(samples / "samples.npz", allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{samples}: no samples of sample.py there: {one_line(str(error))}") from error
    if images.dtype == np.uint8 or images.ndim != 4:
        raise UserError(f"{samples}: these samples are no latents")
    return images, labels


def _dataset(samples: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data set of the run that the samples are of, from its config."""
    from diffusion_lab.app.config.choices import read_unchecked

    if not told.get("run"):
        raise UserError(f"{samples}: its record.json does not say which run the samples are of")
    node = read_unchecked(Path(str(told["run"]))).get("dataset") or {}
    if "shift" not in node or "scale" not in node:
        raise UserError(f"{told['run']}: its data set says nothing of shift and scale")
    return dict(node)


def _manifest(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the latents.json of a data set; nothing where it is not there."""
    from diffusion_lab.data.encode import MANIFEST

    root = Path(str(dataset.get("root")))
    elsewhere = os.environ.get("DIFFUSION_LAB_DATA")
    if not root.is_dir() and elsewhere:
        root = Path(elsewhere) / root.name
    try:
        found = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

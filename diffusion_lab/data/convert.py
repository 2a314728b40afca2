"""Make WebDataset shards: `python -m diffusion_lab.data.convert <source> <out>`.

    source --samples in a fixed random order--> out/train-000000.tar, ... --sizes, SHA-256--> out/manifest.json

A shard holds samples kN .. (k+1)N of that order, written aside and renamed, and its line in the manifest comes last; so
an interrupted conversion goes on behind the last whole shard when the same command is given again, and ends with
the same bytes. `--verify` reads everything back and compares.

Pictures are taken over as they are, unless `--size` asks for them prepared (see `pictures.py`): then they are PNG files
of that size, which read many times faster. What cannot be decoded is left out, and the manifest names it.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from diffusion_lab.data.alone import alone
from diffusion_lab.data.convert_settings import Settings, difference, training_command
from diffusion_lab.data.convert_sources import ConvertSource, Sample, SplitSource, open_source
from diffusion_lab.data.errors import DataError
from diffusion_lab.data.order import order
from diffusion_lab.data.pictures import FORMATS, Preparation, eight_bits, reason
from diffusion_lab.data.progress import progress
from diffusion_lab.data.shards.decode import UNDECODABLE
from diffusion_lab.data.shards.index import open_index
from diffusion_lab.data.shards.manifest import FILE, FORMAT, read_manifest, sha256_of, write_manifest

CHUNK = 64
"""Samples made at once."""


def convert(source: ConvertSource, out: Path, settings: Settings) -> dict[str, Any]:
    """Write a source as shards, or go on with that; return the manifest.

    Raises:
        DataError: If `out` holds something else, another process writes to it, or a split has no readable sample.
    """
    with alone(out):
        return _convert(source, out, settings)


def _convert(source: ConvertSource, out: Path, settings: Settings) -> dict[str, Any]:
    manifest = _manifest(source, out, settings)
    for aside in out.glob(".*.tar.part"):
        aside.unlink()
    total = sum(split.n for split in source.splits.values())
    before = 0
    with progress("converting", total, unit="samples", after_s=1.0) as tell:
        for name, split in source.splits.items():
            entry = manifest["splits"].setdefault(name, {"complete": False, "samples": 0, "shards": []})
            places = order(0, split.n, range(split.n)) if settings.shuffle else np.arange(split.n)
            for number, start in enumerate(range(0, split.n, settings.per_shard)):
                chosen = places[start : start + settings.per_shard]
                if number >= len(entry["shards"]):
                    path = out / f"{name}-{number:06d}.tar"
                    entry["shards"].append(
                        _write(path, split, chosen, settings, partial(_ahead, tell, before))
                    )
                    write_manifest(out, manifest)
                before += len(chosen)
            entry["samples"] = sum(shard["samples"] for shard in entry["shards"])
            if not entry["samples"]:
                raise DataError(f"no sample of the {name} split can be read")
            entry["complete"] = True
            write_manifest(out, manifest)
    return manifest


def _ahead(tell: Callable[[int], None], before: int, done: int) -> None:
    tell(before + done)


def _manifest(source: ConvertSource, out: Path, settings: Settings) -> dict[str, Any]:
    """Return the manifest to go on with, without the shards that are gone or cut, or a new one."""
    told = {
        "kind": source.kind,
        "splits": {name: [split.n, split.fingerprint] for name, split in source.splits.items()},
        **settings.told(),
    }
    found = read_manifest(out)
    if found is None:
        if stray := next((path for path in sorted(out.glob("*.tar"))), None):
            raise DataError(f"{out} holds {stray.name}, of which no {FILE} tells: choose an empty folder")
        classes = None if source.classes is None else list(source.classes)
        return {"format": FORMAT, "name": source.name, "classes": classes, "source": told, "splits": {}}
    other = difference(found.get("source") or {}, told)
    if other is not None:
        raise DataError(f"{out} holds shards {other}: choose another folder, or remove this one")
    for split in found["splits"].values():
        good = 0
        for shard in split["shards"]:
            path = out / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                break
            good += 1
        split.update(shards=split["shards"][:good], complete=False)
    return found


# ---- one shard -------------------------------------------------------------------------------------------------------


def _write(
    path: Path, split: SplitSource, places: np.ndarray, settings: Settings, tell: Callable[[int], None]
) -> dict[str, Any]:
    """Write a shard and its index; return its line of the manifest."""
    aside = path.with_name(f".{path.name}.part")
    written, skipped = 0, []
    try:
        # of the oldest format that serves, without dates and owners: the same samples are the same bytes
        with (
            aside.open("wb") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for done, (k, made) in enumerate(_made(split, places, settings), 1):
                if isinstance(made, str):
                    skipped.append(f"{k}: {made}")
                else:
                    extension, content, label = made
                    _add(tar, f"{k:09d}.{extension}", content)
                    if label is not None:
                        _add(tar, f"{k:09d}.cls", str(label).encode())
                    written += 1
                tell(done)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    open_index(path)
    return {
        "file": path.name,
        "samples": written,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "skipped": skipped,
    }


def _made(split: SplitSource, places: np.ndarray, settings: Settings) -> Iterator[tuple[int, Sample | str]]:
    """Yield number and sample, or why there is none, in order."""

    def make(k: int) -> Sample | str:
        try:
            return _prepared(split.sample(k), settings.preparation)
        except DataError:
            raise
        except UNDECODABLE as error:
            return reason(error)

    numbers = [int(k) for k in places]
    with ThreadPoolExecutor(max_workers=settings.workers) as pool:
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK]
            results = pool.map(make, chunk) if settings.workers > 1 else map(make, chunk)
            yield from zip(chunk, results, strict=True)


def _prepared(sample: Sample, preparation: Preparation | None) -> Sample:
    """Return a sample as it is stored, decoded once so that nothing unreadable is."""
    _, content, label = sample
    if preparation is None:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            eight_bits(opened, "RGB")
        return sample
    file = io.BytesIO()
    Image.fromarray(preparation(io.BytesIO(content))).save(file, format="PNG")
    return "png", file.getvalue(), label


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o444
    tar.addfile(info, io.BytesIO(content))


# ---- checking --------------------------------------------------------------------------------------------------------


def verify(root: Path) -> list[str]:
    """Read all shards of a folder and compare them with its manifest; return a line for each that differs.

    Raises:
        DataError: If there is no manifest.
    """
    manifest = read_manifest(root)
    if manifest is None:
        raise DataError(f"{root} has no {FILE} to compare with")
    wrong = [f"{name}: not finished" for name, split in manifest["splits"].items() if not split["complete"]]
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    done = 0
    with progress("verifying", sum(int(shard["bytes"]) for shard in shards), unit="bytes") as tell:
        for shard in shards:
            path, start = root / shard["file"], done
            if not path.is_file():
                wrong.append(f"{path}: missing")
            elif (size := path.stat().st_size) != shard["bytes"]:
                wrong.append(f"{path}: {size:,} bytes, not {shard['bytes']:,}")
            else:

                def more(n: int) -> None:
                    nonlocal done
                    done += n
                    tell(done)

                if sha256_of(path, more) != shard["sha256"]:
                    wrong.append(f"{path}: its SHA-256 differs")
            done = start + int(shard["bytes"])
    return wrong


# ---- command line ----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        guess = difflib.get_close_matches(unknown, self._option_string_actions, n=1) if unknown else []
        raise DataError(f"{message}; did you mean {guess[0]}?" if guess else f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m diffusion_lab.data.convert",
        description="Make WebDataset shards of a folder of pictures, IDX files, CIFAR-10's archive or a .npz.",
        epilog="Interrupted, the same command goes on. Then train with dataset=shards dataset.root=<out>.",
    )
    parser.add_argument(
        "source", type=Path, help="what to convert; with --verify alone: the folder to verify"
    )
    parser.add_argument("out", type=Path, nargs="?", help="folder for the shards")
    parser.add_argument(
        "--verify", action="store_true", help="read the shards back and compare their SHA-256"
    )
    parser.add_argument(
        "--per-shard", type=int, default=10_000, metavar="N", help="samples of a shard (10000)"
    )
    parser.add_argument(
        "--in-order", action="store_true", help="keep the source's order instead of a random one"
    )
    parser.add_argument("--no-labels", action="store_true", help="leave labels out; folders are no classes")
    parser.add_argument(
        "--size", type=int, metavar="N", help="store pictures cropped and resized to N pixels a side"
    )
    parser.add_argument(
        "--resize", default="adm", choices=["adm", "bilinear", "bicubic", "lanczos"], help="how (adm)"
    )
    parser.add_argument(
        "--box", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help="cut out first"
    )
    parser.add_argument("--grey", action="store_true", help="with --size: one channel instead of three")
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help="threads"
    )
    return parser


def _run(given: argparse.Namespace) -> int:
    out = given.out
    if out is None and not given.verify:
        raise DataError("name the folder for the shards: python -m diffusion_lab.data.convert <source> <out>")
    if out is not None:
        if given.per_shard < 1 or given.workers < 1 or (given.size is not None and given.size < 1):
            raise DataError("--per-shard, --workers and --size are at least 1")
        if given.size is None and (given.box or given.grey or given.resize != "adm"):
            raise DataError("--box, --grey and --resize need --size")
        preparation = None
        if given.size is not None:
            preparation = Preparation(
                size=given.size, channels=1 if given.grey else 3, box=given.box, resize=given.resize
            )
        source = open_source(given.source, labels=not given.no_labels)
        settings = Settings(
            per_shard=given.per_shard,
            shuffle=not given.in_order,
            preparation=preparation,
            labels=not given.no_labels,
            workers=given.workers,
        )
        _tell(source, convert(source, out, settings), out, preparation)
    if given.verify:
        root = out or given.source
        wrong = verify(root)
        for line in wrong:
            print(line, file=sys.stderr)
        if wrong:
            return 2
        print(f"{root}: every shard is as it was written")
    return 0


def _tell(
    source: ConvertSource, manifest: Mapping[str, Any], out: Path, preparation: Preparation | None
) -> None:
    for name, split in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in split["shards"]) / 1e6
        skipped = [line for shard in split["shards"] for line in shard["skipped"]]
        left_out = f", {len(skipped):,} unreadable ones left out (see {FILE})" if skipped else ""
        print(
            f"{name}  {split['samples']:,} samples in {len(split['shards'])} shards, {size:,.1f} MB{left_out}"
        )
    command, note = training_command(source, manifest, out, preparation)
    print(f"use it  {command}{note}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        return _run(_parser().parse_args(arguments))
    except (DataError, ValueError) as error:
        if not isinstance(error, DataError) and os.environ.get("DIFFUSION_LAB_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on behind the last whole shard", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

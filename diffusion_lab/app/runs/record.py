"""record.json: what ran, on what, when, and how it ended.

One record a folder, one *session* each time a program worked in it: a run that was interrupted and resumed has
several. The record is written when a session starts and again when it ends, so a killed run shows as `running` with
no end.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffusion_lab.app.config.allowlist import TRUST
from diffusion_lab.app.config.choices import plain_override
from diffusion_lab.files import write_atomically

PACKAGES = (
    "diffusion_lab torch lightning torchmetrics hydra-core omegaconf numpy scipy scikit-learn safetensors "
    "torch-fidelity webdataset wandb"
).split()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Return commit, branch and whether files differ from the commit; None if this code is not in a repository."""
    package = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *words], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # a virtual environment may lie inside a repository that has nothing to do with us
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", ":/")
    return {"commit": commit, "branch": git("rev-parse", "--abbrev-ref", "HEAD"), "dirty": bool(changed)}


def hardware() -> dict[str, Any]:
    """Return processor, memory and accelerators."""
    found: dict[str, Any] = {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    try:
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        pass
    import torch

    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def command(app: str, overrides: Sequence[str]) -> str:
    """Return the command line that asks for this job, ready for a shell."""
    trust = os.environ.get(TRUST, "") if app != "train" else ""
    words = shlex.join(["python", f"{app}.py", *map(plain_override, overrides)])
    return f"{TRUST}={shlex.quote(trust)} {words}" if trust else words


def now() -> str:
    """Return the local time with its zone, to the millisecond."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


def read(path: Path) -> dict[str, Any]:
    """Read a record; a missing or broken one is an empty one, for nothing but history hangs on it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def last_session(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the newest session of a record wrote down; empty if there is none."""
    return (record.get("sessions") or [{}])[-1]


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, readable and atomic."""
    write_atomically(path, json.dumps(record, indent=2, default=str) + "\n")


def start(path: Path, *, command: str, facts: Mapping[str, Any]) -> None:
    """Open a session.

    Args:
        path: The record.json.
        command: What was asked for.
        facts: What else belongs at the top of the record, such as seeds.
    """
    record = read(path)
    session = {
        "start": now(),
        "end": None,
        "status": "running",
        "command": command,
        "process": os.getpid(),
        "python": sys.executable,
        "git": git_state(),
        "versions": versions(),
        "hardware": hardware(),
    }
    record = {
        "created": record.get("created", session["start"]),
        **{key: value for key, value in record.items() if key not in ("created", "sessions")},
        **facts,
        "status": "running",
        "command": record.get("command", command),
        "sessions": [*record.get("sessions", []), session],
    }
    write(path, record)


def finish(path: Path, status: str, facts: Mapping[str, Any] | None = None) -> None:
    """Close the newest session.

    Args:
        path: The record.json.
        status: "finished", "stopped" (by a limit of the trainer), "pruned", "preempted", "interrupted" or "failed".
        facts: What the session came to.
    """
    record = read(path)
    record["status"] = status
    sessions = record.get("sessions") or [{}]
    sessions[-1].update({"end": now(), "status": status, **(facts or {})})
    write(path, {**record, "sessions": sessions})


def training_seconds(record: Mapping[str, Any]) -> float:
    """Return the wall-clock seconds of all sessions that have ended."""
    total = 0.0
    for session in record.get("sessions", []):
        if session.get("start") and session.get("end"):
            ends = [datetime.fromisoformat(session[key]) for key in ("start", "end")]
            total += (ends[1] - ends[0]).total_seconds()
    return total


def read_evaluations(file: Path) -> list[dict[str, Any]]:
    """Return the evaluations in a metrics.json, oldest first; none if it is missing or broken."""
    found = read(file).get("evaluations", [])
    return [item for item in found if isinstance(item, dict)]

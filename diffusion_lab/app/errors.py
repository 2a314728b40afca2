"""Errors that are the user's to mend: one clear line, no trace.

Whoever finds such a mistake raises `UserError` with a message that names the thing and, where there is one, the nearest
valid alternative. The entry points (`cli.py`) print the message and leave with exit code 2. Everything else is a defect
of ours and keeps its trace.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake in a command line, a config, a file or a folder; the message is one line for the user."""


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Return the option most like `word`, or None where nothing is close.

    Case is ignored, and an option that only adds or drops letters at an end counts as close.
    """
    by_lower = {option.lower(): option for option in options}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.55)
    if not found:
        found = [low for low in sorted(by_lower, key=len) if len(word) > 2 and low.startswith(word.lower())]
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, options: Iterable[str], *, limit: int = 12) -> str:
    """Return the tail of an error message: "; did you mean 'x'?" (or several), else `limit` options, else nothing."""
    options = sorted(set(options))
    guess = nearest(word, options)
    if guess is not None:
        longer = [option for option in options if len(word) > 2 and option.lower().startswith(word.lower())]
        # who types half a name means one of those that begin so, if not the one that looks most like it
        names = [guess] if guess in longer else [*longer[:3], guess]
        said = " or ".join(
            [", ".join(f"'{name}'" for name in names[:-1]), f"'{names[-1]}'"][len(names) == 1 :]
        )
        return f"; did you mean {said}?"
    if not options or not limit:
        return ""
    shown = ", ".join(options[:limit]) + (", ..." if len(options) > limit else "")
    return f"; there are: {shown}"


def similar_folder(path: Path) -> str:
    """Return the tail of an error message that names the folder `path` was probably meant to be, else nothing."""
    here = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if (here / part).exists():
            here /= part
            continue
        guess = (
            nearest(part, (item.name for item in here.iterdir() if item.is_dir())) if here.is_dir() else None
        )
        if guess is None:
            return ""
        here /= guess
    return f"; did you mean '{here}'?"


def one_line(text: str) -> str:
    """Return `text` with every run of white space made one blank."""
    return " ".join(text.split())

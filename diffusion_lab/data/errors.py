"""What can be wrong with data: one class, whose message is one line for the user."""

from __future__ import annotations

import re


class DataError(ValueError):
    """A data set that is missing, incomplete or damaged; the message names the file or folder.

    A loader worker hands its exceptions over as text, the whole trace in the message; of that only the error's own
    line is kept, so that the user sees the same line with and without workers.
    """

    def __init__(self, message: str) -> None:
        relayed = re.search(
            r"^Caught DataError in DataLoader worker.*?DataError: (?P<line>[^\n]*)\s*$", message, re.S
        )
        super().__init__(relayed["line"] if relayed else message)

"""Progress of work on data that may take a moment or an hour: nothing is shown unless it takes more than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion_lab.app.display import Ticker


@contextmanager
def progress(what: str, total: int, *, unit: str, after_s: float = 2.0) -> Iterator[Callable[[int], None]]:
    """Yield a function to be told how many pieces are done, which shows a bar, or lines, with the time left.

    Args:
        what: The word in front.
        total: Number of pieces.
        unit: What is counted.
        after_s: Seconds in which nothing is shown.
    """
    began = time.perf_counter()
    ticker: Ticker | None = None

    def tell(done: int) -> None:
        nonlocal ticker
        if ticker is not None:
            ticker.update(done)
        elif time.perf_counter() - began >= after_s:
            # imported only now: the display is the application's
            from diffusion_lab.app.display import Ticker

            ticker = Ticker(what, total, done=done, unit=unit)

    try:
        yield tell
    finally:
        if ticker is not None:
            ticker.close()

"""The page that reports and comparisons are written on: page.html, with its pictures inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template

from PIL import Image

# wider pictures are photographs rather than enlarged pixels
WIDE = 1600


def render(
    *,
    title: str,
    heading: str,
    status: str,
    kind: str,
    subtitle: str,
    facts: Mapping[str, str | None],
    sections: Sequence[str],
) -> str:
    """Return the page.

    Args:
        title: In the window's bar; plain text, as all but the sections.
        heading: In large letters.
        status: The word beside the heading.
        kind: How it ended, for the word's colour: "finished", "failed", ...
        subtitle: The line below.
        facts: Names and values; those without a value are left out.
        sections: HTML, see `section`; empty ones are left out.
    """
    page = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=html.escape(title),
        heading=html.escape(heading),
        status=html.escape(status),
        kind=html.escape(kind),
        subtitle=html.escape(subtitle),
        facts="".join(
            f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items() if v
        ),
        sections="\n".join(part for part in sections if part),
    )


def section(title: str, body: str) -> str:
    """Return a section of the page; the body is HTML."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def picture(data: bytes, caption: str) -> str:
    """Embed a PNG with a caption, enlarged by whole pixels where it is small."""
    return f"<figure>{image(data, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def image(data: bytes, text: str) -> str:
    """Embed a PNG; the text stands for it where it cannot be seen."""
    with Image.open(io.BytesIO(data)) as opened:
        kind = ' class="pixels"' if opened.width < WIDE else ""
        size = f'width="{opened.width}" height="{opened.height}"'
    coded = base64.b64encode(data).decode()
    return f'<img{kind} {size} alt="{html.escape(text)}" src="data:image/png;base64,{coded}">'

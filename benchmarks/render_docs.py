"""Write the tables of the docs from benchmarks/results/*.json, so that no figure is typed by hand.

A page holds a pair of comments; what stands between them is replaced:

    <!-- table: train_step figures -->
    <!-- /table -->

`figures` prints the benchmark's figures, `ratios` its ratios. A figure that is a list of rows becomes a table
with the rows' keys as columns. `python benchmarks/render_docs.py --check` only says whether a page is out of date, and
exits with 1 if so; the tests run that.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- table: (\w+) (\w+) -->\n.*?<!-- /table -->", re.S)


def short(commit: str) -> str:
    """Return a commit as pages name it; the plus sign of a changed tree stays."""
    return commit[:12] + ("+" if commit.endswith("+") else "")


def cell(value: object) -> str:
    """Print one value: floats with four significant digits, a list as its values, the rest as it is."""
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict]) -> str:
    """Print rows of equal keys as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def render(name: str, part: str) -> str:
    """Return the text between the comments for one benchmark."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    content = result[part]
    rows = (
        content if isinstance(content, list) else content.get("rows") if isinstance(content, dict) else None
    )
    if not isinstance(rows, list):
        rows = [{part[:-1]: key, "value": value} for key, value in content.items()]
    origin = f"Source: `benchmarks/results/{name}.json`, commit `{short(str(result['commit']))}`, {result['machine']}."
    return f"{table(rows)}\n\n{origin}"


def rendered(text: str) -> str:
    """Return a page with every block brought up to date."""
    return BLOCK.sub(lambda m: f"<!-- table: {m[1]} {m[2]} -->\n{render(m[1], m[2])}\n<!-- /table -->", text)


def main() -> int:
    """Bring the pages up to date, or with --check say which are not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [page for page in PAGES if page.exists() and rendered(page.read_text()) != page.read_text()]
    for page in stale:
        if not check:
            page.write_text(rendered(page.read_text()))
        print(f"{'out of date' if check else 'updated'}: {page.relative_to(ROOT)}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    raise SystemExit(main())

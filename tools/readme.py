#!/usr/bin/env python3
"""Make README.md from nbs/index.ipynb, or check with --check that it is current.

    python tools/readme.py [--check]

Cells marked `#| hide` are dropped, directives are removed from the code that is shown, and
links to a neighbouring notebook become links from the top folder.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)


def readme() -> str:
    "The text of README.md."
    nb = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not re.search(r"^\s*#\s*\|\s*hide\s*$", c.source, re.M)]
    for cell in nb.cells:
        cell.source = DIRECTIVE.sub("", cell.source)
        for output in cell.get("outputs", []):
            if any(kind.startswith("image/") for kind in output.get("data", {})):
                sys.exit(
                    """index.ipynb: show figures as ![alt](file) in a text cell, not as a cell's
                    output"""
                )
    nb.metadata["language_info"] = {"name": "python"}  # the name on the code fences
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"\]\((?!https?:|#|/|mailto:|\.\./)([^)\s]+)\)", r"](nbs/\1)", text)
    text = text.replace("](../", "](")
    return (
        "<!-- made from nbs/index.ipynb by tools/readme.py: edit there -->\n\n"
        + text.strip()
        + "\n"
    )


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--check", action="store_true", help="compare, write nothing")
    args = ap.parse_args()
    path, text = root / "README.md", readme()
    if args.check:
        if path.read_text(encoding="utf-8") != text:
            print(
                "README.md differs from nbs/index.ipynb: run python tools/readme.py",
                file=sys.stderr,
            )
            return 1
        return 0
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

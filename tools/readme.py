#!/usr/bin/env python3
"""Make README.md from nbs/index.ipynb, or check with --check that it is current.

    python tools/readme.py [--check]

Cells marked `#| hide` are dropped, and the code of those that JupyterLab collapses; directives are
removed from the code that is shown; a figure becomes a file in docs/; links to a neighbouring
notebook become links from the top folder. Addresses stand in settings.ini alone: `{git_url}`, and
`colab:NOTEBOOK` for one that opens in Colab.
"""

import argparse
import base64
import re
import sys
from pathlib import Path

import nbformat
from book import addressed
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)
ALT = re.compile(r"^\s*#\s*\|\s*fig-alt:\s*(.*)$", re.M)


def pictures(nb) -> dict:
    "File in docs/ -> (bytes, alternative text) of each figure of the index, in order."
    found = {}
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                name, alt = f"readme_{len(found) + 1}.png", ALT.search(cell.source)
                if not alt:
                    sys.exit(f"index.ipynb: the cell {cell.source[:60]!r} has no #| fig-alt")
                found[name] = base64.b64decode(output["data"]["image/png"]), alt[1]
    return found


def readme() -> tuple:
    "The text of README.md, and its pictures."
    nb = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not re.search(r"^\s*#\s*\|\s*hide\s*$", c.source, re.M)]
    images = pictures(nb)
    names, cells = iter(images.items()), []
    for cell in nb.cells:
        collapsed = cell.metadata.get("jupyter", {}).get("source_hidden")
        drawn = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if drawn:
            name, (_, alt) = next(names)
            cells.append(nbformat.v4.new_markdown_cell(f"![{alt}](../docs/{name})"))
        elif not (collapsed and not cell.get("outputs")):
            cell.source = "" if collapsed else DIRECTIVE.sub("", cell.source)
            cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}  # the name on the code fences
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = addressed(re.sub(r"```python\s*```", "", text))
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = re.sub(r"\]\((?!https?:|#|/|mailto:|\.\./)([^)\s]+)\)", r"](nbs/\1)", text)
    text = text.replace("](../", "](").strip()
    return f"<!-- made from nbs/index.ipynb by tools/readme.py: edit there -->\n\n{text}\n", images


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--check", action="store_true", help="compare, write nothing")
    args = ap.parse_args()
    path, (text, images) = root / "README.md", readme()
    if args.check:
        gone = [name for name in images if not (root / "docs" / name).exists()]
        if gone or path.read_text(encoding="utf-8") != text:
            print("README.md differs from index.ipynb: python tools/readme.py", file=sys.stderr)
            return 1
        return 0
    for name, (picture, _) in images.items():
        (root / "docs" / name).write_bytes(picture)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Build the site from the committed notebooks, without running them; any warning is an error.

    pip install -e '.[docs]'
    python docs/build.py [--out _docs]

One page per chapter and per module, the map of the paper's statements, the errata, the glossary,
the
bibliography and all public names. Pages, pictures, search and formulas need no network.
"""

import argparse
import importlib.util
import json
import re
import shutil
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tools"))
import book  # noqa: E402

REPOSITORY = "{git_url}/blob/{branch}/".format(**book.settings())


# --- pages ---------------------------------------------------------------------------------


def text_of(cell) -> str:
    """A text cell for the site: badges become words, links to files of the repository leave the
    site."""
    text = re.sub(r"\[!\[([^\]]*)\]\([^)]*\)\]\(([^)]*)\)", r"[\1](\2)", book.source(cell))
    text = text.replace("](../docs/CHANGELOG.md)", "](changelog.md)")
    text = re.sub(
        r"(?<=\]\()([\w/.]*\.ipynb)?#[^)\s]+", lambda m: m[0].lower(), text
    )  # names of headings
    text = text.replace("](../.github/CONTRIBUTING.md)", "](contributing.md)").replace(
        "](../docs/", "]("
    )
    return book.addressed(re.sub(r"\]\(\.\./([^)]*)\)", rf"]({REPOSITORY}\1)", text))


def staged(path: Path) -> dict:
    """A notebook for the site: no hidden cells, no directives, a name on every cell, a text for
    every figure."""
    alt, cells = {i: a for p, i, a in book.figures() if p == path}, []
    for i, cell in enumerate(book.cells(path)):
        found = book.directives(cell)
        if {"hide", "default_exp"} & found.keys():
            continue
        name = f"({path.stem}-{i})="
        if cell["cell_type"] == "markdown":
            cells.append(dict(cell, source=f"{name}\n{text_of(cell)}", metadata={}))
            continue
        code = book.DIRECTIVE.sub("", book.source(cell)).strip("\n")
        metadata = dict(mystnb=dict(image=dict(alt=alt[i]))) if i in alt else {}
        if cell["metadata"].get("jupyter", {}).get("source_hidden"):  # collapsed in JupyterLab too
            metadata["tags"] = ["hide-input"]
        cells.append(dict(cell_type="markdown", id=f"at-{i}", source=name, metadata={}))
        cells.append(dict(cell, source=code, metadata=metadata, execution_count=None))
    meta = dict(
        kernelspec=dict(name="python3", display_name="Python 3", language="python"),
        language_info=dict(name="python"),
    )
    return dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5)


def cell_text(text: str) -> str:
    "Text that may stand in a table."
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def code(text: str) -> str:
    return f"`{cell_text(text)}`" if text else ""


def anchor(module: str, name: str) -> str:
    "The target of a public name; `Fit` and `fit` are two."
    kind = next(d["kind"] for d in book.api(module)[1] if d["name"] == name)
    return f"{module}.{kind}.{name}"


def visible(path: Path, i: int) -> int:
    "The cell itself, or the last one shown before it."

    def hidden(cell):
        return {"hide", "default_exp"} & book.directives(cell).keys()

    return max(j for j, cell in enumerate(book.cells(path)[: i + 1]) if not hidden(cell))


def definition(d: dict, module: str, level: str = "##", owner: str = "") -> list:
    "The lines of a module's page about one name."
    path = book.modules()[module]
    lines = [] if owner else [f"({anchor(module, d['name'])})="]
    lines += [f"{level} {owner}{'.' if owner else ''}{d['name']}", "", d["doc"], ""]
    if not owner:
        i = visible(path, book.exporting_cell(path, d["name"]))
        lines += [f"*Defined and tried out in* [{book.title(path)}](#{path.stem}-{i})", ""]
    if d["rows"]:
        kind = "field" if d["kind"] == "class" else "parameter"
        lines += [f"| {kind} | type | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| {code(n)} | {code(t)} | {code(v)} | {cell_text(m)} |" for n, t, v, m in d["rows"]
        ]
        lines.append("")
    if any(d["back"]):
        lines += [f"**Returns** {code(d['back'][0])} {d['back'][1]}", ""]
    for m in d["methods"]:
        lines += definition(m, module, level + "#", d["name"])
    return lines


def module_page(module: str) -> str:
    path, (about, names) = book.modules()[module], book.api(module)
    head = [f"# {module}", "", about + ".", "", f"Chapter: [{book.title(path)}]({path.name}).", ""]
    return "\n".join(head + [line for d in names for line in definition(d, module)])


def names_page() -> str:
    lines = [
        "# All public names",
        "",
        "One line each; the link leads to the parameters, and from there to the chapter.",
        "",
    ]
    for module, path in book.modules().items():
        lines += [
            f"## `fairmix_nb.{module}`",
            "",
            f"[{book.title(path)}]({path.name})",
            "",
            "| name | meaning |",
            "|---|---|",
        ]
        lines += [
            f"| [{d['name']}](#{anchor(module, d['name'])}) | {cell_text(d['doc'])} |"
            for d in book.api(module)[1]
        ] + [""]
    return "\n".join(lines)


def map_page() -> str:
    "Statement -> section -> function -> check, for every numbered statement of the paper."
    where = {d["name"]: m for m in book.modules() for d in book.api(m)[1]}
    lines = [
        "# Where the paper's statements are",
        "",
        """Made from the notebooks: a statement is found by its tag or its name, a function by the
        source in its"""
        "docstring or its use in the section, a check by what it asserts. Each number in the last column is a cell that can fail.",  # noqa: E501
        "",
        "| statement | section | functions | checks |",
        "|---|---|---|---|",
    ]
    for statement, places in book.statements().items():
        for k, (path, start, text, functions, home, tested) in enumerate(places):
            listed = ", ".join(f"[{f}](#{anchor(where[f], f)})" for f in functions)
            cells = ", ".join(
                f"[{n}](#{home.stem}-{visible(home, i)})" for n, (i, _) in enumerate(tested[:6], 1)
            )
            kinds = ", ".join(dict.fromkeys(kind for _, found in tested[:6] for kind in found))
            lines.append(
                f"| {statement if not k else ''} | [{cell_text(text)}](#{path.stem}-{start}), chapter {path.stem[:2]} | {listed} | "  # noqa: E501
                f"{cells}{' (' + kinds + ')' if kinds else ''} |"
            )
    return "\n".join(lines)


def errata_page() -> str:
    path = book.NBS / "04_remarks.ipynb"
    i = next(
        i for i, c in enumerate(book.cells(path)) if book.source(c).startswith("| where | printed")
    )
    return (
        f"# Errata\n\nEach row but the last, which is wording, has a cell of [{book.title(path)}]({path.name}) in which the printed form fails and the corrected one passes.\n\n"  # noqa: E501
        f"{book.source(book.cells(path)[i])}\n"
    )


def bibliography_page() -> str:
    "The list, and behind each entry the chapters that lean on it."
    texts = {p: " ".join(book.source(c) for c in book.cells(p)) for p in book.chapters()}
    out = []
    for line in (DOCS / "bibliography.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("- **"):
            users = [
                f"[{p.stem[:2]}]({p.name})"
                for p, text in texts.items()
                if book.leans_on(text, line)
            ]
            line += f" *Chapters {', '.join(users)}.*" if users else ""
        out.append(line)
    return "\n".join(out)


def mend_data() -> str:
    "The committed matrices of a CIFAR-10 network, as a script: a page opened from a disk reads it."
    record = json.loads((book.NBS / "results" / "cifar_mend" / "resnet20-s0.json").read_text())
    test = record["matrices"]["test"]
    found = {k: test[k] for k in ("y", "margins", "clean")}
    found.update(classes=record["classes"], choices=record["choices"])
    return f"window.MEND = {json.dumps(found)};\n"


def entry(path: Path) -> str:
    "A chapter's line in the contents."
    return f"{int(path.stem[:2])} · {book.title(path)} <{path.stem}>"


def toctree(caption: str, names: list) -> str:
    "A part of the contents, shown at the side."
    return "\n".join(["```{toctree}", f":caption: {caption}", ":hidden:", "", *names, "```", ""])


def stage(to: Path) -> None:
    "Everything Sphinx reads."
    for path in book.chapters():
        (to / path.name).write_text(json.dumps(staged(path)), encoding="utf-8")
    index = staged(book.NBS / "index.ipynb")
    contents = [
        toctree("Start", [entry(book.chapters()[0])]),
        *[toctree(part, [entry(p) for p in paths]) for part, paths in book.parts().items()],
        toctree(
            "Reference",
            [
                "mend_explorer",
                "map",
                "errata",
                "names",
                "glossary",
                "bibliography",
                "contributing",
                "changelog",
            ],
        ),
        toctree("Modules", [f"modules/{m}" for m in book.modules()]),
    ]
    index["cells"].append(
        dict(cell_type="markdown", id="contents", metadata={}, source="\n".join(contents))
    )
    (to / "index.ipynb").write_text(json.dumps(index), encoding="utf-8")
    (to / "modules").mkdir()
    for module in book.modules():
        page = re.sub(r"\]\((\d\d_\w+\.ipynb)\)", r"](../\1)", module_page(module))
        (to / "modules" / f"{module}.md").write_text(page, encoding="utf-8")
    for name, page in dict(
        map=map_page(), errata=errata_page(), names=names_page(), bibliography=bibliography_page()
    ).items():
        (to / f"{name}.md").write_text(page, encoding="utf-8")
    glossary = (DOCS / "glossary.md").read_text(encoding="utf-8")
    (to / "glossary.md").write_text(glossary.replace("](../nbs/", "]("), encoding="utf-8")
    shutil.copy(DOCS / "CHANGELOG.md", to / "changelog.md")
    contributing = (DOCS.parent / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (to / "contributing.md").write_text(contributing.replace("](../nbs/", "]("), encoding="utf-8")
    shutil.copy(DOCS / "conf.py", to)
    (to / "_static").mkdir()
    for name in ("book.css", "icon.svg", "mend_explorer.js"):
        shutil.copy(DOCS / name, to / "_static")
    explorer = (DOCS / "mend_explorer.md").read_text(encoding="utf-8")
    (to / "mend_explorer.md").write_text(explorer.replace("](../nbs/", "]("), encoding="utf-8")
    (to / "_static" / "mend_data.js").write_text(mend_data(), encoding="utf-8")
    mathjax = (
        Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
        / "static"
        / "mathjax"
    )
    for part in ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions"):
        copy = shutil.copytree if (mathjax / part).is_dir() else shutil.copy
        (to / "_static" / "mathjax" / part).parent.mkdir(parents=True, exist_ok=True)
        copy(mathjax / part, to / "_static" / "mathjax" / part)


# --- checks of what was built --------------------------------------------------------------


class Page(HTMLParser):
    "The names, links, pictures and words of a page."

    def __init__(self, text):
        super().__init__()
        self.names, self.links, self.loads, self.silent, self.words, self.open = (
            set(),
            [],
            [],
            [],
            [],
            [],
        )
        self.feed(text)

    def handle_data(self, data):
        if not self.open:
            self.words.append(data)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        apart = (
            tag in ("script", "style", "pre", "code") or "math" in (a.get("class") or "").split()
        )
        if (
            apart or self.open and tag == self.open[-1]
        ):  # code and formulas; a tag of the same kind nests in them
            self.open.append(tag)
        self.names |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if (
            tag in ("img", "script", "iframe")
            and a.get("src")
            or tag == "link"
            and a.get("rel") in ("stylesheet", "preload")
        ):
            self.loads.append(a.get("src") or a.get("href"))
        if tag == "img" and not (a.get("alt") or "").strip() and "aria-hidden" not in a:
            self.silent.append(a.get("src"))


def problems(site: Path) -> list:
    """Links that lead nowhere, pictures without a text, whatever a page would fetch from another
    host."""
    pages = {
        p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8"))
        for p in site.rglob("*.html")
    }
    found = []
    for name, page in pages.items():
        found += [f"{name}: picture without a text: {src}" for src in page.silent]
        found += [
            f"{name}: a formula as raw text: {raw}"
            for raw in re.findall(
                r"\$\$.{0,40}|\\(?:frac|tag|text|sqrt)\b.{0,40}", "".join(page.words)
            )
        ]
        for link in page.loads + page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                found += [f"{name}: fetches {link}"] * (
                    link in page.loads and parts.scheme != "data"
                )
                continue
            target, fragment = urldefrag(link)
            path = (
                ((site / name).parent / unquote(target).split("?")[0]).resolve()
                if target
                else site / name
            )
            path = path / "index.html" if path.is_dir() else path
            if not path.is_file():
                found.append(f"{name}: no such page: {link}")
            elif fragment and path.suffix == ".html":
                there = pages[path.relative_to(site.resolve() if target else site).as_posix()]
                found += [f"{name}: no such place: {link}"] * (
                    unquote(fragment) not in there.names | {"", "top"}
                )
    return found


def build(out: Path, quiet: bool = True) -> list:
    "Build into `out`; what is wrong with it."
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as temporary:
        source, site = Path(temporary, "source"), Path(temporary, "site")
        source.mkdir()
        stage(source)
        code = build_main(
            [
                "-b",
                "html",
                "-W",
                "--keep-going",
                "-q" if quiet else "-v",
                "-j",
                "auto",
                str(source),
                str(site),
            ]
        )
        if code:
            return [f"Sphinx ended with {code}"]
        for rest in (".doctrees", "_sources", ".buildinfo", "objects.inv"):
            path = site / rest
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (site / ".nojekyll").touch()
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site, out)
    return problems(out)


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument(
        "--out",
        type=Path,
        default=DOCS.parent / "_docs",
        help="folder of the site (default: _docs)",
    )
    args = ap.parse_args()
    start = time.time()
    found = build(args.out)
    print(*found, sep="\n", file=sys.stderr)
    size = (
        sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
        if args.out.exists()
        else 0
    )
    print(
        f"{args.out}: {len(list(args.out.rglob('*.html')))} pages, {size / 1e6:.1f} MB, {time.time() - start:.0f} s, {len(found)} problems"  # noqa: E501
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""The map of statements, the figures' texts, links, names and sources: read off the notebooks,
nothing is run."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "docs")]
import book  # noqa: E402
import build  # noqa: E402

EVERY = [book.NBS / "index.ipynb", *book.chapters()]


def texts(path):
    return "\n\n".join(book.source(c) for c in book.cells(path) if c["cell_type"] == "markdown")


@pytest.mark.parametrize("statement", book.STATEMENTS)
def test_every_statement_of_the_paper_has_its_section_function_and_check(statement):
    places = book.statements()[statement]
    assert places, f"{statement} is stated in no chapter"
    assert any(functions and tested for _, _, _, functions, _, tested in places), places


def test_the_map_would_notice_a_missing_statement():
    assert book.mentions("Thms 3, 4, eqs. (5)-(7), Props 1-2") == {
        "Theorem 3",
        "Theorem 4",
        "(5)",
        "(6)",
        "(7)",
        "Proposition 1",
        "Proposition 2",
    }
    cell = dict(
        cell_type="markdown",
        source=["> **Theorem 3.** *With*\n", "> $$x\\tag{20, 37}$$\n", "Remark 2 is named only."],
    )
    assert (
        book.claimed(cell) == {"Theorem 3", "(20)", "(37)"}
        and book.heads(cell, "(37)") == "Theorem 3"
    )
    assert not book.checks(book.NBS / "01_gaussian.ipynb", 13, 14)  # a cell that only displays


def test_every_figure_has_a_text_of_its_own():
    figures = book.figures()
    assert len(figures) >= 50
    for path, i, alt in figures:
        assert 40 <= len(alt) <= 400 and not re.search(r"[\\$\n]", alt), (path.name, i, alt)
    assert len({alt for *_, alt in figures}) == len(figures)
    for path in EVERY:
        assert all(alt.strip() for alt in re.findall(r"!\[([^\]]*)\]\(", texts(path))), path.name
        html = [
            "".join(o["data"]["text/html"])
            for c in book.cells(path)
            if c["cell_type"] == "code"
            for o in c["outputs"]
            if "text/html" in o.get("data", {})
        ]
        assert not [
            h
            for h in html
            for tag in re.findall(r"<img[^>]*>", h)
            if not re.search(r'alt="[^"]+', tag)
        ], path.name


@pytest.mark.parametrize(
    "path",
    EVERY + [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(path):
    text = texts(path) if path.suffix == ".ipynb" else path.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:|colab:", link):
            continue
        target, _, place = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), link
        if place and there.suffix == ".ipynb":
            slugs = {
                re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-")
                for _, _, t in book.headings(there)
            }
            assert place in slugs | {t.replace(" ", "-") for _, _, t in book.headings(there)}, link


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)
def test_a_chapter_is_called_by_the_number_of_its_file(path):
    for number, file in re.findall(r"[cC]hapters? (\d+)\]\((\d\d)_", texts(path)):
        assert int(number) == int(file), f"chapter {number} links to {file}"


@pytest.mark.parametrize("module", book.modules())
def test_every_public_name_says_what_it_is(module):
    about, names = book.api(module)
    exec_all = re.search(
        r"__all__ = \[(.*?)\]", (ROOT / "fairmix_nb" / f"{module}.py").read_text(), re.S
    )[1]
    assert about and [d["name"] for d in names] == re.findall(r"'(\w+)'", exec_all)
    for d in names:
        assert d["doc"], f"{module}.{d['name']} has no docstring"
        assert book.exporting_cell(book.modules()[module], d["name"]) >= 0
        if d["kind"] == "function":
            assert all(meaning for *_, meaning in d["rows"]), (d["name"], d["rows"])


def test_every_cited_work_is_in_the_bibliography():
    for path in EVERY:
        missing = (
            book.citations(" ".join(book.source(c) for c in book.cells(path)))
            - book.entries().keys()
        )
        assert not missing, f"{path.name} cites {missing}: add an entry to docs/bibliography.md"
    listed = (book.ROOT / "docs" / "bibliography.md").read_text(encoding="utf-8").count("\n- **")
    assert len(book.entries()) == listed == build.bibliography_page().count("\n- **")
    assert book.citations("by Madry et al. 2018, sec. 2; Gini (1912); ICLR 2015") == {
        ("Madry", "2018"),
        ("Gini", "1912"),
    }


def test_the_glossary_binds_names_that_exist():
    known = {"y", "z", "'any'", "at", "mixup", "any_mix"}
    for module in book.modules():
        for d in book.api(module)[1]:
            known |= {d["name"], *(r[0] for r in d["rows"]), *(m["name"] for m in d["methods"])}
    for row in re.findall(r"^\| (.*) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.M):
        for name in re.findall(r"`([^`]+)`", row.split(" | ")[1]):
            assert name in known or name.startswith("("), name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("myst_nb", reason="pip install -e '.[docs]'")
    assert build.build(tmp_path / "site") == []
    page = tmp_path / "site" / "index.html"
    page.write_text(
        page.read_text()
        .replace('href="map.html"', 'href="gone.html"')
        .replace("</main>", '<img src="x.png"></main>')
    )
    found = build.problems(tmp_path / "site")
    assert any("gone.html" in f for f in found) and any(
        "picture without a text" in f for f in found
    )

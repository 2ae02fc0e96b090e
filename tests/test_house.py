"The rules of the house: what a reader of the tree may rely on."

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import book

ROMAN = dict(zip(book.PARTS, ("I", "II", "III", "IV", "V")))
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def module_of(path):
    found = [
        m[1] for c in cells(path) if (m := re.search(r"^#\|\s*default_exp (\w+)", source(c), re.M))
    ]
    assert len(found) <= 1, f"{path.name} exports to {found}"
    return found[0] if found else None


MODULES = {module_of(p): p.name for p in NOTEBOOKS if module_of(p)}


def exported(path):
    return [source(c) for c in cells(path) if re.match(r"\s*#\|\s*exporti?\b", source(c))]


def test_every_module_has_its_notebook():
    assert {p.stem for p in (ROOT / "fairmix_nb").glob("[a-z]*.py")} == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_from_lower_numbers(name):
    text = (ROOT / "fairmix_nb" / f"{name}.py").read_text()
    used = set(
        re.findall(r"^\s*(?:from|import) (?:fairmix_nb)?\.(\w+)", text, re.M)
    )  # nbdev makes them relative
    assert name != "compare" or {"train", "report"} <= used  # the pattern finds what it looks for
    assert name != "compare" or "audit" not in used
    higher = [u for u in used if MODULES[u] >= MODULES[name]]
    assert not higher, f"{MODULES[name]} imports {higher}"


def test_modules_import_without_the_tools_that_make_them():
    barred = ["nbdev", "fastcore", "execnb", "IPython", "ipykernel", "jupyterlab", "foolbox"]
    code = f"""
import importlib, sys
class Bar:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {barred}: raise ImportError('barred: ' + name)
sys.meta_path.insert(0, Bar())
for name in {sorted(MODULES)}: importlib.import_module('fairmix_nb.' + name)
import torch
assert not torch.cuda.is_initialized()
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        env=dict(CUDA_VISIBLE_DEVICES="", PATH="/usr/bin:/bin"),
    )


def definitions(text):
    "Functions, classes and patched methods that a cell defines at its top level."
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n.name for n in ast.parse(text).body if isinstance(n, kinds)]


def code_lines(text):
    "Lines that are neither empty nor a directive."
    return sum(bool(line.strip()) and not line.startswith("#|") for line in text.splitlines())


def speaks(cell):
    "Something is shown or asserted."
    return bool(cell["outputs"]) or bool(
        re.search(r"\b(assert|test_\w+|expect_fail)\b", source(cell))
    )


def imports_only(text):
    nodes = ast.parse(re.sub(r"^[%!].*$", "", text, flags=re.M)).body
    return bool(nodes) and all(isinstance(n, (ast.Import, ast.ImportFrom, ast.Try)) for n in nodes)


def reading(path):
    """What a reader meets: cells, share of definitions shown next, longest silent stretch, longest
    cell."""
    every, shown, defined, silent, longest, cap = cells(path), 0, 0, 0, 0, 0
    for i, cell in enumerate(every):
        text = source(cell)
        if not re.match(r"\s*#\|\s*exporti?\b", text) or "eval: false" in text:
            silent = 0 if speaks(cell) else silent
            continue
        if imports_only(text):
            continue
        names = definitions(text)
        after = next((c for c in every[i + 1 :] if not imports_only(source(c))), None)
        defined += len(names)
        shown += len(names) * bool(speaks(cell) or after and speaks(after))
        silent = 0 if speaks(cell) else silent + code_lines(text)
        longest, cap = max(longest, silent), max(cap, code_lines(text))
    total = len(json.loads(path.read_text())["cells"])
    return dict(
        cells=total, shown=shown / max(defined, 1), silent=longest, cap=cap, defined=defined
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_reader_is_never_left_alone_with_code(path):
    found = reading(path)
    print(path.stem, found)
    for name, most in dict(cells=80, silent=60, cap=45).items():
        assert found[name] <= most, (name, found)
    if path.stem[:2] >= "07" and found["defined"]:
        assert found["shown"] >= 0.65, found
    for cell in cells(path):
        text = source(cell)
        if imports_only(text):
            assert len(re.findall(r"^(?:from|import) ", text, re.M)) <= 12, text
            assert cell["metadata"].get("jupyter", {}).get("source_hidden") or "hide" in text, text


def test_reading_sees_what_it_measures(tmp_path):
    def cell(text, out=False, kind="code"):
        return dict(cell_type=kind, source=text, outputs=[dict(x=1)] if out else [], metadata={})

    many = "#| export\ndef f():\n" + "    x = 1\n" * 40
    path = tmp_path / "a.ipynb"
    path.write_text(
        json.dumps(dict(cells=[cell(many), cell("1 + 1"), cell(many), cell("assert f")]))
    )
    assert reading(path) == dict(cells=4, shown=0.5, silent=82, cap=41, defined=2)
    path.write_text(json.dumps(dict(cells=[cell(many), cell("f()", True), cell(many, True)])))
    assert reading(path) == dict(cells=3, shown=1.0, silent=41, cap=41, defined=2)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_read(path):
    assert path.stat().st_size <= 300_000, f"{path.stat().st_size} bytes"
    outputs = [o for c in cells(path) for o in c["outputs"]]
    errors = [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not errors, errors[:1]
    assert outputs, "no stored output"
    for text in exported(path):
        assert not re.search(r"^from \S+ import \*", text, re.M), text[:200]
        if path.stem != "21_cli":  # the command line speaks
            assert not re.search(r"^\s*print\(", text, re.M), text[:200]
    for cell in cells(path):
        for line in re.findall(r"^.*\bexpect_fail\(.*$", source(cell), re.M):
            assert re.search(r"\bwith\b", line), (
                f"expect_fail without `with` checks nothing: {line}"
            )
        assert not re.search(r"\b(TODO|FIXME|NotImplementedError|XXX)\b", source(cell)), source(
            cell
        )[:200]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_chapter_has_its_place_in_the_book(path):
    if path.stem in ("index", "00_tour"):
        return
    part = next(name for name, numbers in book.PARTS.items() if int(path.stem[:2]) in numbers)
    texts = [source(c) for c in cells(path, "markdown")]
    assert any(f"Part {ROMAN[part]}" in t and part in t for t in texts[:3]), (part, texts[1][:200])


def test_one_formatter_and_linter_for_everything():
    for words in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_nobody_imports_a_private_name():
    for path in [*NOTEBOOKS, *(ROOT / "tools").glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        texts = [source(c) for c in cells(path)] if path.suffix == ".ipynb" else [path.read_text()]
        for text in texts:
            found = re.findall(
                r"^\s*from (?:fairmix_nb)?\.?\w+ import .*\b_(?!_)\w+.*$", text, re.M
            )
            assert not found or path.name == "test_house.py", (path.name, found)


def test_top_level_is_small():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert len(names) <= 15, sorted(names)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "nbs" / "results").glob("*.json")), ids=lambda p: p.stem
)
def test_records_are_readable_and_say_where_they_come_from(path):
    record = json.loads(path.read_text())
    assert path.stat().st_size <= 300_000
    assert record["schema"] == 1 and record["kind"]
    origin = record["provenance"]
    assert {"python", "numpy", "cpu", "threads", "commit"} <= set(origin), sorted(origin)
    if record["kind"] == "comparison":
        from fairmix_nb.compare import Comparison

        c = Comparison(record)
        for m in c.methods:
            for a in c.attacks:
                wrong, y = c.flags(m, a, raw=True)
                totals = [sum(r["attacks"][a]["wrong"]) for r in record["runs"] if r["method"] == m]
                assert wrong.sum() == sum(totals), (m, a)
        widest = max(
            map(len, str(c).split("\n\n")[1].splitlines() + str(c).split("\n\n")[2].splitlines())
        )
        assert widest <= 112, widest  # seven columns


def test_addresses_come_from_settings_alone():
    settings = (ROOT / "settings.ini").read_text()
    user, repo = (re.search(rf"^{k} = (\S+)$", settings, re.M)[1] for k in ("user", "repo"))
    index = "".join(source(c) for c in cells(ROOT / "nbs" / "index.ipynb", "markdown"))
    readme = (ROOT / "README.md").read_text()
    assert "github.com/" not in index.replace("github.com/{user}/{repo}", "")
    assert f"git clone https://github.com/{user}/{repo}" in readme


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    prose = re.sub(
        r"```.*?```|^    .*$|<!--.*?-->|\]\([^)]*\)|!?\[!\[.*", " ", text, flags=re.S | re.M
    )
    assert len(prose.split()) <= 900, len(prose.split())


def test_the_version_is_told_once():
    version = re.search(r"^version = (\S+)$", (ROOT / "settings.ini").read_text(), re.M)[1]
    assert (
        (ROOT / "fairmix_nb" / "__init__.py").read_text().startswith(f'__version__ = "{version}"\n')
    )  # written by nbdev_export
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "docs" / "CHANGELOG.md").read_text()

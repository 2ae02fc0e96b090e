"The rules of the house: what a reader of the tree may rely on."

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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
    assert name != "compare" or {"train", "audit"} <= used  # the pattern finds what it looks for
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_read(path):
    assert path.stat().st_size <= 300_000, f"{path.stat().st_size} bytes"
    outputs = [o for c in cells(path) for o in c["outputs"]]
    errors = [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not errors, errors[:1]
    assert outputs, "no stored output"
    for text in exported(path):
        for f in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)):
            assert f.end_lineno - f.body[0].lineno < 45, (
                f"{f.name} is {f.end_lineno - f.body[0].lineno + 1} lines long"
            )
        assert not re.search(r"^from \S+ import \*", text, re.M), text[:200]
        assert max(map(len, text.splitlines())) <= 100, max(text.splitlines(), key=len)
        if "def main(" not in text:
            assert not re.search(r"^\s*print\(", text, re.M), text[:200]
    for cell in cells(path):
        for line in re.findall(r"^.*\bexpect_fail\(.*$", source(cell), re.M):
            assert re.search(r"\bwith\b", line), (
                f"expect_fail without `with` checks nothing: {line}"
            )
        assert not re.search(r"\b(TODO|FIXME|NotImplementedError|XXX)\b", source(cell)), source(
            cell
        )[:200]


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
        assert widest <= 100, widest


def test_readme_tells_the_errata_of_the_chapter():
    table = lambda name: next(
        source(c)
        for c in cells(ROOT / "nbs" / name, "markdown")
        if source(c).startswith("| where | printed")
    )
    assert table("index.ipynb") == table("04_remarks.ipynb")


def test_the_version_is_told_once():
    version = re.search(r"^version = (\S+)$", (ROOT / "settings.ini").read_text(), re.M)[1]
    assert (
        (ROOT / "fairmix_nb" / "__init__.py").read_text().startswith(f'__version__ = "{version}"\n')
    )  # written by nbdev_export
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "docs" / "CHANGELOG.md").read_text()

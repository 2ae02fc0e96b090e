"The notebook runner and the README maker."

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNNER = [sys.executable, str(ROOT / "tools" / "run_notebooks.py")]


def notebook(path, *sources):
    cells = [
        dict(
            cell_type="code",
            id=f"c{i}",
            metadata={},
            source=s.splitlines(True),
            outputs=[],
            execution_count=None,
        )
        for i, s in enumerate(sources)
    ]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def outputs(path):
    return [
        "".join(o.get("text", o.get("data", {}).get("text/plain", "")))
        for c in json.loads(path.read_text())["cells"]
        for o in c["outputs"]
    ]


def run(*args):
    return subprocess.run([*RUNNER, *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def test_directives_are_obeyed_and_two_runs_agree_to_the_byte(tmp_path):
    path = notebook(
        tmp_path / "a.ipynb",
        "print('one')\nprint('two')",
        "#| eval: false\n1/0",
        "#| slow\n1/0",
        "#| cuda\n1/0",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "import ipywidgets\nipywidgets.IntSlider()",
        "2 + 2",
    )
    assert run(path).returncode == 0
    first = path.read_bytes()
    assert outputs(path)[0] == "one\ntwo\n" and outputs(path)[-1] == "4"
    assert b"widget-view" not in first and b"image/png" in first
    assert run(path).returncode == 0 and path.read_bytes() == first
    assert run("--check", path).returncode == 0
    assert run("--flags", "slow", path).returncode == 1  # the flagged cell is run, and fails


@pytest.mark.parametrize(
    "old, new, same", [("1.0001", "1.0002", True), ("1.01", "1.02", False), ("yes", "no", False)]
)
def test_check_sees_a_changed_output(tmp_path, old, new, same):
    path = notebook(tmp_path / "a.ipynb", f"print('{old}')")
    assert run(path).returncode == 0
    path.write_text(path.read_text().replace(f"print('{old}')", f"print('{new}')"))
    before = path.read_bytes()
    assert (run("--check", path).returncode == 0) == same
    assert path.read_bytes() == before


def test_structure_masks_numbers_only(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "#| structure\nprint('risk 0.31')")
    assert run(path).returncode == 0
    text = path.read_text()
    path.write_text(text.replace("print('risk 0.31')", "print('risk 0.45')"))
    assert run("--check", path).returncode == 0
    path.write_text(text.replace("print('risk 0.31')", "print('risk   0.5')"))  # as a table has it
    assert run("--check", path).returncode == 0
    path.write_text(text.replace("print('risk 0.31')", "print('gain 0.31')"))
    assert run("--check", path).returncode == 1
    path = notebook(path, "#| structure\nprint('[0.24, 0.58]')")
    assert run(path).returncode == 0
    path.write_text(path.read_text().replace("print('[0.24, 0.58]')", "print('[0.22, 0.6 ]')"))
    assert run("--check", path).returncode == 0  # as NumPy pads


def test_readme_is_current():
    subprocess.run([sys.executable, str(ROOT / "tools" / "readme.py"), "--check"], check=True)

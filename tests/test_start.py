"""How much is imported before the first answer, counted: seconds depend on the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "torchvision", "matplotlib", "sklearn", "IPython"}


def modules(code):
    "What Python imports to run `code`, and nothing else."
    call = [sys.executable, "-X", "importtime", "-c", code]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(call, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr[-500:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip() for line in lines[1:]}


@pytest.mark.parametrize(
    "code, most, heavy",
    [
        ("import fairmix_nb", 20, HEAVY | {"numpy", "scipy"}),
        ("from fairmix_nb.cli import parser; parser().format_help()", 60, HEAVY | {"numpy"}),
        ("import fairmix_nb.theory", 1000, HEAVY),
    ],
    ids=("package", "help", "theory"),
)
def test_little_is_imported_before_the_first_answer(code, most, heavy):
    more = modules(code) - modules("pass")
    assert len(more) <= most, (len(more), sorted(more)[:80])
    assert not heavy & more, heavy & more


def test_a_count_would_notice():
    assert HEAVY & modules("import torch"), "what is loaded is seen"


def test_nbdev_test_names_each_notebook_and_takes_one_thread(tmp_path):
    (tmp_path / "settings.ini").write_text(
        "[DEFAULT]\nlib_name = a\nversion = 1\nmin_python = 3.10\nuser = a\nauthor = a\n"
        "author_email = a\nbranch = a\nnbs_path = nbs\nlib_path = a\ntst_flags = slow\n"
    )
    source = (
        "import os\nimport torch\nimport fairmix_nb\n"
        "assert (torch.get_num_threads(), os.environ['OMP_NUM_THREADS']) == (1, '1')"
    )
    cell = dict(cell_type="code", execution_count=None, id="a", metadata={}, outputs=[])
    nb = dict(cells=[cell | dict(source=source)], metadata={}, nbformat=4, nbformat_minor=5)
    (tmp_path / "nbs").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / "nbs" / f"{name}.ipynb").write_text(json.dumps(nb))
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= dict(PYTHONPATH=str(ROOT))
    call = [sys.executable, "-c", "from nbdev.test import nbdev_test; nbdev_test()"]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line for line in done.stderr.splitlines() if line.startswith("testing ")]
    assert sorted(told) == [f"testing {name}.ipynb" for name in ("one", "three", "two")]

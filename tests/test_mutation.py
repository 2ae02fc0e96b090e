"""Wrong formulas planted in copies of the functions: the record tells that the notebooks notice,
the slow test tries again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import mutate  # noqa: E402


@pytest.mark.parametrize("module", mutate.MODULES)
def test_the_notebook_notices_wrong_formulas(module):
    path = ROOT / "nbs" / "results" / "mutation.json"
    record = json.loads(path.read_text()) if path.exists() else dict(modules={})
    if module not in record["modules"]:
        pytest.skip(
            f"not recorded yet: python tools/mutate.py --record {path.relative_to(ROOT)} {module}"
        )
    tally, found = (
        record["modules"][module],
        [m for m in record["mutants"] if m["module"] == module],
    )
    survivors = [m for m in found if m["result"] == "survived"]
    assert tally["sampled"] == len(found) >= 40 and tally["killed"] == len(found) - len(survivors)
    assert all(m["why"] for m in survivors), [m for m in survivors if not m["why"]]
    assert tally["score"] >= 0.95, tally


def test_a_change_is_one_change():
    import ast

    cell = "#| export\ndef f(x, y=1.):\n    'doc'\n    if x < 0: raise ValueError(f'got {x + 1}')\n    return (x - y) / np.sqrt(x)"  # noqa: E501
    told = {m["change"] for m in mutate.mutants(ast.parse(cell))}
    assert told == {
        "1.0 -> 2.0",
        "x < 0 -> x <= 0",
        "0 -> 1",
        "raise ValueError(f'got {x + 1}') -> pass",
        "(x - y) / np.sqrt(x) -> (x - y) * np.sqrt(x)",
        "x - y -> x + y",
        "np.sqrt(x) -> x",
    }, told


@pytest.mark.slow
@pytest.mark.parametrize("module", mutate.MODULES)
def test_it_still_does(module):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "mutate.py"), "--sample", "40", module],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]

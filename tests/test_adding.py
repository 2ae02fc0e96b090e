"""One entry in one registry, as .github/CONTRIBUTING.md says: each is made in a copy of the
package, and the command line and the reports then know the name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLACES = {  # what is added -> module, what stands in its registry, the entry put before it
    "law": ("mixup", '"uniform": stats.uniform()}', '"mostly": stats.beta(8, 2), '),
    "attack": (
        "attacks",
        'Attack("clean", (0, 0), lambda',
        'Attack("still", (0, 0), lambda model, x, y, eps, **kw: x), ',
    ),
    "method": ("methods", "natural=Pipeline(())", 'twice=Pipeline(("attack", "mix")), '),
    "data set": ("data", '"digits": _digits, ', '"pens": _digits, '),
    "model": (
        "models",
        '"small_cnn": small_cnn, ',
        '"line": lambda n, c: nn.Sequential(nn.Flatten(), nn.Linear(64, n)), ',
    ),
    "metric": ("risk", '"avg": lambda risks', '"best": lambda risks: risks.min(-1), '),
}
USE = """
from pathlib import Path

from fairmix_nb.cli import main
from fairmix_nb.gaussian import GaussianPair
from fairmix_nb.tempering import law_threshold

law_threshold(GaussianPair(.6, .4, 1, 1, 1, .7), "mostly")
for words in (
    "compare --data pens --methods twice --model line --seeds 0 --epochs 1 --out c",
    "audit {} --data pens --model line --attacks clean still --out a",
):
    made = next(iter(Path("c").rglob("last.pt")), None)
    assert main(words.format(made).split()) == 0, words
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    top = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "fairmix_nb", top / "fairmix_nb")
    for module, place, entry in PLACES.values():
        path = top / "fairmix_nb" / f"{module}.py"
        assert path.read_text().count(place) == 1, (module, place)
        path.write_text(path.read_text().replace(place, entry + place))
    return top


def test_six_entries_are_enough(copy):
    env = dict(os.environ, PYTHONPATH=str(copy), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=copy, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "best" in done.stdout and "still" in done.stdout and "twice" in done.stdout

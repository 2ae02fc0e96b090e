"""The records behind chapter 14 say all that is needed to trust a number, and their flags are
their counts."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from fairmix_nb.methods import TrainCfg, describe, described
from fairmix_nb.risk import unpack_flags
from fairmix_nb.runs import split_cfg

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results"
RUNS = sorted((RESULTS / "cifar10").glob("*.json"))
ORIGIN = {
    "python",
    "torch",
    "torchvision",
    "numpy",
    "fairmix_nb",
    "cpu",
    "cores",
    "gpu",
    "threads",
    "commit",
    "dirty",
}
SCRIPT = ROOT / "tools" / "cifar_runs.py"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("cifar_runs", SCRIPT)
    module = sys.modules["cifar_runs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_records():
    assert len(RUNS) >= 2 and (RESULTS / "digits_imbalanced.json").exists()


def check_attacks(attacks, n_cls=10, cumulative=True):
    "Counts are the flags' counts, within the images; attacks after FGSM undo no error."
    last = None
    for name, a in attacks.items():
        n, wrong = np.array(a["n"]), np.array(a["wrong"])
        assert n.shape == wrong.shape == (n_cls,) and (0 <= wrong).all() and (wrong <= n).all(), (
            name
        )
        flags, y = unpack_flags(a["flags"], int(n.sum())), np.repeat(np.arange(n_cls), n)
        assert np.bincount(y[flags], minlength=n_cls).tolist() == wrong.tolist(), name
        if cumulative and not a["raw"]:
            assert last is None or not (last & ~flags).any(), name
            last = flags


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_a_run_is_complete(path, script):
    r = json.loads(path.read_text())
    assert path.stat().st_size <= 40_000 and "/tmp" not in path.read_text()
    assert (r["schema"], r["kind"], r["name"]) == (1, "cifar10 run", path.stem)
    assert r["data"]["name"] in ("cifar10", "cifar10 (folder)") and r["data"]["sizes"] == dict(
        train=49_000, val=1000, test=10_000
    )
    assert ORIGIN <= set(r["provenance"])
    assert r["provenance"]["commit"] and r["provenance"]["dirty"] is False
    assert r["seconds"] > 0 and r["gradient_evaluations"] > 0
    run = next(run for run in script.GRID if run.name == r["name"])
    recipe, way = (r["cfg"], r["way"]) if "way" in r else split_cfg(r["cfg"])
    assert TrainCfg(**recipe) == run.cfg  # what came later had its default
    assert describe(described(way)) == describe(run.way)
    assert r["cfg"]["seed"] == r["seed"] and r["epochs_done"] <= r["cfg"]["epochs"]
    assert r["finished"] == (r["epochs_done"] == r["cfg"]["epochs"])
    curves = r["curves"]
    assert curves["epoch"] == list(range(1, r["epochs_done"] + 1))
    assert {"loss", "clean", "fgsm", "pgd-20", "alignment"} <= set(curves)
    assert all(len(v) == r["epochs_done"] for v in curves.values())
    numbers = [v for k, v in curves.items() if k not in ("by_class", "precision")]
    assert all(math.isfinite(x) for v in numbers for x in v)
    if not r["attacks"]:  # trained, its audit still to come: only while the run is unfinished
        assert not r["finished"]
        return
    assert ORIGIN <= set(r["audit"]["provenance"]) and r["audit"]["seconds"] > 0
    assert {"clean", "fgsm", "pgd-50x2", "apgd-ce"} <= set(r["attacks"])
    assert {sum(a["n"]) for a in r["attacks"].values()} == {script.FORMS[r["form"]]["audited"]}
    check_attacks(r["attacks"])
    for name, wrong in r.get("whole", {}).items():  # all test images: the audited ones among them
        audited = r["attacks"][name]
        more = np.subtract(wrong, audited["wrong"])
        assert (more >= 0).all() and (more <= 1000 - np.array(audited["n"])).all()
    for found in r["pairs"]["confusion"].values():
        assert np.array(found).sum(1).tolist() == [100] * 10


def test_runs_are_on_the_same_images():
    records = [json.loads(p.read_text()) for p in RUNS]
    tested = {(r["form"], r["test"]) for r in records if r["attacks"]}
    assert len(tested) == len({form for form, _ in tested})  # the long form audits more images
    assert len({json.dumps(r["data"]["digests"]) for r in records}) == 1


def test_the_imbalanced_digits_are_complete():
    r = json.loads((RESULTS / "digits_imbalanced.json").read_text())
    assert ORIGIN <= set(r["provenance"]) and r["provenance"]["dirty"] is False
    methods = {run["method"] for run in r["runs"]}
    keys = [(run["model"], run["method"], run["seed"], run["falling"]) for run in r["runs"]]
    assert len(set(keys)) == len(keys) == 2 * len(methods) * 3 * 2
    for run in r["runs"]:
        assert run["cfg"].keys().isdisjoint(r["cfg"]) and len(r["cfg"]) + len(run["cfg"]) >= 17
        assert max(run["train"]) / min(run["train"]) == pytest.approx(r["ratio"], rel=0.1)
        assert sum(run["predicted"]) == sum(run["attacks"]["clean"]["n"])
        check_attacks(run["attacks"], cumulative=False)


def test_a_broken_record_is_caught():
    a = dict(n=[4] * 10, wrong=[1] + [0] * 9, flags="gAAAAAA=", raw=True)
    check_attacks(dict(clean=a))
    with pytest.raises(AssertionError):
        check_attacks(dict(clean=dict(a, wrong=[0, 1] + [0] * 8)))
    with pytest.raises(AssertionError):
        check_attacks(
            dict(pgd=dict(a, raw=False), apgd=dict(a, wrong=[0] * 10, flags="AAAAAAA=", raw=False))
        )


def test_the_grid_names_each_run_once(script):
    names = [run.name for run in script.GRID]
    assert len(set(names)) == len(names)
    assert {run.block for run in script.GRID if run.form == "full"} == {1, 2, 3, 4}

"Mending: the solver against brute force and a proven optimum, any module, the command line."

import json
import time
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp
from torch import nn

from fairmix_nb.attacks import Threat
from fairmix_nb.cli import main, parse_objective
from fairmix_nb.compare import compare
from fairmix_nb.data import load
from fairmix_nb.mend import (
    Front,
    by_class,
    explore,
    margins,
    mend,
    mend_at,
    minimax,
    risks_at,
    tie_of,
    with_offsets,
    wrong_at,
)
from fairmix_nb.methods import TrainCfg
from fairmix_nb.models import build
from fairmix_nb.report import attack_errors
from fairmix_nb.runs import load_model
from fairmix_nb.train import fit


def random_matrix(seed, n, C):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % C
    m = rng.normal(size=(C, C))[y] + 0.8 + rng.normal(size=(n, C))
    m[np.arange(n), y] = np.inf
    return m, y


def proven(m, y, level=None, tie=1e-6, big=80.0):
    "By a mixed-integer program: the minimax; with a level, the least average at that level."
    (n, C), rows, low = m.shape, [], []
    for i, k in product(range(n), range(C)):
        if k != y[i]:
            row = np.zeros(C + n + 1)
            row[[y[i], k, C + i]] = 1, -1, big
            rows.append(row), low.append(tie - m[i, k])
    share = np.array([(y == c) / (y == c).sum() for c in range(C)])
    for c in range(C):
        rows.append(np.r_[np.zeros(C), -share[c], 1]), low.append(0)
    cost = np.r_[np.zeros(C + n), 1] if level is None else np.r_[np.zeros(C), share.mean(0), 0]
    top = 1 if level is None else level + 1e-9
    bounds = (
        np.r_[0, np.full(C - 1, -25), np.zeros(n + 1)],
        np.r_[0, np.full(C - 1, 25), np.ones(n), top],
    )
    whole = np.r_[np.zeros(C), np.ones(n), 0]
    found = milp(
        cost, constraints=LinearConstraint(rows, low, np.inf), bounds=bounds, integrality=whole
    )
    assert found.success, found.message
    return found.fun


@pytest.mark.parametrize("C, n, seeds", [(3, 15, 120), (4, 16, 60), (5, 15, 20)])
def test_minimax_is_the_optimum_of_a_mixed_integer_program(C, n, seeds):
    for seed in range(seeds):
        m, y = random_matrix(seed, n, C)
        b, level = minimax(by_class(m, y, 1e-6))
        assert risks_at(m, y, b).max() == pytest.approx(level, abs=1e-12)
        assert proven(m, y) == pytest.approx(level, abs=1e-6), seed


def test_minimax_against_a_fine_grid():
    for seed in range(10):
        m, y = random_matrix(seed, 30, 3)
        level = minimax(by_class(m, y, tie_of(m)))[1]
        grid = np.linspace(-4, 4, 81)
        best = min(risks_at(m, y, [0, u, v]).max() for u in grid for v in grid)
        assert level <= best <= level + 0.1 + 1e-9


def test_the_average_at_a_level_is_near_its_optimum():
    above = []
    for seed in range(30):
        m, y = random_matrix(seed, 18, 3)
        front = Front(m, y)
        level = risks_at(m, y, front.fair).max()
        above.append(risks_at(m, y, front.at_level(level)).mean() - proven(m, y, level))
    assert min(above) > -1e-6  # the program's optimum is one
    assert np.mean(above) < 0.02 and max(above) < 0.12, above


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_equivariant_monotone_and_blind_to_constants(seed, C):
    m, y = random_matrix(seed, 6 * C, C)
    b, level = minimax(by_class(m, y, tie_of(m)))
    order = np.random.default_rng(seed).permutation(C)
    place = np.argsort(order)
    again = minimax(by_class(m[:, order], place[y], tie_of(m)))[1]
    assert again == pytest.approx(level, abs=1e-12)
    assert (wrong_at(m, y, b + 3.5) == wrong_at(m, y, b)).mean() > 0.9  # but for ties
    c, raised = seed % C, b + np.eye(C)[seed % C]
    before, after = risks_at(m, y, b), risks_at(m, y, raised)
    assert after[c] <= before[c] and np.all(np.delete(after - before, c) >= 0)
    assert risks_at(m, y, Front(m, y).fair).max() <= level + 1e-12


def test_ties_are_errors():
    m = np.array([[np.inf, 0.0], [1.0, np.inf]])
    assert wrong_at(m, np.array([0, 1]), [0, 0]).tolist() == [True, False]
    assert wrong_at(m, np.array([0, 1]), [0, 1]).tolist() == [True, False]
    assert wrong_at(m, np.array([0, 1]), [1, 0]).tolist() == [False, True]


def growing(n, C):
    rng = np.random.default_rng(0)
    y = np.arange(n) % C
    m = 1.5 + 0.3 * np.log(C) + 0.3 * rng.normal(size=(C, C))[y] + rng.normal(size=(n, C))
    m[np.arange(n), y] = np.inf
    return m, y


@pytest.mark.slow
@pytest.mark.parametrize("n, C, most", [(10_000, 10, 1.0), (10_000, 100, 60.0)])
def test_the_solver_is_fast(n, C, most):
    m, y = growing(n, C)
    start = time.process_time()
    level = risks_at(m, y, Front(m, y).fair).max()
    seconds = time.process_time() - start
    print(f"{n} images, {C} classes: {seconds:.2f} s")
    assert 0 < level < risks_at(m, y, np.zeros(C)).max()
    assert seconds < most, seconds


@pytest.mark.slow
def test_the_explorer_draws_10_000_images_at_once():
    _, sliders, picture = explore(mend_at(*growing(10_000, 10))).children
    slider, shown, spent = sliders.children[3], set(), []
    for k in range(50):
        start = time.process_time()
        slider.value = 0.3 * slider.max * (-1) ** k + k * slider.step
        spent.append(time.process_time() - start)
        shown.add(picture.value)
    median, late = 1e3 * np.quantile(spent, [0.5, 0.95])
    print(f"a frame: {median:.1f} ms, at the 95th percentile {late:.1f} ms")
    assert len(shown) == 50 and median < 50


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data = load("digits", 0, val_per_class=20, progress=False)
    cfg = TrainCfg(eps=0.1, epochs=4, batch=64, lr=3e-3)
    out = tmp_path_factory.mktemp("mend") / "at"
    net = fit(build("small_cnn", 10, 1), data, cfg, out=out, progress=False, watched=1).model
    return net, data, out


def test_the_matrix_foretells_a_new_attack_on_the_mended_network(trained):
    net, data, _ = trained
    images = data.test.subset(torch.arange(0, 120))
    m = margins(net, images.floats(), images.y, 0.1, steps=10)
    b = np.random.default_rng(0).normal(size=10)
    told = wrong_at(m, images.y.numpy(), b)
    found = attack_errors(with_offsets(net, b), images, 0.1, ("clean", "pgd-20"))
    assert (found["pgd-20"].numpy() & ~told).mean() <= 0.02  # PGD finds hardly anything new
    assert told.mean() >= found["pgd-20"].float().mean() - 0.02


@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.5), ("linf", (0.05,))])
def test_norms_radii_and_modules(norm, eps):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.rand(40, 1, 8, 8, dtype=torch.float64), torch.arange(40) % 3
    done = mend(net, (x, y), Threat(eps, norm), steps=3, batch=17)
    assert done.after.risks().max() <= done.before.risks().max()
    assert torch.allclose(
        done.model(x), net(x) + torch.tensor(done.offsets, dtype=torch.float32).double()
    )
    assert done.offsets.mean() == pytest.approx(0, abs=1e-12)


def test_in_a_comparison(tmp_path):
    cfg = TrainCfg(eps=0.1, epochs=1, batch=64, lr=3e-3)
    how = dict(cfg=cfg, progress=False, attacks=("clean", "pgd-2"), val_per_class=20)
    with pytest.raises(ValueError, match="mend must be one of 'at', got 'trades'"):
        compare("digits", ("at",), (0,), mend=("trades",), **how)
    done = compare("digits", ("at", "natural"), (0,), mend=("at",), out=tmp_path / "c", **how)
    assert done.methods == ["at", "at + mend", "natural"]
    assert "at + mend" in done.table() and "validation images, at least 20" in str(done)
    again = compare(
        "digits", ("at", "natural"), (0,), mend=("at",), out=tmp_path / "c", resume=True, **how
    )
    assert json.dumps(again.record["runs"]) == json.dumps(done.record["runs"])
    plain, mended = done.record["runs"][:2]
    assert len(mended["offsets"]) == 10 and "offsets" not in plain
    assert mended["gradient_evaluations"] == plain["gradient_evaluations"]


def test_command_line(trained, tmp_path, capsys):
    net, data, folder = trained
    out = tmp_path / "fairer"
    words = ["mend", str(folder), "--steps", "2", "--objective", "avg+2", "--out", str(out)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "worst class" in said and "front" in said and "offset" in said
    mended = load_model(out, 10, 1)[0]
    offsets = torch.tensor(json.loads((out / "mended.json").read_text())["offsets"])
    x = data.test.floats()[:20]
    assert torch.allclose(mended(x), net(x) + offsets.float(), atol=1e-4)
    assert main(words) == 2 and "exists" in capsys.readouterr().err
    assert load_model(out, 10, 1)[1]["data"] == data.digest()  # so that another split is refused
    attacks = ["--attacks", "pgd-2", "--test-subset", "3"]  # the radius is in the checkpoint
    assert main(["audit", str(out), *attacks, "--out", str(tmp_path / "audit")]) == 0
    assert main(["mend", str(folder), "--objective", "best"]) == 2
    assert "objective must be worst, a power such as 2, or avg+1" in capsys.readouterr().err


def test_objectives_as_words():
    assert [parse_objective(t) for t in ("worst", "2", "avg+1")] == ["worst", 2.0, ("avg", 1.0)]


def test_a_network_without_hope_is_said():
    m = np.full((60, 3), -1.0)
    y = np.arange(60) % 3
    m[np.arange(60), y] = np.inf
    assert "nothing to mend" in str(mend_at(m, y))


def test_logits_that_are_none():
    with pytest.raises(ValueError, match="logits"):
        mend(nn.Flatten(0), (torch.rand(30, 1, 4, 4), torch.arange(30) % 3), 0.1)


@pytest.mark.parametrize("huge", [1e3, 1e10, 1e300])
def test_one_huge_margin_does_not_drown_the_others(huge):
    "Two classes of three images: at offset zero each loses one, and one point of offset saves it."
    m = np.full((6, 2), np.inf)
    m[:3, 1], m[3:, 0] = [-2.47, huge, 1.19], [5.20, 0.29, -0.31]
    y = np.repeat([0, 1], 3)
    front = Front(m, y)
    assert front.risks(front.fair).tolist() == [1 / 3, 0]
    assert 0.31 < np.diff(front.fair)[0] < 1.19

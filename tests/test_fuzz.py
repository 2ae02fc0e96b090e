"""Malformed records, checkpoints, folders and command lines: a sentence, never a traceback; the
input is never changed."""

import copy
import hashlib
import json
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fairmix_nb.attacks import Threat, attack_by_name
from fairmix_nb.audit import audit
from fairmix_nb.cli import main
from fairmix_nb.data import load
from fairmix_nb.mend import mend_at
from fairmix_nb.mixup import SameClassMixup
from fairmix_nb.records import digest as sha256_of
from fairmix_nb.risk import exact_interval
from fairmix_nb.runs import CHECKPOINT, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
JUNK = [
    None,
    True,
    -1,
    0,
    1e400,
    float("nan"),
    2**80,
    "",
    "x",
    "\u2028",
    [],
    {},
    [[]],
    [1, "a"],
    {"a": 1},
]
ROUNDS = 60


def digest(path):
    return {
        p: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(path).rglob("*"))
        if p.is_file()
    }


def paths(tree, at=()):
    "Every place of a JSON tree."
    yield at
    for key in (
        tree
        if isinstance(tree, dict)
        else range(min(len(tree), 3))
        if isinstance(tree, list)
        else ()
    ):
        yield from paths(tree[key], (*at, key))


def spoil(tree, rng):
    "A copy with one place replaced or removed."
    tree = copy.deepcopy(tree)
    at = rng.choice([p for p in paths(tree) if p])
    there = tree
    for key in at[:-1]:
        there = there[key]
    if rng.random() < 0.3:
        del there[at[-1]]
    else:
        there[at[-1]] = copy.deepcopy(rng.choice(JUNK))
    return tree, at


@pytest.fixture(scope="module")
def record():
    "Two methods, one seed, two attacks of the committed comparison."
    whole = json.loads((ROOT / "nbs" / "results" / "digits.json").read_text())
    whole["config"] |= dict(methods=["natural", "at"], seeds=[0])
    whole["runs"] = [
        r for r in whole["runs"] if r["seed"] == 0 and r["method"] in ("natural", "at")
    ]
    return whole


def said(capsys):
    "What was printed to stderr: one sentence of the tool, or argparse's."
    err = capsys.readouterr().err.strip()
    assert "Traceback" not in err and err.splitlines()[-1].startswith("fairmix"), err
    assert len(err.splitlines()[-1]) > 20
    return err


def test_the_untouched_record_is_shown(record, tmp_path, capsys):
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert (
        main(["show", str(tmp_path / "record.json")]) == 0
        and "pgd-20 risk" in capsys.readouterr().out
    )


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_spoilt_record_is_shown_or_refused_in_a_sentence(record, tmp_path, capsys, seed):
    rng = random.Random(seed)
    bad, at = spoil(record, rng)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(bad))
    before = digest(tmp_path)
    code = main(["show", str(path)])
    assert code in (0, 2), at
    assert code == 0 or said(capsys)
    assert digest(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"\xff\xfe",
        b"\x00" * 99,
        b'{"schema": 1}',
        b'{"schema": 1, "kind": "comparison"}',
        b"[" * 100_000,
    ],
    ids=range(11),
)
def test_what_is_no_record_is_refused(tmp_path, capsys, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    assert main(["show", str(path)]) == 2 and said(capsys)
    assert main(["show", str(tmp_path)]) == 2 and said(capsys)
    assert main(
        ["compare", "--resume", "--out", str(tmp_path), "--methods", "at", "--seeds", "0"]
    ) == 2 and said(capsys)
    assert path.read_bytes() == content


@pytest.mark.parametrize("seed", range(30))
def test_a_spoilt_checkpoint_is_refused(tmp_path, seed):
    rng = random.Random(seed)
    good = tmp_path / "last.pt"
    content = dict(schema=CHECKPOINT, cfg={}, data="x", epoch=1, model={"w": torch.ones(3)})
    torch.save(dict(content, sha256=sha256_of(content)), good)
    assert load_checkpoint(tmp_path)["epoch"] == 1  # unspoilt, it is taken
    raw = bytearray(good.read_bytes())
    kind = seed % 3
    if kind == 0:
        raw = raw[: rng.randrange(len(raw))]
    elif kind == 1:
        torch.save(rng.choice([None, 3, [1], {"schema": 7}, {"a": 1}, "text", torch.ones(2)]), good)
        raw = good.read_bytes()
    else:
        raw = rng.randbytes(rng.randrange(1, 400))
    good.write_bytes(raw)
    with pytest.raises((ValueError, OSError), match="checkpoint"):
        load_checkpoint(tmp_path)
    assert good.read_bytes() == bytes(raw)


def grow(top, rng):
    "A folder that may or may not be a data set."
    for _c in range(rng.randrange(4)):
        folder = (
            top
            / rng.choice(["", "train", "test", "train"])
            / rng.choice(["cat", "dog", "emu", ".hidden", "c d", "ü"])
        )
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(rng.randrange(6)):
            path = folder / f"{i}{rng.choice(['.png', '.png', '.jpg', '.txt', '.PNG', '.tif'])}"
            what = rng.randrange(8)
            if what < 5:
                mode = (
                    rng.choice(["RGB", "RGB", "L", "RGBA", "P", "1", "I;16"])
                    if what == 4
                    else "RGB"
                )
                size = (8, 8) if what < 4 or rng.random() < 0.5 else (rng.randrange(1, 20), 7)
                fit = ".png" if path.suffix in (".txt", ".tif", ".jpg") else path.suffix
                Image.new(mode, size).save(path.with_suffix(fit))
            elif what == 5:
                path.write_bytes(rng.randbytes(rng.randrange(60)))
            elif what == 6:
                path.mkdir()
            else:
                path.symlink_to(folder / "nowhere")


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_any_folder_is_loaded_or_refused_in_a_sentence(tmp_path, monkeypatch, seed):
    monkeypatch.setenv("FAIRMIX_CACHE", str(tmp_path / "cache"))
    rng, top = random.Random(seed), tmp_path / "data"
    top.mkdir()
    grow(top, rng)
    before = digest(top)
    kw = rng.choice(
        [
            {},
            {},
            dict(size=8),
            dict(size=(4, 6)),
            dict(per_class=1),
            dict(size=0),
            dict(size="big"),
            dict(per_class=2.5),
            dict(test_per_class=10**9),
            dict(seed=-1),
        ]
    )
    try:
        found = load(top, progress=False, **kw)
        assert len(found.train) and len(found.val) and len(found.test)
    except (ValueError, OSError) as e:
        assert len(str(e)) > 20, e
    assert digest(top) == before


WORDS = [
    "compare",
    "show",
    "audit",
    "--data",
    "--methods",
    "--seeds",
    "--eps",
    "--epochs",
    "--batch",
    "--model",
    "--subset",
    "--size",
    "--device",
    "--out",
    "--resume",
    "digit",
    "natural",
    "at",
    "0",
    "-1",
    "1e9",
    "8/0",
    "",
    "\u0000",
    "nan",
    "..",
    "/",
    "--",
    "--help-me",
    "8/255",
    "x" * 5000,
]


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_any_command_line_is_refused_in_a_sentence(tmp_path, monkeypatch, capsys, seed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "fairmix_nb.compare.one_run", lambda *a, **k: pytest.skip("a command line that works")
    )
    monkeypatch.setattr("fairmix_nb.compare.processes_for", lambda *a: None)
    rng = random.Random(seed)
    argv = rng.choice([["compare"], ["show"], []]) + rng.choices(WORDS, k=rng.randrange(1, 7))
    try:
        code = main(argv)
    except SystemExit as e:  # argparse: 2, or 0 after printing help
        code = e.code
    assert code in (0, 2), argv
    assert code == 0 or said(capsys)


# ---- ten thousand arguments of the right kind and of odd values


NUMBERS = [0, 1, -1, 0.1, 8 / 255, 1.5, 1e-30, 1e30, math.nan, math.inf, -0.0, True, 10**9]
NUMBERS += [np.float32(0.1), np.float64(0.3), np.int64(3), np.int32(0), np.bool_(True)]
SHAPES = [(4, 1, 3, 3), (1, 1, 3, 3), (4, 2), (0, 2), (4,), (), (4, 1, 3, 3, 1), (2, 3, 1, 1)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.long]
SENTENCES = (ValueError, OSError, RuntimeError, FloatingPointError)


def number(rng):
    return rng.choice(NUMBERS)


def tensor(rng):
    "Mostly images, now and then something else."
    shape = rng.choice(SHAPES) if rng.random() < 0.3 else SHAPES[0]
    t = torch.rand(shape, generator=torch.Generator().manual_seed(rng.randrange(99)))
    if rng.random() < 0.3 and t.numel():
        bad = rng.choice([math.nan, math.inf, -1.0, 1 + 1e-7, 1.001, 300.0])
        t.view(-1)[rng.randrange(t.numel())] = bad
    return t.to(rng.choice(DTYPES) if rng.random() < 0.2 else torch.float32)


def labels(rng):
    n = 4 if rng.random() < 0.8 else rng.randrange(6)
    y = torch.randint(-1 if rng.random() < 0.1 else 0, 3, (n,))
    return y.to(rng.choice(DTYPES)) if rng.random() < 0.1 else y


def odd_models(x):
    "Logits of three classes, or what is none."
    z = x.flatten(1).float() if x.ndim > 1 else x
    w = torch.linspace(-1, 1, z.shape[-1] * 3).view(-1, 3)
    return z @ w


MODELS = [
    odd_models,
    lambda x: odd_models(x).detach(),
    lambda x: odd_models(x) * math.nan,
    lambda x: odd_models(x)[:, :1],
    lambda x: odd_models(x)[:, 0],
    lambda x: (odd_models(x), 1),
    lambda x: dict(logits=odd_models(x)),
    lambda x: odd_models(x).sqrt(),
    lambda x: odd_models(x).softmax(1),
    lambda x: odd_models(x) * 1e30,
]
NAMES = ["clean", "fgsm", "pgd-2", "pgd-1x3", "apgd-ce", "apgd-t", "pgd-0", "", "PGD", "fsgm", 3]


def some_attack(rng):
    threat = Threat(
        number(rng), rng.choice(["linf", "l2", "l1"]), rng.choice([(0, 1), None, (1, 0)])
    )
    names = [rng.choice(NAMES[:5] if rng.random() < 0.8 else NAMES)]
    x, y, net = tensor(rng), labels(rng), odd_models
    g = torch.Generator().manual_seed(0)
    z = attack_by_name(names[0])(net, x, y, threat, generator=g)
    assert z.shape == x.shape
    if threat.box:
        assert threat.box[0] <= z.min() and z.max() <= threat.box[1]
    if threat.norm == "linf" and x.isfinite().all():
        room = 3e-3 * (x.element_size() < 4) + 2e-6
        room += 1e-6 * (threat.eps + x.abs().max().item())  # rounding
        assert (z.double() - x.double()).abs().max() <= threat.eps + room


def some_audit(rng):
    "Two of three are as they should be, but for one thing."
    good = (torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 2, 0]))
    odd = [(tensor(rng), labels(rng)), [(tensor(rng), labels(rng))] * 2, iter([]), 3, None]
    words = dict(data=good, eps=0.1, attacks=("clean", "fgsm"), model=odd_models)
    others = dict(data=odd, eps=NUMBERS, attacks=[NAMES[:2], NAMES[1:3], [], NAMES[3:6], NAMES])
    others.update(model=MODELS, norm=["linf", "l2", "L2"], sweep=[(), (1,), (0,), np.arange(1, 3)])
    others.update(seed=[0, np.int64(1)], batch=[1, 3, np.int64(2), 0], eot=[1, 2, 0])
    others.update(diagnose=[0, 4, 2], quantise=[False, True], classes=[None, "abc", ("a",)])
    for name in rng.sample(list(others), rng.choice([1, 2, 3])):
        words[name] = rng.choice(others[name])
    found = audit(**words, progress=False, device="cpu")
    assert 0 <= np.nanmin(found.risks()) and np.nanmax(found.risks()) <= 1 and str(found)


def some_mixture(rng):
    k, law = (
        rng.choice([2, 3, 1, 0, 2.5, np.int64(2)]),
        rng.choice(["uniform", number(rng), ("beta", 2, 2), (), ("no",)]),
    )
    x, y = tensor(rng), labels(rng)
    z, same = SameClassMixup(rng.choice([3, 2, np.int64(3)]), law, k)(x, y)
    assert z.shape == x.shape and same is y


def some_mend(rng):
    "A matrix of margins, mostly as it should be, and what is asked of it."
    n, n_cls = rng.choice([(12, 3), (40, 4), (6, 2)] * 4 + [(4, 1), (0, 3)])
    draw = np.random.default_rng(rng.randrange(10**6))
    y = np.arange(n) % max(1, n_cls)
    m = draw.normal(1, 2, (n, n_cls))
    m[np.arange(n), y] = np.inf
    if rng.random() < 0.3 and m.size:
        m.flat[rng.randrange(m.size)] = rng.choice([math.nan, math.inf, -math.inf, 1e300, 0.0])
    m = rng.choice([m] * 20 + [m[0:1], m.ravel(), m.T, m.tolist()])
    y = rng.choice([y] * 20 + [y[:-1], y.astype(float), y[:, None], y * 0, y - 1, y.tolist()])
    pair = rng.choice(["worst", "avg", "avarage", 1]), number(rng)
    objective = rng.choice(["worst"] * 4 + [2, ("avg", 1), number(rng), pair, None, "best"])
    found = mend_at(m, y, objective, rng.choice([None] * 8 + ["abc", ("a", "b")]))
    before, after = (s.risks() for s in (found.before, found.after))
    assert np.isfinite(found.offsets).all() and abs(found.offsets.mean()) < 1e-6
    assert (0 <= after).all() and (after <= 1).all() and str(found)
    if objective == "worst":
        assert after.max() <= before.max() + 1e-12


def some_interval(rng):
    n, k = rng.randrange(1, 99), rng.randrange(0, 120)
    low, high = exact_interval(k, n, rng.choice([0.95, 0.5, 1.5, 0, math.nan]))
    assert 0 <= low <= k / n <= high <= 1


def some_command(rng):
    argv = rng.choice([["compare"], ["audit"], ["train"], ["show"], []])
    try:
        code = main(argv + rng.choices([w for w in WORDS if w != "/"], k=rng.randrange(1, 7)))
    except SystemExit as e:
        code = e.code
    assert code in (0, 2)


KINDS = {some_attack: 4000, some_audit: 1500, some_mixture: 2000, some_interval: 1000}
KINDS |= {some_mend: 1000, some_command: 500}


def fuzzed(kind, n, seed=0):
    "How many were done and how many refused; anything but a sentence is an error, with its seed."
    done = refused = 0
    for i in range(n):
        rng = random.Random(f"{kind.__name__} {seed} {i}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind(rng)
            done += 1
        except SENTENCES as e:
            assert len(str(e)) > 15, (i, repr(e))
            refused += 1
        except Exception as e:
            raise AssertionError(f"{kind.__name__} {i}: {type(e).__name__}: {e}") from e
    return done, refused


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_odd_arguments_are_done_or_refused(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fairmix_nb.compare.one_run", lambda *a, **k: {})
    done, refused = fuzzed(kind, 40)
    assert done >= 5 and done + refused == 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_ten_thousand_odd_arguments_are_done_or_refused(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fairmix_nb.compare.one_run", lambda *a, **k: {})
    done, refused = fuzzed(kind, KINDS[kind], seed=1)
    with capsys.disabled():
        print(f"\n{kind.__name__}: {done} done, {refused} refused")
    assert done + refused == KINDS[kind]

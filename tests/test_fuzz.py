"""Malformed records, checkpoints, folders and command lines: a sentence, never a traceback; the
input is never changed."""

import copy
import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from fairmix_nb.cli import main
from fairmix_nb.data import load
from fairmix_nb.records import digest as sha256_of
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

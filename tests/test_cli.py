"""The command `fairmix`, as a user types it: what it prints, what it refuses, and what it leaves
behind."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fairmix_nb.cli import main
from fairmix_nb.compare import compare, preset
from fairmix_nb.data import load
from fairmix_nb.methods import Pipeline, TrainCfg
from fairmix_nb.records import digest
from fairmix_nb.runs import StartWarning, read_checkpoint, read_start
from fairmix_nb.train import fit

QUICK = [
    "compare",
    "--data",
    "digits",
    "--methods",
    "natural",
    "at",
    "--seeds",
    "0",
    "--epochs",
    "1",
]


def make_folder(top, n=12, classes=("cat", "dog"), parts=("",), size=16):
    rng = np.random.default_rng(0)
    for part in parts:
        for i, name in enumerate(classes):
            folder = Path(top) / part / name
            folder.mkdir(parents=True)
            for j in range(n):
                noise = rng.integers(0, 120, (size, size, 3)) + 100 * i
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{j}.png")
    return Path(top)


def refused(capsys, argv, says):
    assert main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error, error
    return error


def test_digits_end_to_end_then_show(tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*QUICK, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "pgd-20 risk" in printed and "minus at" in printed and str(out) in printed
    assert max(map(len, printed.split("Intervals")[0].splitlines())) <= 100
    assert sorted(p.name for p in out.iterdir()) == [
        "at-0",
        "curves.csv",
        "figure.png",
        "natural-0",
        "record.json",
    ]
    before = (out / "record.json").read_bytes()
    assert main(["show", str(out)]) == 0
    assert capsys.readouterr().out == printed
    assert (out / "record.json").read_bytes() == before


def test_folder_of_colour_images(tmp_path, capsys):
    folder = make_folder(tmp_path / "pets", parts=("train", "test"))
    argv = [
        "compare",
        "--data",
        folder,
        "--methods",
        "at",
        "--seeds",
        "0",
        "--epochs",
        "1",
        "--batch",
        "8",
        "--model",
        "small_cnn",
    ]
    fits = [a for a in argv if a not in ("--batch", "8")]  # said once, and done
    assert main([str(a) for a in [*fits, "--out", tmp_path / "fits"]]) == 0
    assert (
        capsys.readouterr().out.count("batch 2 instead of 256: there are 22 training images") == 1
    )
    assert main([str(a) for a in [*argv, "--out", tmp_path / "run"]]) == 0
    assert "cat" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["classes"] == ["cat", "dog"] and record["data"]["sizes"]["test"] == 24
    assert str(tmp_path) not in json.dumps(record["config"])


@pytest.mark.parametrize(
    "extra, says",
    [
        (["--data", "digit"], "did you mean 'digits'"),
        (["--data", "nowhere/at/all"], "must be one of 'digits', 'cifar10' or a folder"),
        (["--methods", "natural", "mixap"], "did you mean 'mixup'"),
        (["--model", "resnet02"], "did you mean 'resnet20'"),
        (["--eps", "8/0"], "a fraction such as 8/255"),
        (["--eps", "nan"], "eps must lie in [0, 1]"),
        (["--eps=-1"], "eps must lie in [0, 1]"),
        (["--eps", "8"], "eps must lie in [0, 1]"),
        (["--epochs", "0"], "epochs must be"),
        (["--batch", "100000"], "batch must be at most"),
        (["--seeds", "0", "0"], "all different"),
        (["--seeds", "0", "3"], "folds of one shuffle"),
        (["--device", "tpu"], "device must be"),
        (["--subset", "0"], "per_class must lie in"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "not/there"], "nothing to resume"),
    ],
)
def test_bad_arguments_are_refused_at_once(capsys, tmp_path, monkeypatch, extra, says):
    monkeypatch.chdir(tmp_path)
    start = time.time()
    refused(capsys, [*QUICK, *extra], says)
    assert time.time() - start < 20
    assert not list(tmp_path.rglob("last.pt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(capsys, tmp_path):
    refused(capsys, [*QUICK, "--device", "cuda", "--out", tmp_path / "x"], "no CUDA GPU")


def test_an_existing_folder_is_never_written_to(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(capsys, [*QUICK, "--out", tmp_path / "mine"], "exists: name another folder")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_resume_with_another_configuration(capsys, tmp_path):
    out = tmp_path / "run"
    assert main([*QUICK, "--out", str(out)]) == 0
    capsys.readouterr()
    refused(
        capsys, [*QUICK, "--eps", "0.2", "--out", out, "--resume"], "another configuration: cfg"
    )
    before = (out / "at-0" / "record.json").read_bytes()
    assert (
        main([*QUICK, "--out", str(out), "--resume"]) == 0
    )  # all is there: nothing is trained again
    assert (out / "at-0" / "record.json").read_bytes() == before


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "is not a record"),
        ("[]", "must hold a record"),
        ('{"schema": 99, "kind": "comparison"}', "schema 1, got (99"),
    ],
)
def test_show_refuses_what_is_not_a_record(capsys, tmp_path, text, says):
    (tmp_path / "record.json").write_text(text)
    refused(capsys, ["show", tmp_path], says)
    assert (tmp_path / "record.json").read_text() == text


def test_show_of_nothing(capsys, tmp_path):
    refused(capsys, ["show", tmp_path / "x"], "no comparison there")


def test_bad_folders(capsys, tmp_path):
    def argv(folder):
        return ["compare", "--data", folder, "--out", tmp_path / "out", "--epochs", "1"]

    (tmp_path / "empty").mkdir()
    refused(capsys, argv(tmp_path / "empty"), "empty")
    lonely = make_folder(tmp_path / "lonely", n=4)
    for p in list((lonely / "dog").iterdir())[1:]:
        p.unlink()
    refused(capsys, argv(lonely), "class 'dog'")
    broken = make_folder(tmp_path / "broken")
    (broken / "cat" / "3.png").write_bytes((broken / "cat" / "3.png").read_bytes()[:60])
    refused(capsys, argv(broken), "3.png")
    mixed = make_folder(tmp_path / "mixed")
    Image.new("RGB", (9, 9)).save(mixed / "cat" / "3.png")
    refused(capsys, argv(mixed), "size")
    assert not (tmp_path / "out").exists()


def test_no_space_left(capsys, tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("fairmix_nb.compare.write_aside", full)
    refused(capsys, [*QUICK, "--out", tmp_path / "run"], "No space left on device")


def started(*argv):
    "The command as a process of its own, which hears Ctrl-C as in a terminal."
    code = "import sys; from fairmix_nb.cli import main; sys.exit(main())"

    def heard():  # a background shell ignores SIGINT
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    call = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.Popen(call, stderr=subprocess.PIPE, text=True, preexec_fn=heard)


def wait_for(*paths, seconds=120):
    end = time.time() + seconds
    while not all(p.exists() for p in paths):
        assert time.time() < end, paths
        time.sleep(0.1)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("procs", [1, 2])
def test_ctrl_c_ends_within_two_seconds_and_names_what_is_kept(tmp_path, procs):
    out, seeds = tmp_path / "run", ["0", "1"][:procs]
    words = ["--methods", "at", "--epochs", "500", "--procs", procs, "--out", out, "--seeds"]
    process = started("compare", *words, *seeds)
    wait_for(*(out / f"at-{s}" / "last.pt" for s in seeds))
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells every process of the group
    start = time.time()
    error = process.communicate(timeout=30)[1]
    assert time.time() - start < 2
    assert process.returncode == 130
    last = error.strip().splitlines()[-1]
    kept = f"{out / 'at-0'}/last.pt (epoch " if procs == 1 else f"checkpoints are kept in {out}"
    assert (
        kept in last and "--resume" in last and "Traceback" not in error and "leaked" not in error
    )
    torch.load(out / "at-0" / "last.pt", weights_only=True)
    for run in out.glob("at-*"):  # nobody goes on in the background
        before = (run / "last.pt").read_bytes()
        time.sleep(0.5)
        assert (run / "last.pt").read_bytes() == before


def test_errors_of_a_process_are_told_as_ones_own(tmp_path, capsys):
    job = dict(methods=("at", "trades"), seeds=(0,), workers=2, progress=False)
    with pytest.raises(FloatingPointError, match="the loss became nan"):
        compare("digits", cfg=dict(epochs=1, lr=1e30), out=tmp_path / "nan", **job)
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="ended from outside.*nothing is kept"):
        compare("digits", {"a": Dies(), "b": Dies()}, (0,), workers=2, progress=False)


class Dies(Pipeline):
    "As if the system had ended the process: no memory left"

    def step(self, run, x, y):
        os.kill(os.getpid(), signal.SIGKILL)


def test_processes_give_the_bits_of_one_run_after_another():
    def without_clock(c):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in c.record["runs"]]

    job = dict(seeds=(0, 1), cfg=dict(epochs=1), progress=False)
    job |= dict(attacks=("clean", "pgd-2"), test_per_class=9)
    told = []
    one = compare("digits", ("attack_mix", "natural"), **job)
    two = compare(
        "digits", ("attack_mix", "natural"), workers=2, on_run=lambda *a: told.append(a[:2]), **job
    )
    assert without_clock(one) == without_clock(two) and str(one.table()) == str(two.table())
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_notes_name_leaking_and_overfitting():
    from fairmix_nb.compare import Comparison
    from fairmix_nb.risk import pack_flags

    record = json.loads(
        (Path(__file__).parent.parent / "nbs" / "results" / "digits.json").read_text()
    )
    sound = " ".join(Comparison(record).notes())
    assert "carries the label" not in sound and "overfitted" not in sound
    for run in record["runs"]:
        if run["method"] == "at":
            n = sum(run["attacks"]["fgsm"]["n"])
            run["attacks"]["fgsm"]["flags"] = pack_flags(np.zeros(n, bool))
            run["attacks"]["pgd-20"]["flags"] = pack_flags(np.ones(n, bool))
    found = " ".join(Comparison(record).notes())
    assert (
        found.count("at: clean") == 2
        and "carries the label" in found
        and "overfitted to one step" in found
    )


def test_every_named_attack_is_open_to_a_comparison(tmp_path):
    names, cfg = ("clean", "fgsm", "pgd-3x2", "apgd-ce"), preset("digits", 1)[1]
    found = compare(
        "digits", ("at",), (0,), cfg=cfg, attacks=names, test_per_class=9, progress=False
    )
    levels = np.stack([found.flags("at", a)[0] for a in names])
    assert (
        levels.shape == (4, 1, 90)
        and (np.diff(levels.astype(int), axis=0) >= 0).all()
        and levels[-1].sum() > levels[0].sum()
    )
    pets = make_folder(tmp_path / "pets")
    with pytest.raises(ValueError, match="'apgd-t' needs at least 4 classes, got 2: use 'apgd-ce'"):
        compare(
            pets, ("at",), (0,), cfg=TrainCfg(batch=8), attacks=("clean", "apgd-t"), progress=False
        )


def test_a_missing_package_is_told_before_any_work(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert main([*QUICK, "--out", str(run)]) == 0
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    never, says = tmp_path / "never", "pip install 'fairmix_nb[autoattack]'"
    refused(capsys, ["audit", run / "at-0", "--attacks", "clean,autoattack", "--out", never], says)
    with pytest.raises(ImportError, match=re.escape(says)):
        compare("digits", ("at",), (0,), attacks=("clean", "autoattack"), out=never, progress=False)
    assert not never.exists()


def test_audit_of_a_run_as_typed(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "audit"
    assert main([*QUICK, "--out", str(run)]) == 0
    job = [
        "audit",
        str(run / "at-0"),
        "--attacks",
        "fgsm,pgd,apgd",
        "--test-subset",
        "9",
        "--sweep",
        "0.5,1",
        "--out",
        str(out),
    ]
    assert main(job) == 0
    printed = capsys.readouterr().out
    assert "90 images of 10 classes, eps 0.1" in printed and "verdict: " in printed
    found = json.loads((out / "audit.json").read_text())
    assert found["config"]["attacks"] == ["clean", "fgsm", "pgd-20", "apgd-ce"]
    before = (out / "journal.jsonl").read_text()
    assert main([*job, "--resume"]) == 0 and (out / "journal.jsonl").read_text() == before
    assert main(["show", str(out)]) == 0 and "verdict: " in capsys.readouterr().out
    refused(capsys, job, "exists: go on with resume")
    refused(capsys, [*job, "--resume", "--seed", "1"], "of another audit: config differ")
    other = [*job[:-1], str(tmp_path / "b")]
    refused(capsys, [*other, "--attacks", "pdg"], "did you mean")
    refused(capsys, [*other, "--attacks", "apgd,fgsm"], "weak to strong")
    refused(capsys, [*other, "--eps", "8"], "[0, 1]")
    refused(capsys, [*other, "--sweep", "a"], "--sweep must hold numbers")
    refused(capsys, [*other, "--model", "resnet18"], "must fit resnet18")
    refused(capsys, [*other, "--subset", "20"], "trained on data with digest")
    for bad in ("none.pt", "bad.pt"):
        (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
        refused(capsys, ["audit", tmp_path / bad], bad)
    assert not (tmp_path / "b").exists(), "nothing is left behind by what is refused"


# a comparison that begins with weights

FEW = dict(attacks=("clean",), test_per_class=9)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "The folds of digits, AT trained on each."
    out = tmp_path_factory.mktemp("base") / "base"
    compare("digits", ("at",), (0, 1, 2), cfg=dict(epochs=1), out=out, progress=False, **FEW)
    return out


def test_a_comparison_begins_with_the_checkpoint_of_each_seed(base, tmp_path, capsys):
    "One start for all folds would have learnt test images of two of them."
    learnt = {x.numpy().tobytes() for x in load("digits", 0, progress=False).train.x}
    tested = [x.numpy().tobytes() for x in load("digits", 1, progress=False).test.x]
    assert sum(x in learnt for x in tested) > 500
    job = ["compare", "--methods", "faal", "--epochs", "1", "--procs", "1"]
    job += ["--test-subset", "9", "--out", tmp_path / "run"]
    refused(capsys, [*job, "--start-from", base / "at-0"], "one for each, {seed} in its path")
    assert not (tmp_path / "run").exists()
    refused(capsys, [*job, "--start-from", base / "at-{seed}", "--seeds", "3"], "does not exist")
    argv = ["train", "--model", "small_cnn", "--seed", "1", "--start-from", base / "at-0"]
    refused(capsys, [*argv, "--eps", "0.1", "--out", tmp_path / "t"], "cut by seed 1 here")
    job = [str(a) for a in (*job, "--start-from", base / "at-{seed}")]
    assert main(job) == 0 and main([*job, "--resume"]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    starts = [digest(read_start(base / f"at-{seed}")) for seed in (0, 1, 2)]
    assert record["identity"]["start_from"] == starts and len(set(starts)) == 3
    for seed, start in enumerate(starts):
        assert read_checkpoint(tmp_path / "run" / f"faal-{seed}" / "last.pt")["start_from"] == start


def test_one_seed_begins_with_one_checkpoint(base):
    kw = dict(cfg=dict(epochs=1), start_from=base / "at-1", progress=False, **FEW)
    record = compare("digits", ("at",), (1,), **kw).record
    assert record["identity"]["start_from"] == digest(read_start(base / "at-1"))
    for seeds in [(0,), (1, 2), (0, 1, 2)]:
        with pytest.raises(ValueError, match="cut by seed 1: begin with a run of the same cut"):
            compare("digits", ("at",), seeds, **kw)


@pytest.mark.parametrize("workers", [None, 2])
def test_what_is_not_known_of_a_start_is_told_once_and_noted(base, tmp_path, workers, capfd):
    torch.save(read_start(base / "at-0"), tmp_path / "theirs.pt")
    kw = dict(cfg=dict(epochs=1), progress=False, workers=workers, **FEW)
    for methods, start, says in [
        (("at", "natural"), tmp_path / "theirs.pt", "start_from does not say what it was trained"),
        (("at", "frl", "faal"), None, "frl, faal: the method is a fine-tuning of a robust"),
    ][: 1 if workers else 2]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = compare("digits", methods, (0, 1), start_from=start, **kw)
        said = [str(w.message) for w in told if w.category is StartWarning]
        assert len(said) == 1 and said[0].startswith(says)
        assert said[0] in found.record["notes"] and said[0] in str(found)
    assert "StartWarning" not in capfd.readouterr().err


def test_a_function_gets_the_start_or_says_that_it_cannot(base):
    got = []

    def mine(model, data, cfg, *, start_from=None, **kw):
        got.append(start_from)
        return fit(model, data, cfg, "natural", start_from=start_from, **kw)

    def deaf(model, data, cfg, out, device, progress, watched):
        raise AssertionError("called")

    kw = dict(cfg=dict(epochs=1), progress=False, **FEW)
    compare("digits", (mine,), (0, 1), start_from=base / "at-{seed}", **kw)
    compare("digits", (mine,), (0,), **kw)
    assert got == [base / "at-0", base / "at-1", None]
    with pytest.raises(ValueError, match="must be an argument of every method, deaf has none"):
        compare("digits", ("at", deaf), (0,), start_from=base / "at-0", **kw)

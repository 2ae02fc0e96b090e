"""The audit under bad conditions: large sets, kills, models that misbehave, the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from fairmix_nb.attacks import Threat
from fairmix_nb.audit import DIAGNOSIS, audit
from fairmix_nb.data import load
from fairmix_nb.diagnosis import Counted, Subject, attackable, diagnosis
from fairmix_nb.models import small_cnn
from fairmix_nb.report import load_outcome

QUIET = dict(progress=False, device="cpu")


@pytest.fixture(scope="module")
def digits():
    return load("digits").test


def run(code):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )


SLOW_AUDIT = """
import torch
from fairmix_nb.audit import audit
from fairmix_nb.data import load
from fairmix_nb.models import build
images = load('digits').test.subset(slice(160))
audit(build('small_cnn', 10, 1, 0), images, .1, ('clean', 'fgsm', 'pgd-3', 'pgd-5'),
      batch=8, diagnose=10, out={out!r}, resume={resume}, progress=False, device='cpu')
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    out, whole = tmp_path / "a", tmp_path / "whole"
    assert run(SLOW_AUDIT.format(out=str(whole), resume=False)).wait(120) == 0
    victim = run(SLOW_AUDIT.format(out=str(out), resume=False))
    journal, start = out / "journal.jsonl", time.time()
    while not (journal.exists() and len(journal.read_text().splitlines()) > 20):
        assert victim.poll() is None and time.time() - start < 120, "ended before it was killed"
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait(20)
    before = journal.read_text()
    kept = before[: before.rfind("\n") + 1].splitlines()
    again = run(SLOW_AUDIT.format(out=str(out), resume=True))
    assert again.wait(120) == 0, again.stdout.read()
    assert journal.read_text().splitlines()[: len(kept)] == kept, "finished work is not done again"
    keys = [json.loads(line)[0] for line in journal.read_text().splitlines()[1:]]
    assert len(keys) == len(set(keys))
    one, two = load_outcome(whole), load_outcome(out)
    for attack in one.attacks:
        assert np.array_equal(one.flags(attack, raw=True), two.flags(attack, raw=True))
    assert one.record["diagnosis"] == two.record["diagnosis"]


PEAK = """
import resource, torch
from fairmix_nb.audit import audit
from fairmix_nb.data import ImageSet
from fairmix_nb.models import build
x = torch.randint(0, 256, ({n}, 3, 32, 32), dtype=torch.uint8)
images = ImageSet(x, torch.arange({n}) % 10, tuple('abcdefghij'))
audit(build('resnet20', 10, 3, 0), images, 8/255, ('clean', 'fgsm'), diagnose={d}, batch=256,
      progress=False, device='cpu')
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_memory_stays_below_two_gigabytes_with_ten_thousand_images():
    peak = [
        float(run(PEAK.format(n=n, d=100)).communicate(timeout=900)[0].splitlines()[-1])
        for n in (1000, 10000)
    ]
    assert peak[1] < 2 and peak[1] < peak[0] + 0.2, f"peak {peak} GiB"


def test_memory_holds_one_chunk():
    "The same with a network that costs nothing."
    code = PEAK.replace(
        "build('resnet20', 10, 3, 0)",
        "torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))",
    )
    said = run(code.format(n=10000, d=100)).communicate(timeout=120)[0]
    peak = float(said.splitlines()[-1])
    assert peak < 1.2, f"peak {peak} GiB; the images alone as floats are .11"


class Moody(nn.Module):
    "BatchNorm, dropout and a buffer that counts: everything that an audit could disturb."

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(4 * 36, 10),
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.body(x)


@pytest.mark.parametrize("mode", [True, False])
def test_model_is_left_as_it_was(digits, mode):
    model = Moody().train(mode)
    model.body[0].eval()
    model.body[5].weight.requires_grad_(False)
    was = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    asks = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    audit(
        model, digits.subset(torch.arange(60)), 0.1, ("clean", "fgsm", "pgd-3", "apgd-ce"), **QUIET
    )
    assert all(torch.equal(v, was[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == asks
    assert all(p.grad is None for p in model.parameters())
    if not mode:
        assert torch.equal(torch.get_rng_state(), random), "global random state"


def test_worst_case_is_monotone_and_contains_raw(digits):
    found = audit(
        small_cnn(10, 1),
        digits,
        0.05,
        ("clean", "fgsm", "pgd-3", "apgd-ce"),
        diagnose=0,
        sweep=(0.5, 1, 2),
        **QUIET,
    )
    total = np.zeros(len(digits), bool)
    for attack in found.attacks:
        assert not (total & ~found.flags(attack)).any()
        total |= found.flags(attack, raw=True)
        assert np.array_equal(found.flags(attack), total)
    assert (np.diff(found.record["sweep"], axis=0) >= 0).all()
    assert np.array(found.confusion("fgsm")).sum() == len(digits)
    assert np.trace(found.confusion("fgsm")) == (~found.flags("fgsm", raw=True)).sum()


def test_order_of_chunks_does_not_change_the_points_of_comparison(digits):
    "Per image flags of deterministic attacks do not depend on the batch size."
    model = small_cnn(10, 1)
    one, two = (
        audit(model, digits, 0.05, ("clean", "fgsm"), diagnose=0, batch=b, **QUIET)
        for b in (64, 602)
    )
    assert one.record["test"] == two.record["test"]
    assert np.array_equal(one.flags(), two.flags())


@pytest.mark.parametrize(
    "data, message",
    [
        (lambda s: (s.floats().double().mul(255).long(), s.y), "floating point"),
        (lambda s: (s.floats() + 0.5, s.y), "must lie in the box"),
        (lambda s: (s.floats(), s.y + 10), r"classes in 0..9"),
        (lambda s: (s.floats(), s.y.float()), "long"),
        (lambda s: [], "no image"),
        (lambda s: s.floats(), "data must be"),
    ],
)
def test_bad_data_is_refused(digits, data, message):
    with pytest.raises(ValueError, match=message):
        audit(small_cnn(10, 1), data(digits), 0.1, ("clean", "fgsm"), **QUIET)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z: z * float("nan"), "finite"),
        (lambda z: z[:, 0], "must return logits"),
        (lambda z: z.detach(), "differentiably"),
        (lambda z: z.argmax(1), "must return logits"),
        (lambda z: z[:1], "must return logits"),
    ],
)
def test_bad_model_is_refused_before_any_work(digits, change, message):
    net = small_cnn(10, 1)
    with pytest.raises(ValueError, match=message):
        audit(lambda x: change(net(x)), digits, 0.1, **QUIET)


def test_report_files_and_damaged_ones(digits, tmp_path):
    found = audit(
        small_cnn(10, 1),
        digits.subset(torch.arange(50)),
        0.1,
        ("clean", "fgsm"),
        out=tmp_path / "r",
        **QUIET,
    )
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        "journal.jsonl",
        "audit.json",
        "report.txt",
        "report.html",
        "figure.png",
    }
    assert load_outcome(tmp_path / "r").record == json.loads(json.dumps(found.record))
    for text in ("", "{", "[]", '{"schema": 9}', '{"schema": 1, "kind": "fit"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json"):
            load_outcome(tmp_path / "bad.json")
    for text in ("", "x\n", "[1]\n", '{"kind": "audit"}\n[1, 2, 3]\n'):
        (tmp_path / "j").mkdir(exist_ok=True)
        (tmp_path / "j/journal.jsonl").write_text(text)
        with pytest.raises(ValueError, match="journal"):
            audit(
                small_cnn(10, 1), digits, 0.1, ("clean",), out=tmp_path / "j", resume=True, **QUIET
            )
        assert (tmp_path / "j/journal.jsonl").read_text() == text, "never a changed file"


def test_a_label_out_of_range_is_refused_wherever_it_stands(digits):
    y = digits.y.clone()
    y[-1] = 10
    with pytest.raises(ValueError, match=r"classes in 0..9, got 10"):
        audit(small_cnn(10, 1), (digits.floats(), y), 0.1, ("clean",), **QUIET)


@pytest.mark.parametrize(
    "box, low, high", [(None, -1, 1), ((-1.0, 1.0), -1, 1), ((0.0, 2.0), 0, 2)]
)
def test_images_beyond_zero_and_one_are_diagnosed(box, low, high):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    x = low + (high - low) * torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    report = audit(net, (x, torch.arange(40) % 4), 0.1, ("clean", "fgsm"), box=box, progress=False)
    (found,) = (c for c in report.record["diagnosis"] if c["check"] == "valid range")
    assert found["state"] == ("skipped" if box is None else "note")


def test_the_price_is_told_before_any_work(digits, capsys, monkeypatch):
    for name in ("IN_TEST", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    few = digits.subset(torch.arange(30))
    found = audit(small_cnn(10, 1), few, 0.1, ("clean", "fgsm", "pgd-5"), device="cpu")
    said = capsys.readouterr()
    assert "at most 6 gradients an image, 30 images: " in said.err and not said.out
    assert sum(a["gradients"] for a in found.record["attacks"].values()) <= 30 * 6


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_handful_of_images_is_audited(digits, n):
    found = audit(small_cnn(10, 1), digits.subset(torch.arange(n)), 0.1, ("clean", "fgsm"), **QUIET)
    assert found.n.sum() == n and "stronger attacks may find more" in found.verdict or found.flagged
    assert str(found) and found.plot()


def test_a_class_that_is_never_right_is_named(digits):
    class Blind(nn.Module):
        "Never says 3."

        def __init__(self):
            super().__init__()
            self.body = small_cnn(10, 1)

        def forward(self, x):
            return self.body(x) - 100 * torch.eye(10)[3]

    found = audit(Blind(), digits, 0.01, ("clean", "fgsm"), diagnose=0, **QUIET)
    line = next(v for v in str(found).splitlines() if v.startswith("wrong on every clean image"))
    assert "3" in line.split(": ")[1].split(", ")


def test_a_record_is_written_before_its_picture(digits, tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("no screen")

    monkeypatch.setattr("fairmix_nb.report.Outcome.plot", broken)
    few = digits.subset(torch.arange(20))
    with pytest.raises(RuntimeError, match="no screen"):
        audit(small_cnn(10, 1), few, 0.1, ("clean",), diagnose=0, out=tmp_path / "a", **QUIET)
    assert load_outcome(tmp_path / "a").n.sum() == 20


def test_a_threat_says_all_that_three_arguments_say(digits):
    net, few = small_cnn(10, 1), digits.subset(torch.arange(40))
    attacks = ("clean", "fgsm", "pgd-3")
    kw = dict(diagnose=0, sweep=(0.5, 30), **QUIET)  # a sweep stops at the valid range
    one = audit(net, few, Threat(0.5, "l2", None), attacks, **kw)
    two = audit(net, few, 0.5, attacks, norm="l2", box=None, **kw)
    assert np.array_equal(one.flags(), two.flags())
    assert one.record["config"] == two.record["config"] and one.threat == Threat(0.5, "l2", None)
    assert np.isfinite(audit(net, few, 0.05, attacks, **kw).record["sweep"]).all()


def test_the_diagnosis_costs_what_is_said(digits):
    few = digits.subset(torch.arange(60))
    seen = Counted(attackable(small_cnn(10, 1)))
    subject = Subject(seen, few.floats(), few.y, Threat(0.1))
    diagnosis(subject, seen.model, dict(clean=np.zeros(60, bool)), np.arange(60), seen)
    assert 0.8 * DIAGNOSIS < seen.gradients / 60 <= DIAGNOSIS

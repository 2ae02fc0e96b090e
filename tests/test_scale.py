"""One run in several processes: the same gradients as in one, the same weights in all, and no
waiting for the dead."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fairmix_nb.cures import CURES
from fairmix_nb.data import load
from fairmix_nb.methods import Pipeline, Run, TrainCfg, Weighted
from fairmix_nb.models import build
from fairmix_nb.ranks import fit_ranks, launch, process_group
from fairmix_nb.train import fit

ROOT = Path(__file__).parent.parent
TINY = TrainCfg(
    attack="pgd",
    steps=2,
    eps=0.1,
    epochs=3,
    batch=64,
    lr=3e-3,
    augment="crop_flip",
)
STEP = TrainCfg(eps=0.1, epochs=1, batch=50, lr=0.1, optimizer="sgd", bn_attack="eval")
WEIGHTS = tuple(1.0 + 0.3 * i for i in range(10))
BOTH = Pipeline(("attack", "mix"))


@dataclass(frozen=True)
class Moving(Pipeline):
    "A weight a class that follows the class's risk in training: its memory must be everybody's."

    def start(self, run):
        return dict(weight=run.ones())

    def step(self, run, x, y):
        x = run.attack(x, y)
        z = run.logits(x)
        run.tally(z, y)
        return run.state["weight"][y] * run.loss(z, y)

    def end_epoch(self, run):
        run.state["weight"] = 0.5 + run.risk()


SAME_AS_ONE = {  # images, method; 50 a step: the last steps have 1 image (an empty slice) or 49
    "natural": (101, Pipeline(())),
    "fgsm": (99, Pipeline()),
    "class weights": (99, Weighted((), weights=WEIGHTS)),
}
SAME_IN_BOTH = {
    "whole": (TINY, BOTH, {}),
    "shard": (replace(TINY, epochs=1), BOTH, dict(shard=True)),
    "set": (replace(TINY, epochs=1), Pipeline(BOTH.steps, partner="set"), {}),
    "three left": (replace(TINY, epochs=1, batch=134), BOTH, {}),  # 1,075 images: one is alone
    "moving": (replace(TINY, epochs=2, attack="fgsm"), Moving(), {}),
}


@pytest.fixture(autouse=True)
def nothing_waits_forever():
    def late(*_):
        raise TimeoutError("four minutes")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(240)
    yield
    signal.alarm(0)


def with_bn(seed=0):
    torch.manual_seed(seed)
    body = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*body, nn.BatchNorm1d(144), nn.Linear(144, 10))


def digits(n=None):
    data = load("digits", 0, progress=False)
    return replace(data, train=data.train.subset(torch.arange(n))) if n else data


def weights(run):
    return [v.clone() for v in run.model.state_dict().values()]


def many_runs(folder):
    """In each process: every case, and the uninterrupted run with its record; the weights they end
    with."""
    found, quiet = {}, dict(progress=False, device="cpu", timeout=60)
    with process_group("cpu", 60):
        for name, (n, method) in SAME_AS_ONE.items():
            net = build("small_cnn", 10, 1, 0)
            found[name] = weights(fit_ranks(net, digits(n), STEP, method, **quiet))
        for name, (cfg, method, kw) in SAME_IN_BOTH.items():
            kw = dict(kw, out=f"{folder}/{name}", **quiet)
            run = fit_ranks(with_bn(), digits(), cfg, method, **kw)
            found[name] = weights(run)
            if name == "moving":
                found["memory"] = [torch.tensor(row["weight"]) for row in run.curves]
        refused = {}
        for name, cfg, kw in [
            ("batch", replace(TINY, batch=63), {}),
            ("sync_bn", TINY, dict(sync_bn=True)),
            ("compile", TINY, dict(compile=True)),
            ("resumed", TINY, dict(out=f"{folder}/whole", resume=True, shard=True)),
        ]:
            with pytest.raises(ValueError) as e:
                fit_ranks(with_bn(), digits(), cfg, BOTH, **kw, **quiet)
            refused[name] = str(e.value)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit_ranks(build("small_cnn", 10, 1, 0), digits(99), STEP, "codat", **quiet)
        refused["slices"] = [str(w.message) for w in told if "slices" in str(w.message)]
    return found, refused


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return launch(many_runs, folder), folder


@pytest.mark.parametrize("name", SAME_AS_ONE)
def test_steps_of_two_processes_are_the_steps_of_one(two, name):
    n, method = SAME_AS_ONE[name]
    start = build("small_cnn", 10, 1, 0)
    first = [v.clone() for v in start.state_dict().values()]
    kw = dict(device="cpu", progress=False)
    one = weights(fit(start, digits(n), STEP, method, **kw))
    smaller = replace(STEP, batch=25)
    far = weights(fit(build("small_cnn", 10, 1, 0), digits(n), smaller, method, **kw))
    for a, b, w0, other in zip(two[0][0][0][name], one, first, far):
        moved = (b - w0).abs().max()
        assert (a - b).abs().max() <= 1e-4 * moved, (a - b).abs().max() / moved
        assert (
            other - b
        ).abs().max() > 1e-2 * moved  # half the batch is another run: the tolerance can fail


@pytest.mark.parametrize("name", SAME_IN_BOTH)
def test_both_processes_end_with_the_same_weights(two, name):
    (a, _), (b, _) = two[0]
    assert all(torch.equal(v, w) for v, w in zip(a[name], b[name]))
    assert not torch.equal(a["whole"][0], a["set"][0])
    kept = torch.load(two[1] / name / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(v, w) for v, w in zip(a[name], kept.values()))


def test_what_a_method_remembers_of_the_classes_is_the_same_in_both(two):
    (a, _), (b, _) = two[0]
    assert all(torch.equal(v, w) for v, w in zip(a["memory"], b["memory"]))
    assert (a["memory"][0] != 1).any() and not torch.equal(*a["memory"])


def test_one_record_says_how_many_and_counts_the_work_of_all(two):
    record = json.loads((two[1] / "whole" / "record.json").read_text())
    assert record["ranks"] == dict(size=2, shard=False, sync_bn=False) and record["finished"]
    assert record["gradient_evaluations"] == 3 * 3 * len(digits().train)
    assert not list(two[1].rglob("*.tmp*"))


def test_what_several_processes_cannot_do_is_refused(two):
    for _, refused in two[0]:
        assert "multiple of the 2 processes, got 63" in refused["batch"]
        assert "sync_bn must be False" in refused["sync_bn"]
        assert "compile must be False" in refused["compile"]
        assert "must be resumed with 2 processes" in refused["resumed"]
    first, second = (refused["slices"] for _, refused in two[0])
    assert "over each of 2 slices of it" in first[0] and len(first) == 1 and not second


@pytest.mark.parametrize("name", CURES)
def test_a_loss_that_needs_the_whole_batch_is_told(monkeypatch, name):
    "Gradients of a batch and of its halves, with the same noise: equal where no warning is given."
    for draw, value in dict(rand=0.5, randn=0.0).items():
        monkeypatch.setattr(torch, draw, lambda *n, value=value, **kw: torch.full(*n, value))
    images = digits(48).train
    net = build("small_cnn", 10, 1, 0)
    method, run = CURES[name], Run(net.eval(), STEP, images, images, epoch=2)
    run.state = method.start(run)
    for key, value in run.state.items():
        if value.shape == (10,):
            run.state[key] = value + torch.linspace(0.1, 0.5, 10)

    def gradient(idx):
        run.last = {}
        net.zero_grad()
        method.step(run, *run.batch(idx)).mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    whole, halves = torch.arange(48), torch.arange(48).split(24)
    one, two = gradient(whole), sum(map(gradient, halves)) / 2
    far = ((one - two).norm() / one.norm()).item()
    assert far > 1e-4 if method.by_slice else far < 1e-5, far


def dies_in_the_middle(out, **kw):
    "The second process kills itself in its second epoch, between the forward passes of a step."
    steps, real = [0], Pipeline.step

    def counted(*args):
        steps[0] += 1
        if steps[0] == 25 and os.environ["RANK"] == "1":
            (Path(out).parent / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    Pipeline.step = counted
    kw.update(out=out, device="cpu", progress=False, timeout=60)
    return weights(fit_ranks(with_bn(), digits(), TINY, BOTH, **kw))


def goes_on(out):
    return weights(
        fit_ranks(
            with_bn(9),
            digits(),
            TINY,
            BOTH,
            out=out,
            resume=True,
            device="cpu",
            progress=False,
            timeout=60,
        )
    )


def killed(folder):
    with pytest.raises(
        RuntimeError, match="process 1 of 2 was killed by SIGKILL.*go on with resume"
    ):
        launch(dies_in_the_middle, folder / "run")
    return time.time() - float((folder / "died").read_text())


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_process_ends_the_run_within_seconds(tmp_path):
    waited = killed(tmp_path)
    assert waited < 10, waited
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1


@pytest.mark.slow
def test_after_a_kill_the_run_goes_on_as_if_nothing_had_happened(two, tmp_path):
    killed(tmp_path)
    for ended in launch(goes_on, tmp_path / "run"):
        assert all(torch.equal(v, w) for v, w in zip(ended, two[0][0][0]["whole"]))


def torchrun(*argv, **kw):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fairmix_nb.train",  # an alias of `fairmix_nb.cli train`
    ]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [*command, *map(str, argv)],
        env=env,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **kw,
    )


QUICK = [
    "--model",
    "small_cnn",
    "--method",
    "attack_mix",
    "--eps",
    "0.1",
    "--batch",
    "64",
    "--lr",
    "3e-3",
    "--device",
    "cpu",
    "--timeout",
    "60",
]


@pytest.mark.slow
def test_torchrun_trains_is_killed_and_goes_on(tmp_path):
    out = {name: tmp_path / name for name in ("whole", "cut")}
    run = torchrun(*QUICK, "--epochs", "40", "--out", out["whole"])
    said = run.communicate(timeout=180)[0]
    assert run.returncode == 0, said
    assert said.count("records and figures") == 1
    run = torchrun(*QUICK, "--epochs", "40", "--out", out["cut"])
    deadline = time.time() + 120
    while not (out["cut"] / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    start = time.time()
    said = run.communicate(timeout=60)[0]
    assert run.returncode and time.time() - start < 45 and "SIGKILL" in said, said
    done = torch.load(out["cut"] / "last.pt", weights_only=True)["epoch"]
    assert 1 <= done < 40, done
    again = torchrun(*QUICK, "--epochs", "40", "--out", out["cut"], "--resume")
    assert again.wait(timeout=180) == 0, again.stdout.read()
    a, b = (torch.load(p / "last.pt", weights_only=True)["model"] for p in out.values())
    assert all(torch.equal(v, w) for v, w in zip(a.values(), b.values()))
    refused = torchrun(*QUICK, "--epochs", "41", "--out", out["cut"], "--resume")
    assert (
        "another configuration: epochs (40 then, 41 now)" in refused.communicate(timeout=120)[0]
        and refused.returncode
    )


@pytest.mark.slow
def test_a_grid_that_loses_a_node_is_the_grid_of_one_machine():
    ray = pytest.importorskip("ray")
    signal.alarm(600)
    sys.path.insert(0, str(ROOT / "tools"))
    import scaling

    record = scaling.ray_grid(epochs=20, seeds=(0, 1))
    assert not ray.is_initialized() and record["alive_at_the_end"] == 1
    assert len(set(record["runs"])) == len(record["runs"]) == 6
    assert record["attempts"][record["removed"]["running"]] == 2 and record["equal_to_sequential"]

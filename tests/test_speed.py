"The benchmark measures what it says, and its records hold what the chapter claims"

import ast
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fairmix_nb.methods import METHODS, TrainCfg
from fairmix_nb.mixup import ClassTable
from fairmix_nb.models import build

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results"
if not (ROOT / "tools" / "bench.py").exists():
    pytest.skip("tools/ is part of a checkout only", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))
import bench  # noqa: E402

EPS = 0.05


@pytest.fixture(scope="module")
def batch():
    images = bench.images_of(20)
    return images, images.floats(), images.y


def net(seed=0, name="small_cnn"):
    return build(name, 10, 3, seed=seed).train()


class Keep:
    "An optimizer that changes nothing, so that the gradients of a step can be read."

    def __init__(self, model):
        self.model = model

    def zero_grad(self):
        self.model.zero_grad(set_to_none=True)

    def step(self):
        pass


class Double(nn.Sequential):
    "Computes in float64, so that rounding turns no sign of a small gradient."

    def forward(self, x):
        return super().forward(x.double())


def grads(model):
    return [p.grad.clone() for p in model.parameters()]


def same(a, b, **kw):
    for u, v in zip(a, b, strict=True):
        torch.testing.assert_close(u, v, **{**dict(rtol=1e-3, atol=1e-5), **kw})


def by_hand(model, adv, y):
    "Gradients of the loss at given points, by nothing but autograd."
    return torch.autograd.grad(F.cross_entropy(model(adv), y), list(model.parameters()))


# ---- every candidate does the same work


@pytest.mark.parametrize("name", ["small_cnn", "resnet20"])
def test_one_step_gradients_of_the_faster_rewrites_equal_the_naive_ones(name, batch):
    images, x, y = batch
    naive, faster, ours = (Double(net(0, name).double()) for _ in range(3))
    loss = bench.naive_step(naive, Keep(naive), x, y, EPS)
    last = faster.to(memory_format=torch.channels_last)
    other = bench.image_gradient_step(
        last, Keep(last), x.contiguous(memory_format=torch.channels_last), y, EPS
    )
    cfg = TrainCfg(batch=20, eps=EPS)
    run = bench.new_run(ours, images, cfg)
    METHODS["at"].step(run, *run.batch(torch.arange(20))).mean().backward()
    assert run.gradients == 40 and abs(loss - other) < 1e-6
    same(grads(naive), grads(faster), rtol=1e-6, atol=1e-8)
    same(grads(naive), grads(ours), rtol=1e-6, atol=1e-8)
    with pytest.raises(AssertionError):  # another radius is seen
        bench.naive_step(naive, Keep(naive), x, y, EPS * 1.01)
        same(grads(naive), grads(ours), rtol=1e-6, atol=1e-8)


def test_the_loop_in_the_manner_of_fast_adversarial_is_algorithm_3(batch):
    _, x, y = batch
    model, reference, schedule = net(), net(), []
    scheduler = type("Scheduler", (), {"step": lambda self: schedule.append(1)})()
    torch.manual_seed(7)
    loss, accuracy = bench.wong_step(model, Keep(model), scheduler, x, y, EPS, 1.25 * EPS)
    torch.manual_seed(7)
    start = torch.empty_like(x).uniform_(-EPS, EPS)
    start = (x + start).clamp(0, 1) - x
    point = (x + start).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(reference(point), y), point)
    delta = (start + 1.25 * EPS * g.sign()).clamp(-EPS, EPS)
    adv = (x + delta).clamp(0, 1)
    assert (adv - x).abs().max() <= EPS + 1e-6 and adv.min() >= 0 and adv.max() <= 1
    same(grads(model), by_hand(reference, adv, y))
    logits = reference(adv)
    assert abs(loss - F.cross_entropy(logits, y).item()) < 1e-5 and schedule == [1]
    assert accuracy == (logits.argmax(1) == y).float().mean().item()
    wrong = (x + (start + EPS / 4 * g.sign()).clamp(-EPS, EPS)).clamp(0, 1)  # another alpha is seen
    with pytest.raises(AssertionError):
        same(grads(model), by_hand(reference, wrong, y))


def test_running_statistics_move_once_a_forward_pass_of_each_step(batch):
    images, x, y = batch
    moved = {}
    for mode in ("train", "train_frozen", "eval"):
        cfg = TrainCfg(batch=10, eps=EPS, bn_attack=mode)
        model = net(0, "resnet20")
        run = bench.new_run(model, images, cfg)
        bench.run_epoch(run, METHODS["at"], bench.Alone())
        moved[mode] = {
            int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)
        }
    assert moved == dict(train={4}, train_frozen={2}, eval={2})  # two steps


def test_several_models_at_once_have_the_gradients_of_each(batch):
    _, x, y = batch
    jobs = bench.many_models(x, y, 3)
    one_by_one = [by_hand(net(i), x, y) for i in range(3)]
    for name, job in jobs.items():
        found = job()
        for i, each in enumerate(one_by_one):
            same([found[k][i] for k in dict(net().named_parameters())], each, msg=name)


def test_dropping_what_is_broken_changes_the_cost_only(batch):
    _, x, y = batch
    x, model = x[:, :, :8, :8], net()
    with torch.no_grad():
        y = model(x).argmax(1)  # right on all, so that something is left to break
    flags = {drop: bench.strong_attack(model, x, y, 0.02, 3, 3, drop) for drop in (False, True)}
    assert 0 < flags[True].sum() < 20
    assert (flags[False] != flags[True]).sum() <= 2  # other random starts for the survivors


# ---- every candidate draws what it should


def test_the_slow_partners_are_partners_too():
    y = torch.arange(60) % 3
    table, g = ClassTable(y, 3), torch.Generator().manual_seed(0)
    for draw in (
        lambda: bench.per_class_partner(y, bench.members(y, 3)),
        lambda: bench.per_sample_partner(y),
        lambda: table.partner(torch.arange(60), g),
    ):
        j = draw()
        assert (y[j] == y).all()
    assert (bench.per_sample_partner(y) != torch.arange(60)).all()


def test_loader_and_resident_set_give_the_same_images():
    images = bench.images_of(50)
    x, y = bench.consume(bench.loader(images, 0, 50))
    ours, labels = bench.consume(bench.resident(images, torch.Generator().manual_seed(0), 50))
    assert (
        x.shape == ours.shape
        and x.dtype == ours.dtype
        and sorted(y.tolist()) == sorted(labels.tolist())
    )
    data = bench.Photos(images)
    data.transform = bench.transforms.ToTensor()
    assert torch.equal(torch.stack([data[i][0] for i in range(50)]), images.floats())


# ---- the instruments


def test_ratios_are_formed_round_by_round():
    seconds = dict(slow=[2.0, 30.0, 4.0], fast=[1.0, 10.0, 4.0])
    r = bench.ratio(seconds, "slow", "fast", 1.5)
    assert (r["median"], r["min"], r["max"], r["hold"]) == (2, 1, 3, 1.5)
    order, jobs = [], {}
    for name in "abc":
        jobs[name] = lambda name=name: order.append(name)
    found = bench.interleave(jobs, 3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" and all(
        len(s) == 3 for s in found.values()
    )


def test_counter_and_peak_know_a_product_of_matrices():
    a, b = torch.rand(64, 32), torch.rand(32, 16)
    low = bench.floors(lambda: a @ b, 1e9, 1e9)
    assert low["flops"] == 2 * 64 * 32 * 16 and low["bytes_fused"] == 4 * (
        64 * 32 + 32 * 16 + 64 * 16
    )
    assert low["fused"] == max(low["flops"], low["bytes_fused"]) / 1e9 <= low["each_operator"]
    assert abs(bench.peak_bytes(lambda: torch.zeros(1000, 1000) + 1) - 8_000_000) < 1000
    assert (
        abs(bench.peak_bytes(lambda: [torch.zeros(1000, 1000).sum() for _ in range(3)]) - 4_000_000)
        < 1000
    )


def test_resnet20_costs_what_the_records_assume():
    x = bench.images_of(2).floats()
    low = bench.floors(lambda: net(0, "resnet20")(x), 1, 1)
    assert round(low["flops"] / 2e6, 1) == 81.1


def test_the_phases_are_those_of_the_step_and_their_floors_add_up():
    images, cfg = bench.images_of(8), TrainCfg(batch=8, eps=EPS)
    told, nets = [], []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(bench.build("resnet20").to(memory_format=torch.channels_last).train())
    run = bench.new_run(nets[0], images, cfg)
    adv = bench.step_in_phases(run, torch.arange(8), told.append)
    assert tuple(told) == bench.PHASES
    x, _ = bench.new_run(nets[1], images, cfg).batch(torch.arange(8))
    optimizer = bench.make_optimizer(nets[1], cfg)
    bench.image_gradient_step(nets[1], optimizer, x, images.y, EPS)
    assert (adv - x).abs().max() <= EPS + 1e-6 and (adv != x).any()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    found = bench.phase_floors(run, torch.arange(8), 1e9, 1e9)
    whole = bench.floors(
        lambda: bench.step_in_phases(run, torch.arange(8), lambda name: None), 1e9, 1e9
    )
    for key in ("flops", "bytes"):
        assert sum(v[key] for v in found.values()) == pytest.approx(whole[key], rel=1e-5)


def test_a_convolution_alone_computes_what_a_backward_pass_does():
    shapes = bench.shapes_of(bench.build("resnet20"), torch.zeros(1, 3, 32, 32))
    assert sum(shapes.values()) == 19 and len(shapes) >= 6  # and shortcuts without weights
    for (shape, weight, stride), _times in shapes.items():
        jobs, cost = bench.convolution_jobs(shape, weight, stride, 2)
        out = jobs["forward"]()
        assert jobs["input gradient"]()[0].shape == (2, *shape)
        assert jobs["weight gradient"]()[1].shape == weight
        assert cost["flops"] == 2 * out.numel() * weight[1] * weight[2] * weight[3]


# ---- the records


def block(record, name):
    path = RESULTS / f"speed_{record}.json"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    return json.loads(path.read_text())["blocks"][name]


@pytest.mark.parametrize("record,name", [("cpu", "step"), ("cpu", "data"), ("peers", "peers")])
def test_records_hold_every_ratio_and_can_be_recomputed(record, name):
    found = block(record, name)
    assert set(bench.MARKS[name]) <= set(found["ratios"])
    for key, r in found["ratios"].items():
        slow, fast = found["seconds"][r["slow"]], found["seconds"][r["fast"]]
        each = [a / b for a, b in zip(slow, fast, strict=True)]
        assert len(each) == found["rounds"] >= 7, key
        assert abs(statistics.median(each) / r["median"] - 1) < 1e-3, key
        if key in bench.MARKS[name]:
            assert (r["slow"], r["fast"], r["hold"]) == bench.MARKS[name][key]
    assert found["provenance"]["commit"] and found["provenance"]["threads"] and found["config"]


def test_unfolded_fgsm_equals_torchattacks_bit_for_bit_in_the_record():
    assert block("peers", "peers")["same_as_unfolded"]["torchattacks"] == dict(bits=True, differ=0)


def test_cost_is_linear_in_the_record():
    found = block("cpu", "scaling")
    for axis, at in found["config"]["axes"].items():
        for what in ("seconds", "peak_bytes"):
            v = [
                statistics.median(s) if what == "seconds" else s
                for s in (found[what][f"{axis} {a}"] for a in at)
            ]
            assert len(at) >= 3 and all(u > 0 for u in v)
            slope, start = statistics.linear_regression(at, v)
            off = max(abs(start + slope * a - u) for a, u in zip(at, v)) / max(v)
            assert off < (0.15 if what == "seconds" else 0.07), (
                axis,
                what,
                off,
            )  # a pair saves one copy


def definitions(text):
    return {
        f.name: ast.dump(f)
        for f in ast.parse(text).body
        if isinstance(f, (ast.FunctionDef, ast.ClassDef))
    }


def test_the_chapter_shows_the_code_that_was_timed():
    path = ROOT / "nbs" / "24_speed.ipynb"
    if not path.exists():
        pytest.skip("no chapter")
    shown = {}
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and "def " in text:
            shown |= definitions(text)
    timed = definitions(Path(bench.__file__).read_text())
    both = set(shown) & set(timed)
    assert {
        "naive_step",
        "image_gradient_step",
        "wong_step",
        "per_class_partner",
        "Counter",
    } <= both
    assert all(shown[name] == timed[name] for name in both)


def test_waiting_threads_sleep_sooner_unless_told_otherwise():
    asked = "import fairmix_nb, os; print(os.environ['GOMP_SPINCOUNT'])"
    bare = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    for env, n in ((bare, bench.SPINS[1]), (dict(bare, GOMP_SPINCOUNT="7"), 7)):
        said = subprocess.run(
            [sys.executable, "-c", asked], env=env, cwd=ROOT, capture_output=True, text=True
        )
        assert said.stdout.strip() == str(n), said.stderr


# ---- the script itself


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        ["--only", "data", "tried", "crowd"],
        ["--only", "step"],
        ["--only", "scaling"],
        ["--only", "mend", "growth"],
        ["--peers"],
        ["--epoch"],
    ],
    ids=" ".join,
)
def test_rehearsal(what, tmp_path):
    out = tmp_path / "r.json"
    call = [
        sys.executable,
        bench.__file__,
        "--rehearse",
        "--threads",
        "1",
        "--out",
        str(out),
        *what,
    ]
    done = subprocess.run(call, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert record["schema"] == 1 and record["kind"] == "speed" and record["provenance"]["commit"]
    for name, found in record["blocks"].items():
        assert f"[{name}: " in done.stdout and all(len(s) == 2 for s in found["seconds"].values())


@pytest.mark.parametrize(
    "words,says",
    [
        (["--rehearse"], "--rehearse needs --out"),
        (["--device", "cuda"], "sees no CUDA GPU"),
        (["--only", "stpe"], "invalid choice: 'stpe'"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(words, says, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(words)
    assert says in capsys.readouterr().err


def test_what_grows_with_what_in_the_record():
    found = block("cpu", "growth")
    for axis, at in found["config"]["axes"].items():
        took = [statistics.median(found["seconds"][f"{axis} {v}"]) for v in at]
        held = [found["peak_bytes"][f"{axis} {v}"] for v in at]
        for values, power in zip((took, held), found["powers"][axis], strict=True):
            again = statistics.linear_regression(*(list(map(math.log, v)) for v in (at, values)))
            assert again.slope == pytest.approx(power, abs=0.01), axis
            assert not axis.endswith("images") or power < 1.2, (axis, power)


def test_bf16_is_timed_in_bf16():
    "An autocast around the loop would be undone by the loop's own, and time fp32 twice."
    images, cfg = bench.images_of(16), TrainCfg(batch=16, eps=EPS)
    torch.manual_seed(0)
    first = {p: bench.trainer(images, cfg, precision=p)()[0].item() for p in ("fp32", "bf16")}
    assert 0 < abs(first["bf16"] / first["fp32"] - 1) < 0.1, first


def test_the_ceiling_is_the_best_that_was_reached():
    work = dict(gemm=10, convolution=30, copy=8)
    assert bench.peaks(work, dict(gemm=[1], convolution=[2, 9, 2], copy=[4])) == (15, 2)
    jobs, work = bench.ceilings(256, 1)
    assert set(jobs) == set(work) == {"gemm", "convolution", "copy"}
    with FlopCounterMode(display=False) as seen:
        jobs["convolution"]()
    assert work["convolution"] == seen.get_total_flops()


LOG = """
+ 0 s: pip install -e '.[dev]'
+ 69 s: nbdev_test
01_gaussian.ipynb: ok
+ 200 s: pytest
12.34s call     tests/test_start.py::test_a_plain_import[np & 2]
0.50s setup    tests/test_cli.py::test_x
+ 390 s: :
01_gaussian.ipynb: ok, 9 s, 6 s of processor time
   7.2 s  01_gaussian [12]  risk = gap(1.0)
"""


def test_the_waits_of_a_tester_are_read_from_what_was_printed():
    found = bench.waits(LOG)
    assert found["seconds"] == {"pip install -e '.[dev]'": 69, "nbdev_test": 131, "pytest": 190}
    assert found["tests"] == [
        [12.34, "tests/test_start.py::test_a_plain_import[np & 2]"],
        [0.5, "tests/test_cli.py::test_x"],
    ]
    assert found["cells"] == [[7.2, "01_gaussian [12]", "risk = gap(1.0)"]]
    with pytest.raises(SystemExit, match="what .ci/run printed"):
        bench.waits("nothing")

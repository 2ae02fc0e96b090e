"What may not happen to a training run: lost work, other bits, hidden waits, half-written files."

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fairmix_nb import data as D
from fairmix_nb import mixup
from fairmix_nb import train as T
from fairmix_nb.methods import (
    CHOICES,
    FAST,
    METHODS,
    PIPELINES,
    TRAIN_ATTACKS,
    Averaged,
    GradAlign,
    LogitAdjusted,
    Method,
    Pipeline,
    Run,
    Trades,
    TrainCfg,
    Weighted,
    make_streams,
)
from fairmix_nb.models import build, fold_batchnorm
from fairmix_nb.runs import StartWarning

HERE = Path(__file__).resolve().parent
CFG = TrainCfg(eps=0.1, epochs=4, batch=64, lr=3e-3, smoothing=0.1)
BOTH = Pipeline(("attack", "mix"))
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and locks")


@pytest.fixture(scope="module")
def digits():
    whole = D.load("digits", seed=0, per_class=16, progress=False)
    return replace(whole, val=whole.val.subset(torch.arange(20)))


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )


def fit(data, cfg=CFG, method=BOTH, seed=0, **kw):
    return T.fit(network(seed), data, cfg, method, device="cpu", progress=False, **kw)


def resume(out, data, cfg=None, **kw):
    return T.resume(out, network(9), data, cfg, device="cpu", progress=False, **kw)


def new_run(model, images, cfg, method, device="cpu"):
    run = Run(
        model, cfg, images, images, make_streams(0, device), tuple(images.counts()), net=model
    )
    run.optimizer, run.epoch, run.state = T.make_optimizer(model, cfg), 1, method.start(run)
    return run


def stop_after(epoch, error=KeyboardInterrupt):
    def stop(row):
        if row["epoch"] == epoch:
            raise error

    return stop


def same_bits(a, b):
    pairs = zip(a.model.state_dict().items(), b.model.state_dict().items())
    return a.curves == b.curves and all(k == j and torch.equal(v, w) for (k, v), (j, w) in pairs)


# every configuration trains


@pytest.mark.parametrize(
    "kw, method",
    [(dict(attack=a), Pipeline(p)) for p in PIPELINES[1:] for a in TRAIN_ATTACKS]
    + [
        (dict(), Pipeline(BOTH.steps, partner=p, k=k))
        for p, k in [("self", 2), ("any", 2), ("set", 3), ("batch", 3)]
    ]
    + [
        (dict(), GradAlign()),
        (dict(norm="l2", eps=0.5, attack="nfgsm"), Pipeline()),
        (dict(eps=(0.1,), box=None, attack="noise"), Pipeline()),
        (dict(optimizer="sgd", schedule=("cyclic", 0.4), smoothing=0.1), LogitAdjusted()),
        (dict(), Pipeline(("mix",), lam_per="batch")),
        (dict(augment="crop_flip", weight_decay=1e-3), Weighted(weights=(1.0,) * 10)),
        (dict(), Pipeline(("mix",), law=("beta", 2, 2))),
        (dict(attack="pgd", steps=2), "trades"),
        (dict(), "ema"),
    ],
)
def test_every_choice_trains_and_repeats(digits, kw, method):
    cfg = TrainCfg(**{**dict(eps=0.1, epochs=1, batch=80, lr=3e-3), **kw})
    a, b = fit(digits, cfg, method), fit(digits, cfg, method)
    assert same_bits(a, b) and a.curves[0]["loss"] > 0
    assert not same_bits(a, fit(digits, replace(cfg, seed=1), method)), "the seed must matter"
    json.dumps(a.record)


def test_paper_and_control_are_what_they_say(digits):
    one = replace(CFG, epochs=1)
    control = Pipeline(BOTH.steps, partner="self")
    assert same_bits(fit(digits, one, control), fit(digits, one, "at"))
    assert TrainCfg().schedule == ("step", 50, 0.1) and TrainCfg().smoothing == 0
    assert FAST["epochs"] == 15


# nothing waits


class Waits(TorchDispatchMode):
    "Counts what makes a GPU wait: numbers read from tensors, shapes that depend on values, copies."

    found = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        copies = name == "_to_copy" and "device" in (kwargs or {})
        if (
            name
            in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal")
            or copies
        ):
            self.found = (*self.found, name)
        return func(*args, **(kwargs or {}))


class Counting(Method):
    def start(self, run):
        return dict(radius=run.ones())

    def step(self, run, x, y):
        z = run.logits(run.attack(x, y, run.cfg.eps * run.state["radius"][y]))
        run.tally(z, y)
        run.add("said", y, z.softmax(1))
        return run.loss(z, y)

    def end_epoch(self, run):
        run.state["radius"] = 1.5 - run.risk()


@pytest.mark.parametrize(
    "kw, method",
    [
        (dict(), BOTH),
        (dict(), Pipeline(BOTH.steps, partner="set")),
        (dict(), Pipeline(BOTH.steps, partner="any")),
        (dict(), Pipeline(("mix", "attack"), k=3)),
        (dict(attack="pgd", steps=2), BOTH),
        (dict(attack="nfgsm", eps=(0.1,)), BOTH),
        (dict(), GradAlign(weight=0.1)),
        (dict(augment="crop_flip"), LogitAdjusted()),
        (dict(), Weighted(weights=(1.0,) * 10)),
        (dict(attack="pgd", steps=2), Trades()),
        (dict(), Averaged()),
        (dict(), Counting()),  # sums by class, radii by class
    ],
)
def test_an_epoch_asks_the_device_for_nothing(digits, kw, method, monkeypatch):
    monkeypatch.setattr(
        mixup, "_check_labels", lambda *a: None
    )  # done on the CPU only, see 02_mixup
    cfg, model, one = replace(CFG, **kw), network(), T.Alone()
    run = new_run(model, digits.train, cfg, method)
    T.run_epoch(run, method, one)  # what is made once is made now
    with Waits() as waits:
        T.run_epoch(run, method, one)
    assert waits.found == ()
    with Waits() as waits:
        T.one_epoch(run, method, one, digits.val, 20, T.watch, "fp32")
    assert "_local_scalar_dense" in waits.found, "the losses are looked at when the epoch ends"


# gradients, modes, flags


def naive_step(model, x, y, eps):
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), y).backward()
    adv = (x + eps * x.grad.sign()).clamp(0, 1).detach()
    model.zero_grad()
    F.cross_entropy(model(adv), y).backward()
    return [p.grad for p in model.parameters()]


def one_step(model, data, cfg, idx, method=BOTH):
    run = new_run(model.train(), data.train, cfg, method)
    x, y = run.batch(method.take(run, idx))
    method.step(run, x, y).mean().backward()
    return [p.grad for p in model.parameters()]


def test_gradients_of_a_step_are_the_naive_ones(digits):
    cfg, idx = TrainCfg(eps=0.1, batch=32), torch.arange(32)
    model = build("resnet20", 10, 1, seed=1).to(memory_format=torch.channels_last)
    ours = one_step(model, digits, cfg, idx, Pipeline())
    theirs = naive_step(
        build("resnet20", 10, 1, seed=1).train(), digits.train.floats(idx), digits.train.y[idx], 0.1
    )
    size = max(g.abs().max().item() for g in theirs)
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs)) < 1e-3 * size
    wrong = naive_step(
        build("resnet20", 10, 1, seed=1).train(),
        digits.train.floats(idx),
        digits.train.y[idx],
        0.09,
    )
    assert max((a - b).abs().max().item() for a, b in zip(ours, wrong)) > 1e-2 * size


@pytest.mark.parametrize("attack", TRAIN_ATTACKS)
def test_attack_leaves_no_trace_on_the_weights(digits, attack):
    model, idx = network().train(), torch.arange(20)
    model[0].bias.requires_grad_(False)  # a weight that is not learnt stays so
    run = new_run(model, digits.train, replace(CFG, attack=attack), BOTH)
    BOTH.before_loss(run, *run.batch(idx))
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]


def test_flags_come_back_after_an_error(digits):
    model = network().train()

    def broken(*_):
        raise RuntimeError("broken")

    handle = model[3].register_forward_hook(broken)
    for mode in CHOICES["bn_attack"]:
        run = new_run(model, digits.train, replace(CFG, bn_attack=mode), BOTH)
        with pytest.raises(RuntimeError, match="broken"):
            run.attack(*run.batch(torch.arange(4)))
        assert (
            model.training
            and all(p.requires_grad for p in model.parameters())
            and model[1].track_running_stats
        )
    handle.remove()


@pytest.mark.parametrize("mode, moves", [("train", 1), ("train_frozen", 0), ("eval", 0)])
@pytest.mark.parametrize(
    "kw, method, looks",
    [
        (dict(), BOTH, 1),
        (dict(attack="pgd", steps=3), BOTH, 3),
        (dict(attack="nfgsm"), BOTH, 1),
        (dict(attack="noise"), BOTH, 0),
        (dict(), GradAlign(weight=0.1), 3),
    ],
)
def test_running_statistics_are_updated_exactly_as_configured(
    digits, mode, moves, kw, method, looks
):
    cfg = replace(CFG, epochs=1, bn_attack=mode, **kw)
    steps = -(-len(digits.train) // cfg.batch)
    found = int(fit(digits, cfg, method).model[1].num_batches_tracked)
    assert found == steps * (1 + moves * looks)


def test_folded_logits_after_training(digits):
    model = fit(digits).model
    x = digits.test.floats()[:100]
    with torch.no_grad():
        assert (fold_batchnorm(model)(x) - model(x)).abs().max() < 1e-5


# arithmetic


@pytest.mark.parametrize(
    "how", [dict(precision="tf32"), dict(precision="bf16"), dict(deterministic=True), dict()]
)
def test_global_switches_come_back(digits, how):
    cudnn, product = torch.backends.cudnn, torch.backends.cuda.matmul

    def look():
        slow = torch.are_deterministic_algorithms_enabled()
        return cudnn.allow_tf32, product.allow_tf32, cudnn.benchmark, slow

    before, seen = look(), []
    with pytest.raises(ZeroDivisionError):
        fit(digits, on_epoch=lambda row: (seen.append(look()), 1 / 0), **how)
    tf32, slow = how.get("precision") == "tf32", how.get("deterministic", False)
    assert seen == [(tf32, tf32, not slow, slow)] and look() == before


def test_bf16_is_asked_for_and_said(digits):
    a, b = fit(digits), fit(digits, precision="bf16")
    assert not same_bits(a, b) and abs(a.curves[0]["loss"] - b.curves[0]["loss"]) < 0.1
    assert b.record["how"] == dict(compile=False, precision="bf16", deterministic=False)
    assert {p.dtype for p in b.model.parameters()} == {torch.float32}
    with pytest.raises(
        ValueError, match="precision must be one of 'fp32', 'tf32', 'bf16', got 'fp16'"
    ):
        fit(digits, precision="fp16")


@pytest.mark.slow
def test_compiled_step_has_the_gradients_of_the_eager_one(digits):
    idx = torch.arange(64)
    for method, most in [(Pipeline(("mix",)), 1e-5), (BOTH, 0.02)]:  # an attack turns bits to signs
        eager = one_step(network(), digits, CFG, idx, method)
        model = network()
        with T.numerics(model, "cpu", True, "fp32", False):
            compiled = one_step(model, digits, CFG, idx, method)
        size = max(g.abs().max().item() for g in eager)
        assert max((a - b).abs().max().item() for a, b in zip(eager, compiled)) <= most * size
        assert model._compiled_call_impl is None


@pytest.mark.slow
def test_compiled_run_resumes_with_the_same_bits(digits, tmp_path):
    cfg = replace(CFG, epochs=3)
    whole = fit(digits, cfg, compile=True)
    with pytest.raises(KeyboardInterrupt):
        fit(digits, cfg, compile=True, out=tmp_path, on_epoch=stop_after(1))
    again = resume(tmp_path, digits)
    assert again.record["how"]["compile"] and same_bits(whole, again)
    eager = fit(digits, cfg)
    assert abs(whole.curves[0]["loss"] - eager.curves[0]["loss"]) < 0.01


# divergence


def test_divergence_stops_with_step_and_checkpoint(digits, tmp_path, monkeypatch):
    with pytest.raises(
        FloatingPointError,
        match=r"loss became .* at step \d+ of epoch 1: lower lr .*last checkpoint: none",
    ):
        fit(digits, replace(CFG, optimizer="sgd", lr=1e4))
    with pytest.raises(FloatingPointError, match="a weight is not finite after epoch 1"):
        fit(
            digits,
            replace(CFG, optimizer="sgd", lr=1e38, weight_decay=1e3, batch=len(digits.train)),
        )
    rate = T.learning_rate
    monkeypatch.setattr(
        T, "learning_rate", lambda cfg, epoch, *a: 1e6 if epoch == 2 else rate(cfg, epoch, *a)
    )
    with pytest.raises(
        FloatingPointError, match=r"at step 2 of epoch 3.*last checkpoint: .*last.pt \(epoch 2\)"
    ):
        fit(digits, out=tmp_path)
    monkeypatch.undo()
    assert same_bits(fit(digits), resume(tmp_path, digits))


def test_no_validation_part_is_said_at_once(digits, tmp_path):
    nothing = digits.val.subset(torch.arange(0))
    for val, got in [(nothing, "ImageSet.0 images"), (None, "None")]:
        for method in ("natural", "at", "frl", "fawa"):
            with pytest.raises(ValueError, match=f"data.val must hold images.*got {got}"):
                fit(replace(digits, val=val), method=method, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fine_tuning_without_a_start_is_told_once(digits):
    for method in (METHODS["frl"], METHODS["confsr"], Averaged(METHODS["faal"])):
        with pytest.warns(StartWarning, match="without start_from it trains from scratch") as told:
            T.load_start(network(), digits, method)
        assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in set(METHODS) - {"frl", "faal", "confsr"}:
            assert T.load_start(network(), digits, METHODS[name]) == {}
        T.load_start(network(), digits, METHODS["frl"], resume_from=dict(start_from=None))


# with a GPU


@pytest.mark.cuda
def test_cuda_step_has_the_gradients_of_the_cpu(digits):
    natural, idx = Pipeline(()), torch.arange(64)
    model = network().to("cuda", memory_format=torch.channels_last)
    with T.numerics(model, "cuda", False, "fp32", True):
        gpu = one_step(
            model, replace(digits, train=digits.train.to("cuda")), CFG, idx.to("cuda"), natural
        )
    for a, b in zip(gpu, one_step(network(), digits, CFG, idx, natural)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("how", [dict(deterministic=True), dict(deterministic=True, compile=True)])
def test_cuda_repeats_and_resumes(digits, tmp_path, how):
    cfg, kw = replace(CFG, augment="crop_flip"), dict(device="cuda", progress=False, **how)
    whole, twin = (T.fit(network(), digits, cfg, BOTH, **kw) for _ in range(2))
    assert same_bits(whole, twin)
    with pytest.raises(KeyboardInterrupt):
        T.fit(network(), digits, cfg, BOTH, out=tmp_path, on_epoch=stop_after(2), **kw)
    assert same_bits(whole, T.resume(tmp_path, network(9), digits, device="cuda", progress=False))


@pytest.mark.cuda
@pytest.mark.parametrize(
    "how",
    [
        dict(compile=True),
        dict(precision="tf32"),
        dict(precision="bf16"),
        dict(compile=True, precision="bf16"),
    ],
)
def test_cuda_options_learn_the_same(digits, how):
    cfg = replace(CFG, epochs=6)
    losses = [
        T.fit(network(), digits, cfg, BOTH, device="cuda", progress=False, **h).curves[-1]["loss"]
        for h in ({}, how)
    ]
    assert abs(losses[0] - losses[1]) < 0.1


@pytest.mark.cuda
def test_cuda_epoch_does_not_wait(digits):
    cfg, model, method = replace(CFG, augment="crop_flip"), network().to("cuda"), LogitAdjusted()
    run = new_run(model, digits.train.to("cuda"), cfg, method, "cuda")
    T.run_epoch(run, method, T.Alone())
    torch.cuda.set_sync_debug_mode("error")
    try:
        T.run_epoch(run, method, T.Alone())
    finally:
        torch.cuda.set_sync_debug_mode("default")

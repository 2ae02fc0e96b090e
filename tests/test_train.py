"What may not happen to a training run: lost work, other bits, hidden waits, half-written files."

import json
import os
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
from fairmix_nb.models import build, fold_batchnorm

HERE = Path(__file__).resolve().parent
CFG = T.TrainCfg(("attack", "mix"), eps=0.1, epochs=4, batch=64, lr=3e-3, smoothing=0.1)
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


def fit(data, cfg=CFG, seed=0, **kw):
    return T.fit(network(seed), data, cfg, device="cpu", progress=False, **kw)


def resume(out, data, cfg=None, **kw):
    return T.resume(out, network(9), data, cfg, device="cpu", progress=False, **kw)


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
    "kw",
    [dict(pipeline=p, attack=a) for p in T.PIPELINES[1:] for a in T.CHOICES["attack"]]
    + [
        dict(pipeline=("attack", "mix"), partner=p, k=k)
        for p, k in [("self", 2), ("any", 2), ("set", 3), ("batch", 3)]
    ]
    + [
        dict(grad_align=0.2),
        dict(norm="l2", eps=0.5, attack="nfgsm"),
        dict(eps=(0.1,), box=None, attack="noise"),
        dict(optimizer="sgd", schedule=("cyclic", 0.4), smoothing=0.1, logit_adjust=1.0),
        dict(lam_per="batch", pipeline=("mix",)),
        dict(class_weights=(1.0,) * 10, augment="crop_flip", weight_decay=1e-3),
        dict(law=("beta", 2, 2), pipeline=("mix",)),
    ],
)
def test_every_choice_trains_and_repeats(digits, kw):
    cfg = T.TrainCfg(**{**dict(eps=0.1, epochs=1, batch=80, lr=3e-3), **kw})
    a, b = fit(digits, cfg), fit(digits, cfg)
    assert same_bits(a, b) and a.curves[0]["loss"] > 0
    assert not same_bits(a, fit(digits, replace(cfg, seed=1))), "the seed must matter"
    json.dumps(a.record)


def test_paper_and_control_are_what_they_say(digits):
    one = replace(CFG, epochs=1)
    assert same_bits(
        fit(digits, replace(one, partner="self")), fit(digits, replace(one, pipeline=("attack",)))
    )
    fields = T.TrainCfg.__dataclass_fields__
    assert (
        len(fields) <= 24
        and T.TrainCfg().schedule == ("step", 50, 0.1)
        and T.TrainCfg().smoothing == 0
    )


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


@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        dict(partner="set"),
        dict(partner="any"),
        dict(pipeline=("mix", "attack"), k=3),
        dict(attack="pgd", steps=2),
        dict(attack="nfgsm", eps=(0.1,)),
        dict(grad_align=0.1),
        dict(augment="crop_flip", logit_adjust=1.0, class_weights=(1.0,) * 10),
    ],
)
def test_an_epoch_asks_the_device_for_nothing(digits, kw, monkeypatch):
    monkeypatch.setattr(
        mixup, "_check_labels", lambda *a: None
    )  # done on the CPU only, see 02_mixup
    cfg, model = replace(CFG, **kw), network()
    state = T.State(model, T.make_optimizer(model, cfg), T.make_streams(0), net=model)
    job = T.make_job(digits.train, cfg)
    T.run_epoch(state, job)  # what is made once is made now
    with Waits() as waits:
        T.run_epoch(state, job)
    assert waits.found == ()
    with Waits() as waits:
        T.one_epoch(state, job, digits.val, 20)
    assert "_local_scalar_dense" in waits.found, "the losses are looked at when the epoch ends"


# gradients, modes, flags


def naive_step(model, x, y, eps):
    x = x.clone().requires_grad_()
    F.cross_entropy(model(x), y).backward()
    adv = (x + eps * x.grad.sign()).clamp(0, 1).detach()
    model.zero_grad()
    F.cross_entropy(model(adv), y).backward()
    return [p.grad for p in model.parameters()]


def one_step(model, data, cfg, idx):
    state = T.State(model.train(), T.make_optimizer(model, cfg), T.make_streams(0), net=model)
    loss, _ = T.step_loss(state, T.make_job(data.train, cfg), idx)
    loss.backward()
    return [p.grad for p in model.parameters()]


def test_gradients_of_a_step_are_the_naive_ones(digits):
    cfg, idx = T.TrainCfg(eps=0.1, batch=32), torch.arange(32)
    ours = one_step(
        build("resnet20", 10, 1, seed=1).to(memory_format=torch.channels_last), digits, cfg, idx
    )
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


@pytest.mark.parametrize("attack", T.CHOICES["attack"])
def test_attack_leaves_no_trace_on_the_weights(digits, attack):
    model, idx = network().train(), torch.arange(20)
    model[0].bias.requires_grad_(False)  # a weight that is not learnt stays so
    T.training_batch(model, digits.train, idx, replace(CFG, attack=attack), T.make_streams(0))
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]


def test_flags_come_back_after_an_error(digits):
    model = network().train()
    broken = lambda *a: (_ for _ in ()).throw(RuntimeError("broken"))
    handle = model[3].register_forward_hook(broken)
    for mode in T.CHOICES["bn_attack"]:
        with pytest.raises(RuntimeError, match="broken"):
            T.attack_step(
                model,
                digits.train.floats(torch.arange(4)),
                digits.train.y[:4],
                replace(CFG, bn_attack=mode),
                None,
            )
        assert (
            model.training
            and all(p.requires_grad for p in model.parameters())
            and model[1].track_running_stats
        )
    handle.remove()


@pytest.mark.parametrize("mode, moves", [("train", 1), ("train_frozen", 0), ("eval", 0)])
@pytest.mark.parametrize(
    "kw, looks",
    [
        (dict(), 1),
        (dict(attack="pgd", steps=3), 3),
        (dict(attack="nfgsm"), 1),
        (dict(attack="noise"), 0),
        (dict(grad_align=0.1), 3),
    ],
)
def test_running_statistics_are_updated_exactly_as_configured(digits, mode, moves, kw, looks):
    cfg = replace(CFG, epochs=1, bn_attack=mode, **kw)
    steps = -(-len(digits.train) // cfg.batch)
    found = int(fit(digits, cfg).model[1].num_batches_tracked)
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
    look = lambda: (
        cudnn.allow_tf32,
        product.allow_tf32,
        cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
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
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, got 'fp16'"):
        fit(digits, precision="fp16")


@pytest.mark.slow
def test_compiled_step_has_the_gradients_of_the_eager_one(digits):
    natural, idx = replace(CFG, pipeline=("mix",)), torch.arange(64)
    for cfg, most in [(natural, 1e-5), (CFG, 0.02)]:  # an attack turns last bits into signs
        eager = one_step(network(), digits, cfg, idx)
        model = network()
        with T.numerics(model, "cpu", True, "fp32", False):
            compiled = one_step(model, digits, cfg, idx)
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


# with a GPU


@pytest.mark.cuda
def test_cuda_step_has_the_gradients_of_the_cpu(digits):
    natural, idx = replace(CFG, pipeline=()), torch.arange(64)
    model = network().to("cuda", memory_format=torch.channels_last)
    with T.numerics(model, "cuda", False, "fp32", True):
        gpu = one_step(
            model, replace(digits, train=digits.train.to("cuda")), natural, idx.to("cuda")
        )
    for a, b in zip(gpu, one_step(network(), digits, natural, idx)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("how", [dict(deterministic=True), dict(deterministic=True, compile=True)])
def test_cuda_repeats_and_resumes(digits, tmp_path, how):
    cfg, kw = replace(CFG, augment="crop_flip"), dict(device="cuda", progress=False, **how)
    whole, twin = (T.fit(network(), digits, cfg, **kw) for _ in range(2))
    assert same_bits(whole, twin)
    with pytest.raises(KeyboardInterrupt):
        T.fit(network(), digits, cfg, out=tmp_path, on_epoch=stop_after(2), **kw)
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
        T.fit(network(), digits, cfg, device="cuda", progress=False, **h).curves[-1]["loss"]
        for h in ({}, how)
    ]
    assert abs(losses[0] - losses[1]) < 0.1


@pytest.mark.cuda
def test_cuda_epoch_does_not_wait(digits):
    cfg, model = replace(CFG, augment="crop_flip", logit_adjust=1.0), network().to("cuda")
    state = T.State(model, T.make_optimizer(model, cfg), T.make_streams(0, "cuda"), net=model)
    job = T.make_job(digits.train.to("cuda"), cfg)
    T.run_epoch(state, job)
    torch.cuda.set_sync_debug_mode("error")
    try:
        T.run_epoch(state, job)
    finally:
        torch.cuda.set_sync_debug_mode("default")

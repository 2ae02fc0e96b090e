"A method may change what a batch costs and nothing else: each against arithmetic written out."

import copy
import json
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairmix_nb import data as D
from fairmix_nb import methods as M
from fairmix_nb import train as T
from fairmix_nb.attacks import Threat
from fairmix_nb.cures import CURES
from fairmix_nb.methods import (
    METHODS,
    Averaged,
    GradAlign,
    Method,
    Pipeline,
    Run,
    Trades,
    TrainCfg,
    Weighted,
    alignment,
    describe,
    described,
    gradients_per_image,
    method_of,
)

CFG = TrainCfg(eps=0.1, epochs=2, batch=64, lr=3e-3, smoothing=0.1, steps=3)
ORDERS = ((), ("mix",), ("attack",), ("attack", "mix"), ("mix", "attack"))
ATTACKS = ("fgsm", "pgd", "nfgsm")


@pytest.fixture(scope="module")
def digits():
    whole = D.load("digits", seed=0, per_class=16, progress=False)
    return replace(whole, val=D.spread_subset(whole.val, 20))


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )


def smooth(seed=0):
    "Without BatchNorm: the same function in training and in evaluation."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def fit(data, method, cfg=CFG, net=None, **kw):
    return T.fit(net or network(), data, cfg, method, device="cpu", progress=False, **kw)


def same_bits(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items())
    return all(k == j and torch.equal(v, w) for (k, v), (j, w) in pairs)


def a_run(data, method, cfg=CFG, net=None):
    run = Run(net or smooth(), cfg, data.train, data.val, epoch=1)
    method.check(run)
    run.state = method.start(run)
    return run


# the numbers are those of a loop that anybody would write


def partners_by_hand(y, generator):
    "Shuffle the batch; within a class everybody gets the one that follows, round."
    shuffled = torch.randperm(len(y), generator=generator).tolist()
    found = [0] * len(y)
    for c in set(y.tolist()):
        ring = [i for i in shuffled if y[i] == c]
        for i, j in zip(ring, ring[1:] + ring[:1]):
            found[i] = j
    return torch.tensor(found)


def attack_by_hand(net, x, y, name, eps, generator):
    def slope(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(net(z), y, reduction="sum"), z)[0]

    if name == "fgsm":
        return (x + eps * slope(x).sign()).clamp(0, 1)
    u = 2 * torch.rand(x.shape, generator=generator) - 1
    if name == "nfgsm":
        z = (x + u * (2 * eps)).clamp(0, 1)
        return (z + eps * slope(z).sign()).clamp(0, 1)
    z = (x + u * eps).clamp(0, 1)
    for _ in range(3):
        z = (x + (z - x + 2.5 * eps / 3 * slope(z).sign()).clamp(-eps, eps)).clamp(0, 1)
    return z


def mix_by_hand(x, y, generator):
    lam = torch.rand(len(x), generator=generator)
    other = x[partners_by_hand(y, generator)]
    share = (1 - lam) / (lam + (1 - lam))
    return torch.lerp(x, other, share.view(-1, 1, 1, 1))


def textbook(data, steps, attack, epochs=2):
    "No class, no package: streams, batches, attack, mixture, smoothed loss, Adam."
    seeds = np.random.SeedSequence(0).generate_state(4).tolist()
    order, mixing, attacking, _ = (torch.Generator().manual_seed(s) for s in seeds)
    net = network().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3, fused=True)
    pixels, labels, means = data.train.x.float() / 255, data.train.y, []
    for _ in range(epochs):
        losses = []
        for idx in torch.randperm(len(labels), generator=order).split(64):
            y = labels[idx]
            x = pixels[idx].contiguous(memory_format=torch.channels_last)
            for step in steps:
                if step == "mix":
                    x = mix_by_hand(x, y, mixing)
                else:
                    x = attack_by_hand(net, x, y, attack, 0.1, attacking)
            loss = F.cross_entropy(net(x), y, label_smoothing=0.1, reduction="none").mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        means.append(torch.stack(losses).mean().item())
    return net, means


LOSSES = {  # mean loss of the two epochs; natural training and mixup know no attack
    " fgsm": [2.22865, 1.77586],
    " pgd": [2.22865, 1.77586],
    " nfgsm": [2.22865, 1.77586],
    "mix fgsm": [2.19834, 1.71621],
    "mix pgd": [2.19834, 1.71621],
    "mix nfgsm": [2.19834, 1.71621],
    "attack fgsm": [2.66251, 2.1861],
    "attack pgd": [2.67882, 2.20583],
    "attack nfgsm": [2.7202, 2.27047],
    "attack-mix fgsm": [2.64496, 2.12948],
    "attack-mix pgd": [2.65583, 2.13957],
    "attack-mix nfgsm": [2.70681, 2.21466],
    "mix-attack fgsm": [2.6848, 2.17668],
    "mix-attack pgd": [2.71142, 2.19817],
    "mix-attack nfgsm": [2.73242, 2.24546],
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("steps", ORDERS, ids="-".join)
def test_the_package_trains_what_a_textbook_loop_trains(digits, steps, attack):
    done = fit(digits, Pipeline(steps), replace(CFG, attack=attack))
    net, losses = textbook(digits, steps, attack)
    assert same_bits(done.model, net)
    assert [row["loss"] for row in done.curves] == losses
    key = "-".join(steps) + " " + attack
    np.testing.assert_allclose(losses, LOSSES[key], atol=1e-4, err_msg="another number than before")


def test_the_comparison_would_notice(digits):
    net, _ = textbook(digits, ("mix", "attack"), "fgsm")
    assert not same_bits(fit(digits, Pipeline(("attack", "mix"))).model, net)


# what a method may ask for, without a change of the loop


@dataclass(frozen=True)
class Mean(Method):
    "The mean instead of the losses: the loop takes both."

    def step(self, run, x, y):
        return super().step(run, x, y).mean()


def test_losses_of_samples_or_their_mean(digits):
    assert same_bits(fit(digits, Method()).model, fit(digits, Mean()).model)


@dataclass(frozen=True)
class Radii(Method):
    "A radius for each class; the classes below `clean` are not attacked at all."

    clean: int = 3

    def start(self, run):
        return dict(radius=(torch.arange(run.n_cls) >= self.clean).float().to(run.images.y.device))

    def step(self, run, x, y):
        a = run.attack(x, y, run.cfg.eps * run.state["radius"][y])
        z = run.logits(a)
        run.tally(z, y)
        run.add("moved", y, (a - x).abs().flatten(1).amax(1))
        return run.loss(z, y)


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "nfgsm", "noise"])
def test_a_radius_per_class(digits, attack):
    method = Radii()
    run = a_run(digits, method, replace(CFG, attack=attack))
    x, y = run.batch(torch.arange(160))
    method.step(run, x, y)
    moved = run.seen["moved"] / run.seen["n"]
    most = 0.3 if attack == "nfgsm" else 0.1
    assert (moved[:3] == 0).all() and (moved[3:] > 0.05).all() and (moved <= most + 1e-6).all()
    assert run.seen["n"].tolist() == digits.train.counts()


def test_a_weight_per_class(digits):
    "Weights of zero (allowed in a method of one's own) are as if the images were not there."

    class Only(Method):
        def step(self, run, x, y):
            return (y < 5).float() * super().step(run, x, y)

    method = Only()
    run = a_run(digits, method)
    x, y = run.batch(torch.arange(64))
    method.step(run, x, y).sum().backward()
    net = smooth()
    F.cross_entropy(net(x[y < 5]), y[y < 5], label_smoothing=0.1, reduction="sum").backward()
    for a, b in zip(run.model.parameters(), net.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_weights_have_mean_one_over_the_training_images(digits):
    uneven = replace(digits, train=digits.train.subset(digits.train.y.argsort()[:100]))
    method = Weighted(weights=range(1, 11))
    run = a_run(uneven, method)
    w = run.state["weight"]
    assert abs(w[uneven.train.y].mean() - 1) < 1e-6
    torch.testing.assert_close(w / w[0], torch.arange(1.0, 11.0))
    even = Weighted(weights=(7.0,) * 10)
    assert same_bits(fit(digits, even).model, fit(digits, "at").model)


def test_an_attack_towards_a_class(digits):
    run = a_run(digits, Method())
    x, y = run.batch(torch.arange(64))
    goal = (y + 3) % 10
    z = x.clone().requires_grad_()
    g = torch.autograd.grad(F.cross_entropy(run.model(z), goal, reduction="sum"), z)[0]
    assert torch.equal(run.attack(x, y, target=goal), (x - 0.1 * g.sign()).clamp(0, 1))
    assert not torch.equal(run.attack(x, y), run.attack(x, y, target=goal))
    assert run.gradients == 3 * 64


def test_clean_and_attacked_images_in_one_loss(digits):
    class Both(Method):
        def step(self, run, x, y):
            a = run.attack(x, y)
            return run.loss(run.logits(x), y) + 2 * run.loss(run.logits(a), y)

    run = a_run(digits, Both())
    x, y = run.batch(torch.arange(64))
    Both().step(run, x, y).mean().backward()
    net = smooth()
    a = attack_by_hand(net, x, y, "fgsm", 0.1, None)
    both = [F.cross_entropy(net(v), y, label_smoothing=0.1) for v in (x, a)]
    (both[0] + 2 * both[1]).backward()
    for p, q in zip(run.model.parameters(), net.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert gradients_per_image(Both()) == 3


def test_other_images_than_those_whose_turn_it_is(digits):
    class Seven(Method):
        "Every step trains on the sevens."

        def take(self, run, idx):
            return (run.images.y == 7).nonzero()[: len(idx), 0]

    risk = T.attack_errors(fit(digits, Seven()).model, digits.train, 0.1, ("clean",))["clean"]
    assert not risk[digits.train.y == 7].any() and risk[digits.train.y != 7].all()


def test_trades_without_its_term_is_natural_training(digits):
    "beta 0, and BatchNorm sees clean images only: the bits of natural training."
    plain = fit(digits, Method(), net=smooth())
    assert same_bits(fit(digits, Trades(beta=0.0), net=smooth()).model, plain.model)
    assert not same_bits(fit(digits, Trades(), net=smooth()).model, plain.model)


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "nfgsm"])
def test_trades_attacks_the_divergence(digits, attack):
    run = a_run(digits, Trades(), replace(CFG, attack=attack, eps=0.2))
    x, _ = run.batch(torch.arange(64))
    p = run.probabilities(x)
    near = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    a = run.attack(x, p, loss=M.divergence, start=near)
    noise = Threat(0.2).noise(x, torch.Generator().manual_seed(6))
    far, beside = (M.divergence(run.model(z), p).mean() for z in (a, noise))
    assert far > 3 * beside and (a - x).abs().max() <= (0.61 if attack == "nfgsm" else 0.201)


# averages


def test_the_average_moves_only_where_the_gate_is_open(digits, monkeypatch):
    method, cfg = Averaged(Pipeline(), 0.75, "epoch", gate=0.5), replace(CFG, epochs=6)
    worst, path = [0.9, 0.4, 0.6, 0.5, 0.2, 0.1], []
    risks = iter(worst)
    monkeypatch.setattr(Run, "val_risk", lambda self: torch.tensor([0.0, next(risks)]))

    class Watched(Pipeline):
        def end_epoch(self, run):
            path.append({k: v.clone() for k, v in run.model.state_dict().items()})

    done = fit(digits, replace(method, inner=Watched()), cfg)
    kept = [w for r, w in zip(worst, path) if r <= 0.5]
    assert len(kept) == 4
    for name, value in done.model.state_dict().items():
        if value.is_floating_point():  # four kept: still the plain mean
            mean = sum(w[name].double() for w in kept) / 4
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, kept[-1][name])


def test_the_average_is_what_is_watched_and_training_does_not_feel_it(digits):
    plain, ema = fit(digits, "at", watched=2), fit(digits, Averaged(decay=0.5), watched=2)
    assert [r["loss"] for r in plain.curves] == [r["loss"] for r in ema.curves]
    assert not same_bits(plain.model, ema.model)
    wrong = T.attack_errors(ema.model, digits.val, 0.1, ("fgsm",))["fgsm"]
    assert abs(wrong.float().mean().item() - ema.curves[-1]["fgsm"]) < 1e-6


def test_a_gate_that_never_opens_leaves_the_network(digits):
    shut = Averaged(decay=0.5, every="epoch", gate=0.0)
    assert same_bits(fit(digits, shut).model, fit(digits, "at").model)


@pytest.mark.parametrize("name", ["fawa", "cfa", "cfa_trades", "fairtat"])
def test_a_gate_wants_validation_images_of_every_class(digits, name, tmp_path):
    few = replace(digits, val=digits.val.subset((digits.val.y != 3) & (digits.val.y != 8)))
    with pytest.raises(
        ValueError, match="needs validation images of every class, got none of 3, 8"
    ):
        fit(few, name, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*"))
    fit(few, Averaged(METHODS[name].inner, 0.85, "epoch"), replace(CFG, epochs=1))  # without one


@pytest.mark.parametrize("name", ["ccm", "trix", "fairtat", "skg"])
def test_a_class_that_an_epoch_leaves_out_is_named(digits, name):
    y = digits.train.y
    one = (y != 7) | (torch.arange(len(y)) == (y == 7).nonzero()[0, 0])
    rare = replace(digits, train=digits.train.subset(one))
    cfg = replace(CFG, epochs=20, batch=100, drop_last=True)  # 45 of 145 images are left out
    says = r"class '7' had no image in epoch \d+, so its risk is not known.*stopped in epoch"
    with pytest.raises(FloatingPointError, match=says):
        fit(rare, name, cfg)
    fit(rare, name, replace(cfg, epochs=1, drop_last=False))


def test_an_average_passes_every_verb_on(digits):
    called = []

    class Loud(Pipeline):
        pass

    def loud(verb):
        def method(self, *args):
            called.append(verb)
            return getattr(Pipeline, verb)(self, *args)

        return method

    for verb in ("check", "start", "take", "step", "after_step", "end_epoch"):
        setattr(Loud, verb, loud(verb))
    fit(digits, Averaged(Loud()), replace(CFG, epochs=1, batch=160))
    assert called == ["check", "start", "take", "step", "after_step", "end_epoch"]


# one alignment


def test_alignment_takes_no_notice_of_the_valid_range_and_leaves_no_trace(digits):
    net, x, y = smooth(), digits.train.floats()[:32], digits.train.y[:32]
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    values = [alignment(net, x, y, Threat(0.3, box=box), draw()) for box in ((0.0, 1.0), None)]
    assert torch.equal(*values) and values[0].requires_grad and (values[0] <= 1 + 1e-6).all()
    with torch.no_grad():
        assert torch.equal(alignment(net, x, y, Threat(0.3), draw()), values[0].detach())
    assert all(p.grad is None for p in net.parameters()) and net.training
    assert torch.allclose(alignment(net, x, y, Threat(0.0), draw()), torch.ones(32))


def test_gradalign_with_no_weight_has_the_gradients_of_its_pipeline(digits):
    runs = [a_run(digits, m) for m in (Pipeline(), GradAlign(weight=0.0))]
    for run, method in zip(runs, (Pipeline(), GradAlign(weight=0.0))):
        method.step(run, *run.batch(torch.arange(64))).mean().backward()
    for p, q in zip(*(r.model.parameters() for r in runs)):
        torch.testing.assert_close(p.grad, q.grad)


# the price


@pytest.mark.parametrize("name", [n for n in METHODS if n not in CURES])  # theirs: test_cures
def test_the_price_told_is_the_price_paid(digits, name):
    for cfg in (replace(CFG, epochs=1), replace(CFG, epochs=1, attack="pgd", steps=2)):
        paid = fit(digits, name, cfg).record["gradient_evaluations"] / len(digits.train)
        assert paid == gradients_per_image(name, cfg)


def test_telling_the_price_draws_nothing_from_anybody():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert gradients_per_image("at", TrainCfg(eps=(0.1, 0.2, 0.1))) == 2
    assert gradients_per_image(Weighted(weights=(1, 2, 3)), n_cls=3) == 2
    assert gradients_per_image(Averaged(Pipeline(("attack", "mix"), "set", 5))) == 6
    assert gradients_per_image("at", TrainCfg(augment="crop_flip", attack="noise")) == 1
    assert torch.equal(before, torch.get_rng_state())


# plain data, names, and what is refused


@pytest.mark.parametrize("name", [*METHODS, "nested"])
def test_a_method_is_a_value(name):
    method = METHODS.get(name) or Averaged(Averaged(GradAlign(law=("triang", 0.5))), gate=None)
    again = described(json.loads(json.dumps(describe(method))))
    copies = [again, copy.deepcopy(method), pickle.loads(pickle.dumps(method)), replace(method)]
    assert all(c == method and hash(c) == hash(method) for c in copies)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: method_of("gradaling"), "did you mean 'gradalign'"),
        (lambda: Pipeline(partnr="set"), "Pipeline must be one of .* did you mean 'partner'"),
        (lambda: Trades(betta=1.0), "did you mean 'beta'"),
        (lambda: TrainCfg(epoch=3), "TrainCfg must be one of .* did you mean 'epochs'"),
        (lambda: TrainCfg(attack="ngsm"), "did you mean 'nfgsm'"),
        (lambda: Pipeline(("attack", "attack")), "steps must be one of"),
        (lambda: Pipeline(law=("bta", 2, 2)), "law must be a number"),
        (lambda: Pipeline(law=("norm", 0, 1)), "support inside"),
        (lambda: Pipeline(lam_per="batch", k=3), "k must be 2, got 3"),
        (lambda: Trades(beta=float("nan")), r"beta must lie in \[0, inf\), got nan"),
        (lambda: GradAlign(weight=-0.1), r"weight must lie in \[0, inf\), got -0.1"),
        (lambda: Averaged(gate=0.5), "every must be 'epoch'"),
        (lambda: Averaged(gate=80, every="epoch"), r"gate must be a risk in \[0, 1\], got 80"),
        (lambda: Averaged(decay=1), r"decay must lie in \(0, 1\), got 1"),
        (lambda: described(dict(kind="Mine")), "'Mine' is not defined here"),
    ],
)
def test_what_is_no_method_is_refused_with_the_nearest_that_is(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_run_that_a_method_cannot_do_is_refused_before_it_starts(digits, tmp_path):
    trained = lambda row: pytest.fail("trained")  # noqa: E731
    for method, says in [
        (Weighted(weights=(1, 2, 3)), "weights must hold 10 numbers, got 3"),
        (Averaged(Weighted(weights=(1, 2))), "weights must hold 10 numbers, got 2"),
        (Weighted(partner="any", weights=(1,) * 10), "partner must not be 'any'"),
    ]:
        with pytest.raises(ValueError, match=says):
            fit(digits, method, out=tmp_path / "run", on_epoch=trained)
    assert not list((tmp_path / "run").glob("*"))


def test_a_class_of_ones_own_may_have_an_init_of_its_own():
    class Free(Method):
        def __init__(self, **words):
            object.__setattr__(self, "words", words)

    assert Free(anything=1).words == dict(anything=1)
    with pytest.raises(ValueError, match="a field of Radii must be one of 'clean', got 'claen'"):
        Radii(claen=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_memory_that_is_no_number_stops_the_run_with_class_and_epoch(digits, tmp_path, bad):
    class Breaks(Radii):
        def end_epoch(self, run):
            if run.epoch == 2:
                run.state["radius"][7] = bad

    says = rf"the method's radius of class 7 became {bad} in epoch 2.*last.pt \(epoch 1\)"
    with pytest.raises(FloatingPointError, match=says):
        fit(digits, Breaks(), out=tmp_path)

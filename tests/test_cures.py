"The published cures as a user meets them: trained, renamed, resumed, refused."

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fairmix_nb import data as D
from fairmix_nb import train as T
from fairmix_nb.cures import CFA, CURES, DAFA, FRL, WorstCase
from fairmix_nb.methods import (
    Averaged,
    Method,
    Run,
    TrainCfg,
    describe,
    described,
    gradients_per_image,
)

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
import digits_survival as survival  # noqa: E402

CFG = TrainCfg(eps=0.1, epochs=3, batch=40, lr=3e-3, attack="pgd", steps=2)
INNER = {name: getattr(m, "inner", m) for name, m in CURES.items()}


@pytest.fixture(scope="module")
def digits():
    whole = D.load("digits", seed=0, per_class=8, progress=False)
    few = torch.cat([(whole.val.y == c).nonzero()[:3, 0] for c in range(10)])
    return replace(whole, val=whole.val.subset(few))


def network(n_cls=10, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, n_cls))


def fit(data, method, cfg=CFG, net=None, **kw):
    net = net or network(data.train.n_cls)
    return T.fit(net, data, cfg, method, device="cpu", progress=False, **kw)


def same_bits(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values())
    return all(torch.equal(v, w) for v, w in pairs)


# renaming the classes renames what is remembered, and the outputs, and nothing else

BLIND = [n for n in INNER if n not in ("fairtat", "trix")]  # those draw classes by number


def renamed(data, to):
    "The same images, class c called to[c]."
    parts = {p: replace(getattr(data, p), y=to[getattr(data, p).y]) for p in ("train", "val")}
    return replace(data, **parts)


def with_outputs(net, to):
    net = copy.deepcopy(net)
    net[3].weight.data[to] = net[3].weight.data.clone()
    net[3].bias.data[to] = net[3].bias.data.clone()
    return net


@pytest.mark.parametrize("name", BLIND)
def test_renaming_the_classes_renames_the_memory(digits, name):
    to, cfg = torch.randperm(10, generator=torch.Generator().manual_seed(1)), replace(CFG, epochs=2)
    one = fit(digits, INNER[name], cfg, network())
    two = fit(renamed(digits, to), INNER[name], cfg, with_outputs(network(), to))
    x = digits.test.floats()
    torch.testing.assert_close(two.model(x)[:, to], one.model(x), rtol=1e-3, atol=1e-4)
    for row, other in zip(one.curves, two.curves):
        for what in row:
            if isinstance(row[what], list):
                there = torch.tensor(other[what])[to]
                torch.testing.assert_close(there, torch.tensor(row[what]), rtol=1e-3, atol=1e-4)


def test_the_comparison_would_notice(digits):
    class Favours(Method):
        def step(self, run, x, y):
            return (1 + (y == 3)) * super().step(run, x, y)

    to = torch.arange(10).roll(1)
    one = fit(digits, Favours(), CFG, network())
    two = fit(renamed(digits, to), Favours(), CFG, with_outputs(network(), to))
    x = digits.test.floats()
    assert not torch.allclose(two.model(x)[:, to], one.model(x), rtol=1e-3, atol=1e-4)


# the test part is not read


class Sealed(D.ImageSet):
    "Its digest and size may be asked for, an image or a label not."

    def __getattribute__(self, name):
        if name in ("x", "y", "floats", "subset", "counts", "to"):
            raise AssertionError(f"the test part was asked for {name}")
        return super().__getattribute__(name)

    def __post_init__(self):
        pass

    def __len__(self):
        return 10

    def digest(self):
        return "sealed"


@pytest.mark.parametrize("name", CURES)
def test_nothing_is_learnt_from_the_test_part(digits, name):
    sealed = replace(digits, test=Sealed(digits.test.x, digits.test.y, digits.test.classes))
    with pytest.raises(AssertionError, match="asked for x"):
        len(sealed.test.x)
    fit(sealed, CURES[name], replace(CFG, epochs=2))


# what a run costs, whether it is stopped, and what it starts from

BETWEEN = dict(frl=20, wat=10) | {n: 10 for n, m in CURES.items() if isinstance(m, Averaged)}


@pytest.mark.parametrize("name", CURES)
def test_the_price_is_the_step_s_and_what_lies_between_steps(digits, name):
    n, m = len(digits.train), len(digits.val)
    paid = fit(digits, name).record["gradient_evaluations"]
    extra = 10 * n if name == "confsr" else BETWEEN.get(name, 0) * m
    assert paid == CFG.epochs * (gradients_per_image(name, CFG) * n + extra)


@pytest.mark.parametrize("name", CURES)
def test_resumed_is_as_if_it_had_never_stopped(digits, name, tmp_path):
    whole = fit(digits, name)

    def pull(row):
        if row["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(digits, name, out=tmp_path, on_epoch=pull)
    again = T.resume(tmp_path, network(), digits, progress=False)
    assert same_bits(whole.model, again.model)
    assert whole.curves == again.curves


@pytest.mark.parametrize("name", ["frl", "faal", "confsr", "dafa"])
def test_fine_tuning_begins_with_the_checkpoint(digits, name, tmp_path):
    fit(digits, "at", replace(CFG, epochs=1), out=tmp_path / "at")
    start = tmp_path / "at" / "last.pt"
    still = replace(CFG, epochs=1, lr=1e-12, optimizer="sgd")
    tuned = fit(digits, name, still, network(seed=5), start_from=start)
    begun = fit(digits, "at", replace(CFG, epochs=1))
    x = digits.test.floats()
    torch.testing.assert_close(tuned.model(x), begun.model(x), rtol=1e-5, atol=1e-5)
    assert tuned.record["start_from"]


@pytest.mark.parametrize("name", CURES)
def test_a_cure_is_a_value(name):
    assert described(describe(CURES[name])) == CURES[name]


# few classes, many classes, missing ones


def blobs(n_cls, per_class=4, missing=()):
    "Images that are easy to tell apart; validation without the classes in `missing`."
    rng = torch.Generator().manual_seed(0)
    centres = torch.randint(256, (n_cls, 1, 8, 8), generator=rng)
    y = torch.arange(n_cls).repeat(per_class)
    x = (centres[y] + torch.randint(-20, 20, (len(y), 1, 8, 8), generator=rng)).clamp(0, 255)
    images = D.ImageSet(x.byte(), y, tuple(map(str, range(n_cls))))
    kept = torch.tensor([c not in missing for c in y.tolist()])
    val = images.subset(kept.nonzero()[:, 0])
    return D.Data(images, val, images, "blobs", 0, dict(rule="given"))


@pytest.mark.parametrize("n_cls", [2, 100])
@pytest.mark.parametrize("name", CURES)
def test_two_classes_and_a_hundred(name, n_cls):
    done = fit(blobs(n_cls), name, replace(CFG, epochs=1, batch=8, lr=1e-3))
    assert all(v.isfinite().all() for v in done.model.state_dict().values())


@pytest.mark.parametrize("name", CURES)
def test_classes_that_a_batch_lacks(name):
    "Batches of one image: nine of ten classes are missing, always."
    done = fit(blobs(10, 2), name, replace(CFG, epochs=1, batch=1, lr=1e-4))
    assert all(v.isfinite().all() for v in done.model.state_dict().values())


@pytest.mark.parametrize("name", ["frl", "wat"])
def test_a_class_without_validation_is_refused_before_the_first_step(name, tmp_path):
    with pytest.raises(ValueError, match="validation images of every class, got none of 1, 2"):
        fit(blobs(4, missing=(1, 2)), name, replace(CFG, batch=8), out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*"))


def test_a_weight_that_is_not_positive_stops_the_run_with_class_and_epoch(digits, tmp_path):
    says = r"the method's weight of class '\d' became -[\d.]+ in epoch 2.*last.pt \(epoch 1\)"
    with pytest.raises(FloatingPointError, match=says):
        fit(digits, DAFA(scale=500.0), out=tmp_path)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: CFA(basis=1), "did you mean 'base'"),
        (lambda: FRL(rate=float("nan")), r"rate must lie in \[0, inf\), got nan"),
        (lambda: WorstCase(adversary="stdd"), "did you mean 'std'"),
        (lambda: WorstCase(strength=-1.0), r"strength must lie in \[0, inf\), got -1"),
    ],
)
def test_what_is_no_cure_is_refused_with_the_nearest_that_is(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# the controls of the collapse: what the loss sees


def shown(digits, control):
    "Clean and attacked images, labels, and what the network is given for the loss."
    run, given = Run(network(), replace(CFG, attack="fgsm"), digits.train, epoch=1), []
    x, y = run.batch(torch.arange(80))
    a = run.attack(x, y)
    run.net = lambda z: given.append(z) or run.model(z)
    control.step(run, x, y)
    return x, a, y, given[0]


def test_a_shorter_step_stays_between_the_image_and_its_attack(digits):
    x, a, _, z = shown(digits, survival.Apart("self"))
    share = ((z - x) / (a - x)).flatten(1).nanmedian(1).values
    torch.testing.assert_close(z, x + share.view(-1, 1, 1, 1) * (a - x), atol=1e-5, rtol=0)
    assert share.min() >= 0 and share.max() <= 1 and share.std() > 0.2


@pytest.mark.parametrize("same", [True, False])
def test_a_clean_partner_is_an_image_of_its_class_or_of_any(digits, same):
    x, a, y, z = shown(digits, survival.Apart("clean", same=same))
    own = 0
    for i in range(len(x)):  # on a line between the attacked image and which clean one?
        lines = (x - a[i]).flatten(1)
        t = ((z[i] - a[i]).flatten() * lines).sum(1) / lines.square().sum(1)
        far = ((z[i] - a[i]).flatten() - t[:, None] * lines).norm(dim=1)
        own += y[far.argmin()] == y[i]
    assert own == 80 if same else own < 40


@pytest.mark.parametrize(
    "risk, expected",
    [
        ([0.5] * 10 + [0.7] * 10, (5, 13)),  # three of five at .7: a mean of .62
        ([0.5] * 10 + [0.95] + [0.5] * 9, (5, None)),  # one bad epoch is none
        ([1 - 0.04 * e for e in range(20)], (20, None)),  # still learning
        ([0.9] * 6 + [0.5] * 6 + [0.65] * 8, (11, 16)),  # the best so far counts, not the first
        ([0.5] * 10 + [0.55] * 10, (5, None)),
    ],
)
def test_a_collapse_is_robustness_lost(risk, expected):
    assert survival.fate(risk) == expected


def test_survival_counts_censored_runs_and_compares_with_fgsm():
    fates = {"FGSM": [(e, True) for e in (5, 6, 7, 8, 9)], "N-FGSM": [(100, False)] * 5}
    fates["same class"] = [(60, True)] + [(100, False)] * 4
    fates = [(k, e, c) for k, v in fates.items() for e, c in v]
    runs = [dict(eps=0.3, control=k, epoch=e, collapsed=c) for k, e, c in fates]
    head, fgsm, nfgsm, same = survival.survival(dict(runs=runs), 0.3, ("FGSM",))
    assert fgsm == ["FGSM", "5 of 5", "5 to 9", "7", ""]
    assert nfgsm[:-1] == ["N-FGSM", "0 of 5", "", "beyond 100"]
    assert same[:-1] == ["same class", "1 of 5", "60 to 60", "beyond 100"]
    # by hand: at each of the five deaths, expected are 5/10, 4/9, 3/8, 2/7, 1/6 of FGSM's
    expected = sum(k / (k + 5) for k in range(1, 6))
    variance = sum(k * 5 / (k + 5) ** 2 for k in range(1, 6))
    p = 2 * (1 - torch.distributions.Normal(0, 1).cdf(torch.tensor((5 - expected) / variance**0.5)))
    assert float(nfgsm[-1]) == pytest.approx(float(p), rel=5e-3)

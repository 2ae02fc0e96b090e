"The published cures as a user meets them: trained, renamed, resumed, refused."

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fairmix_nb import cures as C
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
    make_streams,
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


def renamed(data, to):
    "The same images, class c called to[c]."
    parts = {p: replace(getattr(data, p), y=to[getattr(data, p).y]) for p in ("train", "val")}
    return replace(data, **parts)


def with_outputs(net, to):
    net = copy.deepcopy(net)
    net[3].weight.data[to] = net[3].weight.data.clone()
    net[3].bias.data[to] = net[3].bias.data.clone()
    return net


def drawing_as_before(to):
    "`other_class` with the draws that the classes had by their old names"
    back, draw = to.argsort(), C.other_class
    return lambda run, y, liking: to[draw(run, back[y], liking[to])]


@pytest.mark.parametrize("name", INNER)
def test_renaming_the_classes_renames_the_memory(digits, name, monkeypatch):
    to, cfg = torch.randperm(10, generator=torch.Generator().manual_seed(1)), replace(CFG, epochs=2)
    one = fit(digits, INNER[name], cfg, network())
    monkeypatch.setattr(C, "other_class", drawing_as_before(to))
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
    still = replace(CFG, epochs=2, lr=1e-12, optimizer="sgd")
    tuned = fit(digits, name, still, network(seed=5), start_from=start)
    begun = fit(digits, "at", replace(CFG, epochs=1))
    x = digits.test.floats()
    torch.testing.assert_close(tuned.model(x), begun.model(x), rtol=1e-5, atol=1e-5)
    assert tuned.record["start_from"]


@pytest.mark.parametrize("name", CURES)
def test_a_cure_is_a_value(name):
    assert described(describe(CURES[name])) == CURES[name]


AT = dict(kind="Pipeline", steps=["attack"], partner="batch", k=2, law="uniform", lam_per="sample")
CCM = dict(kind="CFA", beta=None, base=0.5, base_beta=0.5, warmup=10 / 200)
WORST = dict(kind="WorstCase", beta=None)


def gated(inner):
    "CFA's average: decay .85, open where the worst class is 20 % right"
    return dict(kind="Averaged", inner=inner, decay=0.85, every="epoch", gate=1 - 0.2)


PUBLISHED = dict(
    fawa=gated(AT),
    ccm=CCM,
    cfa=gated(CCM),
    cfa_trades=gated(CCM | dict(beta=6.0, base=0.3)),
    dafa=dict(kind="DAFA", beta=6.0, scale=1.0, warmup=70 / 110),
    frl=dict(kind="FRL", beta=1.5, slack=0.07, rate=0.05, margin_rate=0.2),
    faal=WORST | dict(adversary="kl", strength=0.5),
    codat=WORST | dict(adversary="std", strength=None),
    variance=WORST | dict(adversary="variance", strength=0.1),
    wat=WORST | dict(adversary="hedge", beta=6.0, strength=0.1),
    cfol=WORST | dict(adversary="exp3", strength=0.5),
    fairtat=gated(dict(kind="FairTAT", beta=None, base=0.5, liking=2.0)),
    trix=dict(kind="TRIX", beta=None, base=0.5),
    confsr=dict(kind="ConfSR", beta=6.0, share=0.3, shrink=0.9),
    bat=dict(kind="BAT", beta=6.0, doubt=1.0),
    skg=dict(kind="SKG", beta=None, pull=1.0),
    adjusted=AT | dict(kind="LogitAdjusted", tau=1.0),
    balanced=AT | dict(kind="Balanced"),
)


def test_the_constants_are_the_published_ones():
    assert {name: describe(m) for name, m in CURES.items()} == json.loads(json.dumps(PUBLISHED))


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


@pytest.mark.parametrize("name", CURES)
def test_a_hundred_classes(name):
    done = fit(blobs(100), name, replace(CFG, epochs=2, batch=8, lr=1e-3))
    assert all(v.isfinite().all() for v in done.model.state_dict().values())


@pytest.mark.parametrize("n_cls", [2, 3, 4])
@pytest.mark.parametrize("name", CURES)
def test_few_classes_are_learnt_and_not_exchanged(name, n_cls):
    data = blobs(n_cls, 8)
    done = fit(data, name, replace(CFG, epochs=12, batch=8))
    right = (done.model.eval()(data.train.floats()).argmax(1) == data.train.y).float().mean()
    assert right > 0.9


@pytest.mark.parametrize("name", CURES)
def test_classes_that_a_batch_lacks(name):
    "Batches of one image: nine of ten classes are missing, always."
    done = fit(blobs(10, 2), name, replace(CFG, epochs=2, batch=1, lr=1e-4))
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
        (lambda: C.FairTAT(beta=6.0), "FairTAT has no form with TRADES's.*must be None, got 6.0"),
        (lambda: C.TRIX(beta=6.0), "TRIX has no form with TRADES's.*must be None, got 6.0"),
        (lambda: C.SKG(beta=6.0), "SKG has no form with TRADES's.*must be None, got 6.0"),
        (lambda: C.BAT(beta=None), "beta must be a number, got None"),
        (lambda: CFA(beta="6"), "beta must be a number, got '6'"),
        (lambda: CFA(beta=True), "beta must be a number, got True"),
        (lambda: C.ConfSR(share=3.0), r"share must lie in \[0, 1\], got 3.0"),
        (lambda: CFA(base=100.0), r"base must lie in \[0, 1\], got 100.0"),
        (lambda: DAFA(warmup=5.0), r"warmup must lie in \[0, 1\), got 5.0"),
    ],
)
def test_what_is_no_cure_is_refused_with_the_nearest_that_is(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_warm_up_that_leaves_no_epoch_is_refused_before_the_first_step(digits, tmp_path):
    says = r"DAFA sets its weights after epoch 1 \(warmup 0.636\): epochs must be more, got 1"
    with pytest.raises(ValueError, match=says):
        fit(digits, "dafa", replace(CFG, epochs=1), out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*"))
    with pytest.raises(ValueError, match="after epoch 3"):
        fit(digits, DAFA(warmup=0.95))


# what the rules hand out

RULES = dict(kl=0.5, std=1 / 3, variance=0.1, hedge=0.1)  # with the strengths for ten classes


def unequal(seed, counts=(30, 20, 10, 5, 1, 1, 2, 3, 4, 8)):
    "A run on ten classes of different size, its labels, logits, losses and costs so far."
    free = torch.Generator().manual_seed(seed)
    y = torch.arange(10).repeat_interleave(torch.tensor(counts))
    run = Run(network(), CFG, blobs(10).train, epoch=1)
    run.state = dict(cost=10 * torch.rand(10, generator=free))
    z = 5 * torch.randn(len(y), 10, generator=free)
    return run, y, z, nn.functional.cross_entropy(z, y, reduction="none")


def weights(rule, run, y, z, each):
    return C.ADVERSARIES[rule][0](run, RULES[rule], y, z, each)


@pytest.mark.parametrize("loss", [0.0, 1e-6, 1.7, 1e4])
@pytest.mark.parametrize("rule", RULES)
def test_equal_losses_in_unequal_numbers_give_equal_weights(rule, loss):
    run, y, z, each = unequal(0)
    run.state["cost"] = torch.full((10,), loss)
    z, n = torch.zeros_like(z), y.bincount()[y]  # no margin either way: nobody has more than n m
    w = weights(rule, run, y, z, torch.full_like(each, loss))
    of_class = w * n if rule == "std" else w  # CODAT's is a mean over the classes
    torch.testing.assert_close(of_class, of_class[:1].expand(len(y)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_rules_do_not_know_the_names_of_classes(rule):
    to = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    run, y, z, each = unequal(0)
    before, run.state = weights(rule, run, y, z, each), dict(cost=run.state["cost"][to.argsort()])
    after = weights(rule, run, to[y], z[:, to.argsort()], each)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("rule", RULES)
def test_weights_of_rules_are_bounded(rule):
    for seed in range(20):
        run, y, z, each = unequal(seed)
        w, share = weights(rule, run, y, z, 100 * each), y.bincount()[y] / len(y)
        assert w.min() >= 0 and w.isfinite().all()
        if rule == "variance":  # a gradient, not a ball: no largest one
            continue
        most = dict(kl=10, std=2 / (10 * share), hedge=20)[rule]  # C; (1 + c sqrt(C - 1)) / k; 2 C
        assert (w <= most * (1 + 1e-5) if rule == "std" else w <= most).all()


def test_odds_of_a_class_are_at_least_half_of_equal_ones():
    run = unequal(0)[0]
    run.state["cost"] = torch.tensor([0.0] * 9 + [1e4])
    q = C.class_odds(run, 0.5)
    torch.testing.assert_close(q, torch.tensor([0.05] * 9 + [0.55]))


BOUNDS = dict(  # of what the classes are given, whatever an epoch has shown
    ccm=dict(radius=(0.5, 1.5), calibration=(0.5, 1.5)),
    cfa_trades=dict(radius=(0.3, 1.3), calibration=(0.5, 1.5)),
    dafa=dict(weight=(0, 2), radius=(0, 2)),
    frl=dict(weight=(0.05, 0.55), robust_weight=(0.05, 0.55), radius=(0.98, 3)),
    fairtat=dict(radius=(0.5, 1.5), blamed=(0, 1)),
    trix=dict(radius=(0.5, 1.5), weight=(0.1, 1.9), strong=(0, 1)),
    skg=dict(relaxed=(0.3, 0.9)),
)


@pytest.mark.parametrize("name", BOUNDS)
def test_what_classes_are_given_is_bounded(name):
    "Risks drawn at random, many of them 0 or 1; DAFA may stop instead, FRL sees ten epochs."
    free, ended = torch.Generator().manual_seed(0), 0
    for _ in range(30):
        run = Run(network(), replace(CFG, epochs=2), blobs(10).train, epoch=1)
        method, risk = INNER[name], (3 * torch.rand(3, 10, generator=free) - 1).clamp(0, 1)
        run.state, p = method.start(run), (3 * torch.randn(10, 10, generator=free)).softmax(1)
        run.seen = dict(wrong=10 * risk[0], n=torch.full((10,), 10.0), blame=risk[1], taken=p)
        run.val_risk = dict(zip(("clean", "pgd-20"), (risk[0], torch.maximum(*risk[:2])))).get
        try:
            for _ in range(10):
                method.start_epoch(run)
            method.end_epoch(run)
        except FloatingPointError:
            assert name == "dafa"
            continue
        ended += 1
        for what, (low, high) in BOUNDS[name].items():
            assert run.state[what].min() >= low - 1e-6, (what, run.state[what])
            assert run.state[what].max() <= high + 1e-6, (what, run.state[what])
    assert ended > 5


def test_mistakes_weigh_between_a_hundredth_and_two():
    free = torch.Generator().manual_seed(0)
    for size in (2, 3, 10):
        for many in (1, 3, 100):
            m = torch.randint(many, (size, size), generator=free) * (1 - torch.eye(size))
            g = C.spectral_gradient(m)
            to = torch.randperm(size, generator=free)
            assert 0.01 <= g.min() and g.max() <= 2.01 + 1e-6
            again = C.spectral_gradient(m[to][:, to])
            torch.testing.assert_close(again, g[to][:, to], rtol=1e-3, atol=1e-3)


def test_codat_at_its_default_weighs_the_worst_class_most(digits):
    run = Run(network(), CFG, digits.train, epoch=1)
    x, y = run.batch(torch.arange(80))
    each = run.loss(run.logits(run.attack(x, y)), y)
    run.streams = make_streams(CFG.seed)
    losses = CURES["codat"].step(run, x, y)
    torch.testing.assert_close(losses, C.by_std(run, 1 / math.sqrt(9), y, None, each) * each)
    assert not torch.allclose(losses, C.by_std(run, 0.0, y, None, each) * each, rtol=0.1)


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


def test_a_step_shrinks_to_the_first_third_that_is_wrong(digits):
    net = network()
    run = Run(net, replace(CFG, attack="fgsm", eps=0.1), digits.train, epoch=1)
    x, y = run.batch(torch.arange(80))
    y = net(x).argmax(1)  # labels that hold until the image is moved
    delta, given = run.attack(x, y) - x, []
    run.net = lambda z: given.append(z) or run.model(z)
    survival.Shrunk().step(run, x, y)
    parts = []
    for i in range(80):  # one image, one third after the other
        steps = (k for k in (1, 2, 3) if net(x[i : i + 1] + k / 3 * delta[i]).argmax() != y[i])
        parts.append(next(steps, 3))
        torch.testing.assert_close(given[0][i], x[i] + parts[-1] / 3 * delta[i])
    assert set(parts) == {1, 2, 3}


def test_pco_mixes_an_images_last_attack_with_the_next_step_from_it(digits):
    run = Run(network(), replace(CFG, attack="fgsm", smoothing=4 / 9), digits.train, epoch=1)
    how, eps, given = survival.Fused(), run.cfg.eps, []
    run.state = how.start(run)
    first = run.state["last.delta"].clone()
    torch.testing.assert_close(first.unique(), torch.tensor([-eps, eps]))
    assert len(first) == len(digits.train)
    run.net = lambda z: given.append(z) or run.model(z)
    x, y = run.batch(how.take(run, torch.arange(80)))
    loss = how.step(run, x, y)
    old, new, mixed = given
    assert torch.equal(old, (x + first[:80]).clamp(0, 1))
    assert (new - x).abs().max() <= eps + 1e-6 and not torch.allclose(new, old)
    before, after, z = (run.model(v).detach() for v in given)
    for i in range(80):
        sure = before[i].exp()[y[i]] / before[i].exp().sum()
        want = (1 - sure) * old[i] + sure * (x[i] + 1.5 * (new[i] - x[i]))
        torch.testing.assert_close(mixed[i], want)
    hot = torch.full((80, 10), 0.4 / 9)  # their label: .6, and the rest shared by the others
    hot[torch.arange(80), y] = 0.6
    plain = -(hot * z.log_softmax(1)).sum(1).mean()
    unequal = ((after - before) ** 2).mean() - ((after - z) ** 2).mean()
    assert loss.item() == pytest.approx((plain + 10 * unequal.abs()).item(), rel=1e-5)
    assert torch.equal(run.state["last.delta"][:80], new - x)  # where it goes on from next time
    assert torch.equal(run.state["last.delta"][80:], first[80:])


@pytest.mark.parametrize(
    "risk, expected",
    [
        ([0.5] * 4 + [0.75] * 4, (2, 5)),  # one of two at .75: a mean of .625
        ([0.5] * 4 + [0.65] + [0.5] * 3, (2, None)),  # one bad look is none
        ([1 - 0.1 * e for e in range(9)], (9, None)),  # still learning
        ([0.9] * 3 + [0.5] * 3 + [0.72] * 2, (5, 7)),  # the best so far counts, not the first
        ([0.5] * 4 + [0.55] * 4, (2, None)),
    ],
)
def test_a_collapse_is_robustness_lost(risk, expected):
    assert survival.fate(risk) == expected


def test_a_step_of_fgsm_rs_grows_with_the_radius():
    method, recipe = survival.setting("FGSM-RS", 0.2, 3, 7)
    assert (recipe.attack, recipe.steps, recipe.seed, recipe.epochs) == ("pgd", 1, 3, 7)
    assert recipe.step_size == pytest.approx(0.25) and method == survival.AT


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

"What the attacks promise and the lesson does not stop to show"

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from fairmix_nb.attacks import (
    NORMS,
    apgd,
    attack_by_name,
    autoattack,
    cross_entropy,
    dlr,
    dlr_targeted,
    fgsm,
    in_pixels,
    pgd,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def make(n=12, shape=(3, 4, 4), dtype=torch.float32):
    "A small net with BatchNorm in eval mode, images and labels"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(shape[0], 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8 * shape[1] * shape[2], 5),
        )
    g = gen()
    x, y = torch.rand(n, *shape, generator=g), torch.randint(0, 5, (n,), generator=g)
    return net.eval().to(dtype), x.to(dtype), y


def run(net, x, y, eps=0.1, **kw):
    return pgd(net, x, y, eps, **{"generator": gen(), **kw})


def nearest(d, eps):
    "The nearest point of the l2 ball, by a general-purpose optimiser"
    ball = {"type": "ineq", "fun": lambda p: eps**2 - p @ p, "jac": lambda p: -2 * p}
    return optimize.minimize(
        lambda p: ((p - d) ** 2).sum(),
        d * 0.1,
        jac=lambda p: 2 * (p - d),
        constraints=ball,
        method="SLSQP",
        options={"ftol": 1e-14},
    ).x


def test_projections():
    d = torch.randn(8, 5, generator=gen(), dtype=torch.float64)
    found = np.stack([nearest(row.numpy(), 1.5) for row in d])
    np.testing.assert_allclose(NORMS["l2"].project(d, 1.5), found, atol=1e-5)
    np.testing.assert_array_equal(NORMS["linf"].project(d, 0.4), np.clip(d.numpy(), -0.4, 0.4))
    assert abs(d.numpy() * 1.5 / np.linalg.norm(d) - found).max() > 0.1  # the batch's length


def test_starts_are_uniform():
    many, g = torch.zeros(4000, 5, dtype=torch.float64), gen()
    inf, l2 = NORMS["linf"].start(many, 0.3, g), NORMS["l2"].start(many, 0.3, g)
    radius = l2.norm(dim=1) / 0.3
    assert stats.kstest(inf.flatten() / 0.6 + 0.5, "uniform").pvalue > 1e-3
    assert stats.kstest(radius**5, "uniform").pvalue > 1e-3
    assert stats.kstest(radius, "uniform").pvalue < 1e-6  # forgets the volume
    assert stats.kstest((l2[:, 0] / l2.norm(dim=1) + 1) / 2, stats.beta(2, 2).cdf).pvalue > 1e-3


def test_l2_direction_of_tiny_gradients():
    g = torch.randn(4, 3, 2, 2, generator=gen())
    direction = NORMS["l2"].direction
    torch.testing.assert_close(direction(g * 1e-25), direction(g))
    assert (direction(torch.zeros_like(g)) == 0).all()


def test_pixels_and_normalised_inputs_agree():
    net, x, y = make()
    std = (0.2023, 0.1994, 0.2010)
    sd = torch.tensor(std).view(1, 3, 1, 1)
    inside = fgsm(lambda x: net((x - 0.5) / sd), x, y, in_pixels(0.3, std), box=None)
    outside = fgsm(net, (x - 0.5) / sd, y, 0.3, box=None)
    torch.testing.assert_close((inside - 0.5) / sd, outside)
    with pytest.raises(ValueError, match="one positive number per channel"):
        in_pixels(0.3, (0.2, 0, 0.2))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("keep", ["best", "last"])
def test_small_promises(norm, keep):
    net, x, y = make()
    kept, state = x.clone(), torch.get_rng_state()
    z = run(net, x, y, norm=norm, keep=keep)
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(z, run(net, x, y, norm=norm, keep=keep, check=False))
    assert torch.equal(run(net, x, y, 0.0, norm=norm, keep=keep), x)
    net.requires_grad_(False)
    assert torch.equal(z, run(net, x, y, norm=norm, keep=keep)) and not z.requires_grad
    each = torch.full((len(x), 1, 1, 1), 0.1)
    torch.testing.assert_close(z, run(net, x, y, each, norm=norm, keep=keep))
    last = run(net, x.to(memory_format=torch.channels_last), y, norm=norm, keep=keep)
    torch.testing.assert_close(last, z, atol=1e-4, rtol=0)  # the start ignores the memory layout
    wide, x, y = make(dtype=torch.float64)
    assert run(wide, x, y, norm=norm, keep=keep).dtype == torch.float64


def test_a_channel_of_radius_zero_stays():
    net, x, y = make()
    z = run(net, x, y, torch.tensor([0.1, 0, 0.05]).view(1, 3, 1, 1))
    moved = (z - x).abs().amax((0, 2, 3))
    assert moved[1] == 0 and 0.09 < moved[0] < 0.1 + 1e-6 and 0.04 < moved[2] < 0.05 + 1e-6


@pytest.mark.parametrize(
    "text, change",
    [
        ("finite and lie in", dict(eps=-0.1)),
        ("finite and lie in", dict(eps=float("inf"), box=None)),
        ("finite and lie in", dict(eps=torch.full((12, 1, 1, 1), float("nan")))),
        ("broadcast to x", dict(eps=torch.ones(7, 1, 1, 1))),
        ("the only tensor for l2", dict(eps=torch.full((1, 3, 1, 1), 0.1), norm="l2")),
        ("must be floating point", dict(x=torch.zeros(12, 3, 4, 4, dtype=torch.uint8))),
        ("must lie in the box", dict(x=torch.full((12, 3, 4, 4), float("nan")))),
        ("min -0.5, max -0.5", dict(x=torch.full((12, 3, 4, 4), -0.5))),
        ("n >= 1", dict(x=torch.zeros(0, 3, 4, 4), y=torch.zeros(0).long())),
        ("one label per sample", dict(y=torch.zeros(5).long())),
        ("classes from 0 upwards", dict(y=torch.full((12,), -100))),
        ("classes below 5", dict(y=torch.full((12,), 5))),
        ("classes below 5", dict(y=torch.full((12, 6), 1 / 6))),
        ("long or", dict(y=torch.zeros(12, dtype=torch.int32))),
        ("low < high", dict(box=(1.0, 0.0))),
        ("did you mean 'l2'", dict(norm="L2")),
        ("did you mean 'last'", dict(keep="latest")),
        ("steps must be at least 1", dict(steps=0)),
        ("restarts must be at least 1", dict(restarts=0)),
        ("restarts > 1 needs", dict(restarts=2, random_start=False)),
        ("step_size must be positive", dict(step_size=0.0)),
        ("needs a generator", dict(generator=None)),
        ("one value per sample", dict(loss=nn.functional.cross_entropy)),
        ("no gradient", dict(model=lambda x: torch.zeros(12, 5, requires_grad=True))),
    ],
)
def test_refused(text, change):
    net, x, y = make()
    args = {"model": net, "x": x, "y": y, "eps": 0.1, "generator": gen(), **change}
    with pytest.raises(ValueError, match=text):
        pgd(**args)


def climb(net, x, y, eps=0.1, steps=20, **kw):
    return apgd(net, x, y, eps, steps, **{"generator": gen(), **kw})


def wrong(net, x, y):
    with torch.no_grad():
        return net(x).argmax(1) != y


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kw", [{}, dict(loss=dlr, restarts=2), dict(targets=3)])
def test_apgd_small_promises(norm, kw):
    net, x, y = make()
    with torch.no_grad():
        y = net(x).argmax(1)
    y[0] = (y[0] + 1) % 5  # one that is misread from the start
    kept, state = x.clone(), torch.get_rng_state()
    z = climb(net, x, y, norm=norm, **kw)
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(z[0], x[0]) and not z.requires_grad and 0 <= z.min() and z.max() <= 1
    assert torch.equal(z, climb(net, x, y, norm=norm, check=False, **kw))
    size = (z - x).flatten(1).norm(p=float("inf") if norm == "linf" else 2, dim=1)
    assert size.max() < 0.1 + 1e-6
    assert torch.equal(climb(net, x, y, 0.0, norm=norm, **kw), x)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    each = torch.full((len(x), 1, 1, 1), 0.1)
    torch.testing.assert_close(z, climb(net, x, y, each, norm=norm, **kw))
    value = kw.get("loss", cross_entropy)
    stands = ~wrong(net, z, y)
    if not kw.get("targets"):
        assert (value(net(z), y) >= value(net(x), y))[stands].all()
    wide, x, y = make(dtype=torch.float64)
    assert climb(wide, x, y, norm=norm, **kw).dtype == torch.float64


def test_apgd_radius_of_each_sample_and_channel():
    net, x, y = make(40)
    with torch.no_grad():
        y = net(x).argmax(1)
    eps = torch.linspace(0, 0.2, 40).view(-1, 1, 1, 1)
    z = climb(net, x, y, eps)
    assert ((z - x).abs().amax((1, 2, 3)) <= eps.flatten() + 1e-6).all()
    assert torch.equal(z[0], x[0]) and wrong(net, z, y).any()
    moved = (climb(net, x, y, torch.tensor([0.1, 0, 0.05]).view(1, 3, 1, 1)) - x).abs()
    assert moved[:, 1].max() == 0 and moved[:, 0].max() > 0.09 and moved[:, 2].max() < 0.05 + 1e-6


@pytest.mark.parametrize(
    "kw, runs",
    [({}, 1), (dict(restarts=3), 3), (dict(targets=2), 2), (dict(targets=99, restarts=2), 8)],
)
def test_apgd_never_asks_for_more_gradients_than_it_says(kw, runs):
    net, x, y = make()
    with torch.no_grad():
        y = net(x).argmax(1)
    asked = []

    def counted(z):
        if z.requires_grad:
            asked.append(len(z))
        return net(z)

    climb(counted, x, y, 1e-4, 7, **kw)  # too small a radius to break anything
    assert sum(asked) == 7 * runs * len(x)
    asked.clear()
    z = climb(counted, x, y, 0.3, 7, **kw)
    assert wrong(net, z, y).any() and sum(asked) < 7 * runs * len(x)


def test_more_restarts_never_lose_a_sample():
    net, x, y = make(60)
    with torch.no_grad():
        y = net(x).argmax(1)
    found = [wrong(net, climb(net, x, y, 0.03, 5, restarts=r), y) for r in (1, 2, 4)]
    assert all((b >= a).all() for a, b in zip(found, found[1:]))


def test_dlr_where_logits_tie():
    z = torch.zeros(2, 5, requires_grad=True)
    y = torch.tensor([0, 1])
    for v in (dlr(z, y), dlr_targeted(z, y, 1 - y)):
        assert (v == 0).all() and torch.autograd.grad(v.sum(), z)[0].isfinite().all()


@pytest.mark.parametrize(
    "text, change",
    [
        ("apgd stops where the class is wrong", dict(y=torch.full((12, 5), 0.2))),
        ("steps must be at least 1", dict(steps=0)),
        ("restarts must be at least 1", dict(restarts=0)),
        ("targets must be at least 0", dict(targets=-1)),
        ("needs the default loss, got dlr", dict(targets=2, loss=dlr)),
        (r"rho must lie in \[0, 1\], got 1.5", dict(rho=1.5)),
        ("needs a generator", dict(generator=None)),
        ("did you mean 'l2'", dict(norm="L2")),
        ("8/255 for pixels, not 8", dict(eps=8)),
        ("one per sample as", dict(eps=torch.ones(12))),
        ("classes below 5", dict(y=torch.full((12,), 5))),
        ("one value per sample", dict(loss=nn.functional.cross_entropy)),
        (
            "at least 4 classes",
            dict(targets=2, y=torch.zeros(12).long(), model=lambda z: z.flatten(1)[:, :3]),
        ),
        (
            "at least 3 classes",
            dict(loss=dlr, y=torch.zeros(12).long(), model=lambda z: z.flatten(1)[:, :2]),
        ),
        (
            "no gradient",
            dict(
                model=lambda z: nn.functional.one_hot(torch.zeros(len(z)).long(), 5) * 1.0,
                y=torch.zeros(12).long(),
            ),
        ),
    ],
)
def test_apgd_refuses(text, change):
    net, x, y = make()
    args = {"model": net, "x": x, "y": y, "eps": 0.1, "generator": gen(), **change}
    with pytest.raises(ValueError, match=text):
        apgd(**args)


def test_dlr_refuses():
    z, soft = torch.randn(4, 5), torch.full((4, 5), 0.2)
    with pytest.raises(ValueError, match=r"dlr needs classes \(n,\) long"):
        dlr(z, soft)
    with pytest.raises(ValueError, match="dlr_targeted needs logits"):
        dlr_targeted(z[:, :3], torch.zeros(4).long(), torch.ones(4).long())


@pytest.mark.parametrize(
    "name", ["pgd-0", "pgd-20x0", "pgd-x", "PGD-20", "apgd_t", "", None, "pgd20"]
)
def test_unknown_attacks_are_refused(name):
    with pytest.raises(ValueError, match="attack must be one of .* did you mean"):
        attack_by_name(name)


@pytest.mark.parametrize(
    "name, limit",
    [("clean", 0), ("fgsm", 1), ("pgd", 20), ("pgd-3x4", 12), ("apgd", 100), ("apgd-t", 900)],
)
def test_named_attacks(name, limit):
    net, x, y = make(4)
    attack, asked = attack_by_name(name), []

    def counted(z):
        asked.append(len(z) * z.requires_grad)
        return net(z)

    z = attack(counted, x, y, 1e-5, generator=gen())
    assert attack.max_gradients == limit and sum(asked) <= 4 * limit and z.shape == x.shape
    assert attack_by_name(attack.name).strength == attack.strength
    for norm in NORMS:
        attack(net, x, y, torch.full((4, 1, 1, 1), 0.01), norm=norm, generator=gen())


@pytest.mark.parametrize(
    "text, change",
    [
        ("one number for AutoAttack", dict(eps=torch.full((12, 1, 1, 1), 0.1))),
        ("one per channel without a box, got shape", dict(eps=torch.full((3, 1, 1), 0.1))),
        ("got shape .* with box None", dict(eps=torch.full((12, 1, 1, 1), 0.1), box=None)),
        (
            "eps must be positive in every",
            dict(eps=torch.tensor([0.1, 0.0, 0.1]).view(3, 1, 1), box=None),
        ),
        (r"x must be \(n, c, h, w\) torch.float32", dict(x=torch.rand(12, 48))),
        (r"torch.float32 for AutoAttack, got .*float64", dict(x=torch.rand(12, 3, 4, 4).double())),
        (r"y must be \(n,\) long", dict(y=torch.full((12, 5), 0.2))),
        ("did you mean 'linf'", dict(norm="Linf")),
    ],
)
def test_autoattack_refuses(text, change):
    net, x, y = make()
    with pytest.raises(ValueError, match=text):
        autoattack(**{"model": net, "x": x, "y": y, "eps": 0.1, **change})


def digits_net():
    "A net after four epochs of digits, and 100 of them"
    from fairmix_nb.data import load
    from fairmix_nb.methods import TrainCfg
    from fairmix_nb.models import small_cnn
    from fairmix_nb.train import fit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = small_cnn(10, 1, 8)
    data = load("digits", progress=False)
    cfg = TrainCfg(eps=0.1, epochs=4, batch=64, lr=3e-3)
    fit(net, data, cfg, "at", device="cpu", watched=1, progress=False)
    idx = torch.arange(100)
    return net.eval(), data.test.floats(idx).contiguous(), data.test.y[idx]


def test_agrees_with_pyautoattack():
    package = pytest.importorskip("pyautoattack")
    net, x, y = digits_net()
    for name, kw in ("apgd-ce", {}), ("apgd-t", dict(targets=9)):
        judge = package.AutoAttack(net, eps=0.12, seed=0, version="custom", attacks=[name])
        judge.apgd.n_restarts = 1
        with torch.random.fork_rng(devices=[]):
            theirs = wrong(net, judge.run_standard_evaluation(x, y, batch_size=100)[0], y)
        ours = wrong(net, apgd(net, x, y, 0.12, generator=gen(), **kw), y)
        assert 20 < theirs.sum() < 80, theirs.sum()
        assert (theirs & ~ours).sum() <= 2 and (ours & ~theirs).sum() <= 2, name
    weak = wrong(net, fgsm(net, x, y, 0.12), y)
    assert (theirs & ~weak).sum() > 3  # the comparison would notice


def test_autoattack_through_the_door():
    pytest.importorskip("pyautoattack")
    import random

    net, x, y = digits_net()
    x, y, asked = x[:6], y[:6], []
    net.register_forward_pre_hook(lambda _, z: asked.append(len(z[0]) * z[0].requires_grad))
    torch_state, state = torch.get_rng_state(), random.getstate()
    grads = [p.grad for p in net.parameters()]
    z = attack_by_name("autoattack")(net, x, y, 0.12, generator=gen())
    assert sum(asked) <= 6 * attack_by_name("autoattack").max_gradients
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == state
    assert all(a is b for a, b in zip(grads, (p.grad for p in net.parameters())))
    assert all(p.requires_grad for p in net.parameters()) and (z - x).abs().max() < 0.12 + 1e-6
    ours = wrong(net, apgd(net, x, y, 0.12, targets=9, generator=gen()), y)
    assert (wrong(net, z, y) != ours).sum() <= 1 and ours.any()
    assert torch.equal(autoattack(net, x, y, 0.0), x)


def test_autoattack_in_other_units():
    """Where the range of the pixels never binds, normalised inputs without a box are the same
    question."""
    pytest.importorskip("pyautoattack")
    net, x, y = digits_net()
    x, y = 0.3 + 0.4 * x[:40], y[:40]
    mean, std, eps = 0.5, 0.2, 0.03
    pixels = wrong(net, autoattack(net, x, y, eps), y)

    def other(z):
        return net(z * std + mean)

    z = autoattack(other, (x - mean) / std, y, torch.full((1, 1, 1, 1), eps / std), box=None)
    units = wrong(other, z, y)
    assert 10 < pixels.sum() < 35 and (pixels != units).sum() <= 1, (pixels.sum(), units.sum())
    assert (z * std + mean - x).abs().max() < eps + 1e-6


@pytest.mark.cuda
@pytest.mark.parametrize("norm", NORMS)
def test_cuda(norm):
    net, x, y = (v.cuda() for v in make())
    z = pgd(net, x, y, 0.1, norm=norm, generator=torch.Generator("cuda").manual_seed(0))
    assert z.device == x.device and 0 <= z.min() and z.max() <= 1
    size = (z - x).flatten(1).norm(p=float("inf") if norm == "linf" else 2, dim=1)
    assert size.max() < 0.1 + 1e-6
    z = apgd(net, x, y, 0.1, norm=norm, targets=2, generator=torch.Generator("cuda").manual_seed(0))
    assert z.device == x.device and 0 <= z.min() and z.max() <= 1
    with pytest.raises(ValueError, match="generator must live on cuda"):
        pgd(net, x, y, 0.1, norm=norm, generator=gen())


def test_restarts_are_for_samples_that_still_stand():
    net, x, y = make(64)
    asked = []

    def counted(z):
        asked.append(len(z) * z.requires_grad)
        return net(z)

    def broken(z):
        return net(z).argmax(1) != y

    one = broken(attack_by_name("pgd-10")(net, x, y, 0.1, generator=gen()))
    all_starts = pgd(net, x, y, 0.1, 10, restarts=6, generator=gen())
    found = attack_by_name("pgd-10x6")(counted, x, y, 0.1, generator=gen())
    assert not (one & ~broken(found)).any() and 0 < one.sum() < 64
    assert broken(found).sum() >= broken(all_starts).sum() - 1
    assert sum(asked) <= 10 * (64 + 5 * (~one).sum())


def test_a_far_name_gets_no_hint_where_a_folder_would_do():
    from fairmix_nb.attacks import one_of

    for name, hint in (("digit", True), ("/no/such/folder", False)):
        with pytest.raises(ValueError) as e:
            one_of("data", name, ("digits", "cifar10"), "a folder")
        assert ("did you mean" in str(e.value)) == hint, e.value


def test_a_threat_is_the_radius_its_norm_and_its_range():
    from fairmix_nb.attacks import Threat

    net, x, y = make()
    for norm in NORMS:
        threat = Threat(0.1, norm)
        assert torch.equal(fgsm(net, x, y, threat), fgsm(net, x, y, 0.1, norm=norm))
        for attack in (run, climb):
            assert torch.equal(attack(net, x, y, threat), attack(net, x, y, 0.1, norm=norm))
            named = attack_by_name("pgd-3x2")
            z = named(net, x, y, threat, generator=gen())
            assert torch.equal(z, named(net, x, y, 0.1, norm=norm, generator=gen()))
    each = Threat((0.1, 0.0, 0.05))
    z = run(net, x, y, each)
    assert torch.equal(z, run(net, x, y, torch.tensor([0.1, 0.0, 0.05]).view(1, 3, 1, 1)))
    assert each.scaled(0.5).eps == (0.05, 0.0, 0.025)
    for _ in range(3):
        drawn = each.noise(x, gen(), times=2)
        assert drawn.min() >= 0 and drawn.max() <= 1 and (drawn - x)[:, 1].abs().max() == 0
        back = each.clip(x, drawn)
        assert ((back - x).abs().amax((0, 2, 3)) <= torch.tensor([0.1, 0.0, 0.05]) + 1e-6).all()


def test_a_radius_that_the_type_of_the_images_cannot_hold_is_refused():
    x, y = torch.rand(2, 1, 3, 3).half(), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="eps must be finite and lie in"):
        fgsm(lambda z: z.flatten(1).float()[:, :2], x, y, 1e30, box=None)

"What must hold for any input: shapes, ranges, symmetries, and an error instead of a NaN."

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from fairmix_nb import attacks, data, gaussian, mixup, risk, tempering, theory
from fairmix_nb.gaussian import GaussianPair

quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def real(low, high):
    return st.floats(low, high, allow_nan=False, width=64)


gs, radii, priors = real(1e-3, 1), real(0, 2), real(0, 1)
thresholds = st.one_of(real(-50, 50), st.sampled_from([-math.inf, math.inf]))
pairs = st.builds(
    GaussianPair,
    real(-3, 3),
    real(-3, 3),
    real(0.05, 20),
    real(0.05, 20),
    st.integers(1, 50),
    priors,
)
solvable = st.builds(
    lambda m, share, eps, *rest: (GaussianPair(share * m + eps, (1 - share) * m + eps, *rest), eps),
    real(0.05, 4),
    real(-0.5, 1.5),
    real(0, 1),
    real(0.05, 20),
    real(0.05, 20),
    st.integers(1, 50),
    priors,
)
numbers = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1.5])
seeds = st.integers(0, 2**32 - 1)
close = np.testing.assert_allclose


def mirrored(p):
    "The same problem with the names of the classes exchanged."
    return GaussianPair(p.mu_neg, p.mu_pos, p.sigma_neg, p.sigma_pos, p.d, 1 - p.prior)


def scaled(p, by):
    return replace(
        p,
        mu_pos=p.mu_pos * by,
        mu_neg=p.mu_neg * by,
        sigma_pos=p.sigma_pos * by,
        sigma_neg=p.sigma_neg * by,
    )


# --- gaussian, theory, tempering -----------------------------------------------------------


@quick
@given(pairs, thresholds, gs, radii)
def test_class_risks_are_shares_that_know_no_names_and_no_units(p, t, g, eps):
    r = gaussian.class_risk(t, p, g, eps)
    assert r.shape == (2,) and ((0 <= r) & (r <= 1)).all()
    close(r, gaussian.class_risk(-t, mirrored(p), g, eps)[::-1], rtol=1e-12)
    close(
        r, gaussian.class_risk(8 * t, scaled(p, 8.0), g, 8 * eps), rtol=1e-12
    )  # a power of two rounds nothing
    close(np.exp(gaussian.log_class_risk(t, p, g, eps)), r, rtol=1e-9, atol=1e-300)
    assert (gaussian.class_risk(t, p, g, eps + 0.1) >= r).all()
    assert min(r) <= gaussian.overall_risk(r, p.prior) * (1 + 1e-12) and gaussian.overall_risk(
        r, p.prior
    ) <= max(r) * (1 + 1e-12)
    assert gaussian.gap(r) == gaussian.gap(r[::-1]) <= 1


@quick
@given(pairs, real(-9, 9), gs, radii, seeds)
def test_linear_risk_permutes_scales_and_agrees_with_equal_weights(p, b, g, eps, seed):
    w = np.random.default_rng(seed).normal(size=p.d)
    r = gaussian.linear_risk(w, b, p, g, eps)
    close(r, gaussian.linear_risk(w[::-1], b, p, g, eps), rtol=1e-6, atol=1e-12)
    close(r, gaussian.linear_risk(4 * w, 4 * b, p, g, eps), rtol=1e-6, atol=1e-12)
    close(
        gaussian.linear_risk(np.full(p.d, 2.0), 2 * b, p, g, eps),
        gaussian.class_risk(b, p, g, eps),
        rtol=1e-6,
        atol=1e-12,
    )
    close(
        gaussian.linear_risk(-w, -b, p, g, 0.0) + gaussian.linear_risk(w, b, p, g, 0.0),
        1,
        rtol=1e-12,
    )


@quick
@given(pairs, real(-9, 9), gs, radii, st.integers(1, 400), seeds)
def test_counted_risks_are_shares_of_the_points(p, t, g, eps, n, seed):
    r, se = gaussian.mc_class_risk(t, p, n, np.random.default_rng(seed), g, eps)
    assert ((0 <= r) & (r <= 1)).all() and (se > 0).all()
    close(r * n, np.rint(r * n), atol=1e-9)
    x, y = p.sample(n, np.random.default_rng(seed), g)
    assert x.shape == (n, p.d) and y.shape == (n,) and set(y.tolist()) <= {1, -1}


@quick
@given(st.sampled_from(["mu_pos", "mu_neg", "sigma_pos", "sigma_neg", "d", "prior"]), numbers)
def test_an_impossible_field_is_refused(name, value):
    assume(name[:2] != "mu" or not math.isfinite(value))
    assume(name not in ("sigma_pos", "sigma_neg") or value != 1.5)
    with pytest.raises(ValueError, match=f"{name} must .*got"):
        GaussianPair(
            **dict(mu_pos=1.0, mu_neg=1.0, sigma_pos=1.0, sigma_neg=1.0, d=2, prior=0.5)
            | {name: value}
        )


@quick
@given(pairs, numbers)
def test_an_impossible_g_or_eps_is_refused_by_everything_that_takes_one(p, value):
    p = replace(p, mu_pos=2.0, mu_neg=2.0)
    for f in (
        lambda g, e: gaussian.class_risk(0.0, p, g, e),
        lambda g, e: gaussian.z_scores(0.0, p, g, e),
        lambda g, e: gaussian.log_class_risk(0.0, p, g, e),
        lambda g, e: theory.threshold(p, g, e),
        lambda g, e: theory.optimal_risk(p, g, e),
        lambda g, e: tempering.price(p, g, e),
        lambda g, e: gaussian.linear_risk(np.ones(p.d), 0.0, p, g, e),
    ):
        with pytest.raises(ValueError, match="must .*got"):
            f(value, 0.0)
        if value != 1.5:
            with pytest.raises(ValueError, match="must .*got"):
                f(1.0, value)
    with pytest.raises(ValueError, match="must .*got"):
        tempering.tempered_prior(p, value)


@quick
@given(solvable, gs, real(-30, 30))
def test_no_line_beats_the_threshold(problem, g, t):
    p, eps = problem
    assume(p.mu_pos + p.mu_neg - 2 * eps > 0)

    def risk_at(t):
        return gaussian.overall_risk(gaussian.class_risk(t, p, g, eps), p.prior)

    best = theory.threshold(p, g, eps)
    assert not np.isnan(best) and np.shape(best) == ()
    for other in (
        t,
        math.inf,
        -math.inf,
        *([best + 1e-3, best - 1e-3] if np.isfinite(best) else []),
    ):
        assert risk_at(best) <= risk_at(other) * (1 + 1e-9) + 1e-300
    swapped, grown = (
        theory.threshold(mirrored(p), g, eps),
        theory.threshold(scaled(p, 4.0), g, 4 * eps),
    )
    close(
        theory.optimal_risk(p, g, eps),
        theory.optimal_risk(scaled(p, 4.0), g, 4 * eps),
        rtol=1e-6,
        atol=1e-9,
    )
    if np.isfinite(best) and np.isfinite(swapped) and 1e-9 < p.prior < 1 - 1e-9:  # 1 - prior rounds
        close(
            [swapped, grown],
            [-best, 4 * best],
            rtol=1e-5,
            atol=1e-5 * (abs(best) + p.sigma_pos + p.sigma_neg),
        )


units = st.integers(-150, 150).map(lambda k: 10.0**k)


@quick
@given(solvable, gs, real(-9, 9), units)
def test_no_unit_of_length_changes_an_answer(problem, g, t, unit):
    p, eps = problem
    assume(p.mu_pos + p.mu_neg - 2 * eps > 1e-6)
    q, e = scaled(p, unit), unit * eps
    close(
        gaussian.class_risk(t, p, g, eps),
        gaussian.class_risk(unit * t, q, g, e),
        rtol=1e-9,
        atol=1e-290,
    )
    w = np.linspace(-1, 2, p.d) + 0.1
    close(
        gaussian.linear_risk(w, t, p, g, eps),
        gaussian.linear_risk(w, unit * t, q, g, e),
        rtol=1e-9,
        atol=1e-290,
    )
    best, moved = theory.threshold(p, g, eps), theory.threshold(q, g, e)
    if np.isfinite(best) and np.isfinite(moved):
        size = abs(best) + min(p.sigma_pos, p.sigma_neg)
        close(moved / unit, best, rtol=1e-10, atol=1e-10 * size)
    small, _, k = gaussian.rescale(q, e)
    assert small == gaussian.rescale(small)[0] or abs(gaussian.rescale(small)[2]) <= 1
    close(np.ldexp(small.sigma_pos, k), q.sigma_pos, rtol=0)


@quick
@given(solvable, gs, st.integers(3, 12), st.sampled_from([-1, 1]))
def test_optimal_risks_do_not_know_where_the_origin_is(problem, g, k, side):
    p, eps = problem
    off = side * 2.0 ** round(k * np.log2(10))  # the same two clouds, far from the origin
    far = replace(p, mu_pos=p.mu_pos + off, mu_neg=p.mu_neg - off)
    near = replace(p, mu_pos=far.mu_pos - off, mu_neg=far.mu_neg + off)  # rounded alike, exactly
    assume(near.mu_pos + near.mu_neg - 2 * eps > 0.01)
    for test in ((None, None), (1.0, 0.0)):
        close(
            theory.optimal_risk(far, g, eps, *test),
            theory.optimal_risk(near, g, eps, *test),
            rtol=1e-9,
            atol=1e-290,
        )


@quick
@given(pairs, st.sampled_from([0.0, 1.0]), gs)
def test_at_prior_0_or_1_the_line_names_the_only_class(p, prior, g):
    p = replace(p, mu_pos=abs(p.mu_pos) + 0.1, mu_neg=abs(p.mu_neg), prior=prior)
    assert theory.threshold(p, g) == (np.inf if prior else -np.inf)
    assert theory.optimal_risk(p, g).tolist() == ([0.0, 1.0] if prior else [1.0, 0.0])


@quick
@given(seeds, st.integers(1, 12), st.sampled_from(["linf", "l2"]), real(0, 0.49))
def test_no_direction_beats_the_robust_one(seed, d, norm, share):
    rng = np.random.default_rng(seed)
    A, delta, other = rng.normal(size=(d, d + 1)), rng.normal(size=d), rng.normal(size=(200, d))
    cov = A @ A.T / d
    eps = share * np.linalg.norm(delta, np.inf if norm == "linf" else 2)
    w, D = gaussian.robust_direction(delta, cov, eps, norm)

    def reach(w):
        charge = 2 * eps * np.linalg.norm(w, 1 if norm == "linf" else 2, axis=-1)
        return (w @ delta - charge) / np.sqrt(((w @ cov) * w).sum(-1))

    assert D > 0 and (reach(other) <= D * (1 + 1e-9)).all()
    close([reach(w), w @ cov @ w], [D, 1], rtol=1e-8)
    near = w + 1e-3 * np.abs(w).max() * other
    assert (reach(near) <= D * (1 + 1e-9)).all()
    turn = (
        np.linalg.qr(rng.normal(size=(d, d)))[0]
        if norm == "l2"
        else np.diag(rng.choice([-1, 1], d))
    )
    turned = gaussian.robust_direction(turn @ delta, turn @ cov @ turn.T, eps, norm)
    close(turned[1], D, rtol=1e-8)
    if share == 0:
        close(w * D, np.linalg.solve(cov, delta), rtol=1e-6, atol=1e-9)


@quick
@given(solvable, real(-3, 3), gs)
def test_definition_1_is_a_pair_from_moments(problem, t, g):
    p, eps = problem
    assume(p.mu_pos + p.mu_neg - 2 * eps > 0.01)
    one, s = np.ones(p.d), (p.sigma_pos, p.sigma_neg)
    cov, root = np.eye(p.d), np.sqrt(p.d)
    q = GaussianPair.from_moments(p.mu_pos * one, -p.mu_neg * one, cov, p.prior, eps, sigma=s)
    close(
        gaussian.class_risk(t / root, q, g),
        gaussian.class_risk(t, p, g, eps),
        rtol=1e-6,
        atol=1e-12,
    )
    line = GaussianPair.from_moments(p.mu_pos * one, -p.mu_neg * one, cov, p.prior, sigma=s, w=one)
    close(
        gaussian.class_risk(t / root, line, g), gaussian.class_risk(t, p, g), rtol=1e-6, atol=1e-12
    )


@quick
@given(st.lists(real(0, 1), min_size=2, max_size=9), real(-9e-6, 9e-6))
def test_no_weights_make_a_variance_factor_above_one(weights, off):
    assume(sum(weights) > 0)
    w = np.array(weights) / sum(weights) * (1 + off)
    for kind in (np.asarray, torch.tensor):
        g = mixup.variance_factor(weights=kind(w))
        assert 1 / len(weights) - 1e-12 <= float(g) <= 1
    g32 = mixup.variance_factor(weights=torch.tensor(w, dtype=torch.float32))
    assert 1 / len(weights) - 1e-5 <= float(g32) <= 1


@quick
@given(solvable, gs, real(0, 1))
def test_tempering_moves_from_optimal_to_fair(problem, g, h):
    p, eps = problem
    assume(p.mu_pos + p.mu_neg - 2 * eps > 0)
    low, high = sorted((g, h))
    a = tempering.tempered_prior(p, g)
    assert 0 <= a <= 1
    close(tempering.tempered_prior(p, 1.0), p.prior, rtol=1e-9, atol=1e-15)
    t, r = tempering.fairness_path(p, [low, high, 1.0, 0.0], eps)
    assert (
        t.shape == (4,)
        and r.shape == (4, 2)
        and not np.isnan(t).any()
        and ((0 <= r) & (r <= 1)).all()
    )
    assert t[2] == theory.threshold(p, 1.0, eps)
    if np.isfinite(t[2]):
        gaps = gaussian.gap(r)
        assert gaps[0] <= gaps[1] + 1e-9 and gaps[1] <= gaps[2] + 1e-9 and gaps[3] < 1e-9
        assert 0 <= tempering.price(p, high, eps) <= tempering.price(p, low, eps) + 1e-12


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(solvable, real(0, 1))
def test_a_fixed_law_is_its_number(problem, lam):
    p, eps = problem
    assume(p.mu_pos + p.mu_neg - 2 * eps > 0)
    assert tempering.law_threshold(p, lam, eps) == theory.threshold(
        p, mixup.variance_factor(lam), eps
    )
    t, plain = tempering.law_threshold(p, "uniform", eps), theory.threshold(p, 1.0, eps)
    assert not np.isnan(t)
    if np.isfinite(t) and np.isfinite(plain):

        def at(t):
            return gaussian.gap(gaussian.class_risk(t, p, eps=eps))

        assert at(t) <= at(plain) + 1e-9


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(solvable, st.floats(0.01, 20), st.integers(-400, 400))
def test_a_random_law_knows_no_units_and_lies_on_the_path(problem, a, exponent):
    p, eps = problem
    assume(p.mu_pos + p.mu_neg - 2 * eps > 0.01)
    law, by = stats.beta(a, a), 2.0**exponent
    t = tempering.law_threshold(p, law, eps)
    close(tempering.law_threshold(scaled(p, by), law, by * eps), by * t, rtol=1e-9)
    if np.isfinite(t):
        u, L = gaussian.z_scores(t, p, 1.0, eps), theory.log_odds(p)
        low, high = sorted((L, 2 * L))
        assert low - 1e-6 <= np.subtract(*u**2) <= high + 1e-6 * max(1, *(u**2))


@quick
@given(solvable, gs, st.floats(0.1, 10))
def test_more_certainty_and_less_mixing_take_more_points(problem, g, errors):
    p, eps = problem
    assume(p.mu_pos + p.mu_neg - 2 * eps > 0.01)
    n = tempering.points_needed(p, g, eps, errors)
    assert n >= 1 and n <= tempering.points_needed(p, g, eps, 2 * errors)
    assert n <= tempering.points_needed(p, (1 + g) / 2, eps, errors)
    assert n == tempering.points_needed(scaled(p, 8.0), g, 8 * eps, errors)


@quick
@given(st.lists(st.floats(1e-3, 1), min_size=2, max_size=6), gs)
def test_tempered_priors_are_shares_and_balanced_ones_stay(priors, g):
    a = tempering.tempered_priors(priors, g)
    close(a.sum(), 1)
    assert (np.diff(a[np.argsort(priors, kind="stable")]) >= -1e-15).all()  # up to rounding
    close(tempering.tempered_priors([0.3] * len(priors), g), 1 / len(priors))


# --- mixup ---------------------------------------------------------------------------------

labels = st.lists(st.integers(0, 3), min_size=1, max_size=30).map(torch.tensor)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@quick
@given(st.one_of(real(0, 1), st.lists(real(0, 1), min_size=1, max_size=5).map(np.array)))
def test_variance_factor_is_even_about_one_half(lam):
    g = mixup.variance_factor(lam)
    assert np.shape(g) == np.shape(lam) and np.all((g >= 0.5 - 1e-15) & (g <= 1))
    close(g, mixup.variance_factor(1 - lam), atol=1e-15)


@quick
@given(st.sampled_from([0.0, 0.3, 1.0, "uniform"]), st.integers(0, 20), st.integers(2, 5), seeds)
def test_weights_are_convex_and_follow_the_generator(law, n, k, seed):
    lam, w = (
        mixup.sample_lam(law, (n,), generator(seed)),
        mixup.sample_weights(law, n, k, generator(seed)),
    )
    assert lam.shape == (n,) and ((0 <= lam) & (lam <= 1)).all()
    assert w.shape == (n, k) and (w >= 0).all()
    torch.testing.assert_close(w.sum(1), torch.ones(n))
    assert torch.equal(w, mixup.sample_weights(law, n, k, generator(seed)))


@quick
@given(labels, st.integers(2, 4), seeds)
def test_partners_are_of_the_class_and_somebody_else(y, k, seed):
    partners, counts = (
        mixup.same_class_partners(y, 4, k, generator(seed)),
        torch.bincount(y, minlength=4),
    )
    assert partners.shape == (k - 1, len(y)) and torch.equal(y[partners], y.expand(k - 1, -1))
    others = counts[y] > 1
    assert (partners[:, others] != torch.arange(len(y))[others]).all()
    for i in torch.nonzero(counts[y] >= k)[:, 0]:
        assert len(set(partners[:, i].tolist())) == k - 1
    assert sorted(partners[0].tolist()) == list(range(len(y)))  # everybody is a partner once
    if (counts[counts > 0] >= k).all():
        table = mixup.ClassTable(y, 4)
        found = table.partners(torch.arange(len(y)), k, generator(seed))
        assert torch.equal(y[found], y.expand(k - 1, -1)) and (found != torch.arange(len(y))).all()
    anybody = mixup.any_partner(len(y), generator(seed))
    assert sorted(anybody.tolist()) == list(range(len(y))) and (
        len(y) == 1 or (anybody != torch.arange(len(y))).all()
    )


@quick
@given(labels, seeds, st.integers(2, 3))
def test_mixtures_stay_in_the_hull_and_permute_with_the_batch(y, seed, k):
    x = torch.rand(len(y), 3, generator=generator(seed), dtype=torch.float64)
    w = mixup.sample_weights("uniform", len(y), k, generator(seed)).double()
    w = w / w.sum(1, keepdim=True)
    others = [x[p] for p in mixup.same_class_partners(y, 4, k, generator(seed))]
    z, turn = mixup.mix(x, others, w), torch.randperm(len(y), generator=generator(seed))
    torch.testing.assert_close(
        mixup.mix(x[turn], [o[turn] for o in others], w[turn]), z[turn], rtol=0, atol=0
    )
    hull = torch.stack([x, *others])
    assert (z <= hull.amax(0) + 1e-15).all() and (z >= hull.amin(0) - 1e-15).all()
    torch.testing.assert_close(z, sum(w[:, i, None] * v for i, v in enumerate(hull)))
    torch.testing.assert_close(
        mixup.same_class_mixup(x, y, 1.0, 4, generator(seed)), x, rtol=0, atol=0
    )


@quick
@given(numbers, seeds)
def test_impossible_weights_are_refused(value, seed):
    y, x = torch.tensor([0, 0, 1, 1]), torch.rand(4, 2)
    for f in (
        lambda: mixup.variance_factor(value),
        lambda: mixup.sample_lam(value, (3,), generator(seed)),
        lambda: mixup.same_class_mixup(x, y, value, 2, generator(seed)),
        lambda: mixup.same_class_mixup(x, y, torch.full((4,), value), 2, generator(seed)),
        lambda: mixup.sample_weights(value, 4, 2, generator(seed)),
        lambda: mixup.SameClassMixup(2, value),
        lambda: mixup.variance_factor(weights=np.array([value, 1.0])),
    ):
        with pytest.raises(ValueError, match="must .*got"):
            f()


# --- attacks -------------------------------------------------------------------------------


def network(seed, n_cls=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, n_cls)
        ).double()


def images(seed, n=5):
    g = generator(seed)
    return torch.rand(n, 3, 2, 2, generator=g, dtype=torch.float64), torch.randint(
        3, (n,), generator=g
    )


ways = [
    lambda m, x, y, e, **k: attacks.fgsm(m, x, y, e, **k),
    lambda m, x, y, e, **k: attacks.pgd(m, x, y, e, 3, random_start=False, **k),
]


@quick
@given(seeds, real(0, 1), st.sampled_from(ways), st.sampled_from(["linf", "l2"]))
def test_attacks_stay_in_ball_and_box_and_permute_with_the_batch(seed, eps, attack, norm):
    model, (x, y) = network(seed % 7), images(seed)
    z, turn = attack(model, x, y, eps, norm=norm), torch.randperm(len(x), generator=generator(seed))
    assert (
        z.shape == x.shape
        and z.dtype == x.dtype
        and not z.requires_grad
        and 0 <= z.min()
        and z.max() <= 1
    )
    size = (z - x).abs().amax((1, 2, 3)) if norm == "linf" else (z - x).flatten(1).norm(dim=1)
    assert (size <= eps + 1e-9).all()
    torch.testing.assert_close(
        attack(model, x[turn], y[turn], eps, norm=norm), z[turn], rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(attack(model, x, y, 0.0, norm=norm), x, rtol=0, atol=0)
    whole = attack(model, x, y, torch.full((len(x), 1, 1, 1), eps, dtype=x.dtype), norm=norm)
    torch.testing.assert_close(whole, z, rtol=1e-9, atol=1e-9)


@quick
@given(seeds, real(0, 0.5), st.integers(1, 3))
def test_more_starts_are_never_worse_and_never_better_than_clean(seed, eps, restarts):
    model, (x, y) = network(seed % 7), images(seed)

    def loss(z):
        return attacks.cross_entropy(model(z), y)

    def run(r):
        return loss(attacks.pgd(model, x, y, eps, 2, restarts=r, generator=generator(seed)))

    with torch.no_grad():
        assert (run(restarts) >= loss(x)).all() and (
            run(restarts + 1) >= run(restarts) - 1e-12
        ).all()


@quick
@given(numbers, st.sampled_from(ways), st.sampled_from(["linf", "l2"]))
def test_an_impossible_radius_or_pixel_is_refused(value, attack, norm):
    model, (x, y) = network(0), images(0)
    if norm == "linf" or value != 1.5:
        with pytest.raises(ValueError, match="eps must .*got"):
            attack(model, x, y, value, norm=norm)
    bad = x.clone()
    bad[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match="x must .*got"):
        attack(model, bad, y, 0.1, norm=norm)


@quick
@given(st.lists(real(0.01, 5), min_size=1, max_size=4).map(tuple), real(0, 1))
def test_units_go_there_and_back(std, eps):
    there = attacks.in_pixels(eps, std)
    assert there.shape == (1, len(std), 1, 1)
    torch.testing.assert_close(attacks.in_normalised(there, std), torch.full_like(there, eps))


# --- risk ----------------------------------------------------------------------------------

flags = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.booleans(), min_size=n, max_size=n).map(np.array),
        st.lists(st.integers(0, 3), min_size=n, max_size=n).map(np.array),
    )
)
risks = st.lists(real(0, 1), min_size=1, max_size=8).map(np.array)


@quick
@given(flags, seeds)
def test_class_risks_do_not_depend_on_the_order_of_the_images(case, seed):
    wrong, y = case
    turn, names = (
        np.random.default_rng(seed).permutation(len(y)),
        np.random.default_rng(seed).permutation(4),
    )
    r = risk.classwise_risk(wrong, y, 4)
    np.testing.assert_array_equal(r, risk.classwise_risk(wrong[turn], y[turn], 4))
    np.testing.assert_array_equal(r, risk.classwise_risk(wrong, names[y], 4)[names])
    k, n = risk.class_counts(wrong, y, 4)
    assert (
        k.sum() == wrong.sum() and n.sum() == len(y) and np.isnan(r).tolist() == (n == 0).tolist()
    )
    low, high = risk.worst_interval(k, n)
    assert 0 <= low <= np.nanmax(r) <= high <= 1
    np.testing.assert_array_equal(risk.unpack_flags(risk.pack_flags(wrong), len(wrong)), wrong)
    assert risk.bootstrap_risks(wrong, y, 4, 3, np.random.default_rng(seed)).shape == (3, 1, 4)


@quick
@given(risks, st.integers(1, 8), seeds)
def test_summaries_do_not_depend_on_the_order_of_the_classes(r, k, seed):
    turned = np.random.default_rng(seed).permutation(r)
    s = risk.summary(r)
    assert (
        0 <= s["min"] <= s["avg"] + 1e-15
        and s["avg"] <= s["max"] + 1e-15
        and s["max"] <= 1
        and 0 <= s["std"] <= 0.5 + 1e-12
    )
    for f in (
        risk.worst_class,
        risk.risk_range,
        risk.gini,
        risk.nsd,
        lambda r: risk.cvar(r, min(k, len(r))),
    ):
        close(f(r), f(turned), rtol=1e-9, atol=1e-12)
    assert 0 <= risk.gini(r) + 1e-12 and risk.gini(r) < 1 and risk.worst_class(r) == s["max"]
    close(risk.gini(r / 2), risk.gini(r), atol=1e-9)
    tails = [risk.cvar(r, j) for j in range(1, len(r) + 1)]
    assert (
        all(a >= b - 1e-12 for a, b in zip(tails, tails[1:]))
        and tails[0] == s["max"]
        and math.isclose(tails[-1], s["avg"], abs_tol=1e-12)
    )
    if r.max() < 1:
        close(risk.rho(r, r), 0, atol=1e-12)


@quick
@given(st.integers(0, 60), st.integers(0, 60), real(0.01, 0.99))
def test_exact_intervals_hold_the_estimate_and_widen_with_confidence(k, n, level):
    k = min(k, n)
    low, high = risk.exact_interval(k, n, level)
    assert 0 <= low <= high <= 1 and (n == 0 or low <= k / n <= high)
    close(risk.exact_interval(n - k, n, level), (1 - high, 1 - low), atol=1e-9)
    wider = risk.exact_interval(k, n, (1 + level) / 2)
    assert wider[0] <= low + 1e-12 and high <= wider[1] + 1e-12


@quick
@given(flags, seeds)
def test_differences_change_sign_with_the_order_of_the_methods(case, seed):
    a, y = case
    b = np.random.default_rng(seed).permutation(a)
    there, back = risk.worst_difference(a, b, y, 4), risk.worst_difference(b, a, y, 4)
    assert there.lo <= there.diff <= there.hi and -1 <= there.lo and there.hi <= 1
    close(there, (-back.diff, -back.hi, -back.lo), atol=1e-12)
    assert 0 <= risk.mcnemar(a, b) == risk.mcnemar(b, a) <= 1 and risk.mcnemar(a, a) == 1
    boot = risk.paired_bootstrap(a, a, y, 4, n_boot=5, rng=np.random.default_rng(seed))
    assert boot == (0, 0, 0)
    stronger = risk.worst_case([a, b, a & b])
    assert (stronger[1:] >= stronger[:-1]).all() and (stronger[-1] == (a | b)).all()


@quick
@given(numbers.filter(lambda v: v != 1.5))
def test_impossible_risks_are_refused(value):
    for f in (
        risk.summary,
        risk.worst_class,
        risk.gini,
        risk.nsd,
        risk.risk_range,
        lambda r: risk.cvar(r, 1),
        lambda r: risk.rho(r, r),
    ):
        with pytest.raises(ValueError, match="must .*got"):
            f([value])
    for f in (
        lambda: risk.exact_interval(value, 10),
        lambda: risk.exact_interval(1, value),
        lambda: risk.exact_interval(1, 10, value),
        lambda: risk.worst_interval([value], [10]),
        lambda: risk.worst_interval([1], [10], value),
        lambda: risk.images_needed(value),
        lambda: risk.images_needed(0.1, value),
        lambda: risk.classwise_risk([value], [0], 1),
    ):
        with pytest.raises(ValueError, match="must .*got"):
            f()


# --- data ----------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(6, 20), min_size=1, max_size=4), st.integers(0, 8), st.booleans())
def test_the_split_is_disjoint_complete_and_stratified(counts, seed, thirds):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    part = data.split_index(y, seed, thirds=thirds)
    everything = np.concatenate(list(part.values()))
    assert sorted(everything) == list(range(len(y)))
    for name, index in part.items():
        n = np.bincount(y[index], minlength=len(counts))
        assert (n > 0).all() if thirds or name != "test" else not n.any()
    if thirds:
        np.testing.assert_allclose(np.bincount(y[part["test"]]) - np.array(counts) / 3, 0, atol=1)
    rank = data.rank_in_class(y, np.random.RandomState(seed))
    assert all(sorted(rank[y == c]) == list(range(n)) for c, n in enumerate(counts))


@quick
@given(st.integers(0, 40), st.integers(1, 12), st.booleans(), seeds)
def test_batches_cut_one_permutation(n, size, drop_last, seed):
    parts = data.batches(n, size, generator(seed), drop_last=drop_last)
    seen = torch.cat(list(parts)).tolist() if len(parts) else []
    assert len(set(seen)) == len(seen) == (n // size * size if drop_last else n)
    assert all(len(p) == size for p in parts[:-1])


@quick
@given(
    seeds,
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(2, 6),
    st.sampled_from([torch.uint8, torch.float32]),
)
def test_augmentation_keeps_shape_type_and_values(seed, n, c, side, dtype):
    x = torch.randint(256, (n, c, side, side + 1), generator=generator(seed)).to(dtype)
    for how in data.AUGMENT:
        z = data.augment(x, how, generator(seed))
        assert (
            z.shape == x.shape
            and z.dtype == dtype
            and torch.equal(z, data.augment(x, how, generator(seed)))
        )
        for a, b in zip(x.flatten(0, 1), z.flatten(0, 1)):
            assert set(b.flatten().tolist()) <= set(a.flatten().tolist())
    assert torch.equal(data.random_crop(x, 0, generator(seed)), x)
    both = torch.stack([data.random_flip(x, generator(seed)), x, x.flip(3)])
    assert ((both[0] == both[1]).flatten(1).all(1) | (both[0] == both[2]).flatten(1).all(1)).all()


@quick
@given(seeds, st.integers(0, 2))
def test_a_digest_changes_with_anything(seed, what):
    g = generator(seed)
    x, y = torch.randint(256, (4, 1, 2, 2), generator=g).to(torch.uint8), torch.tensor([0, 1, 0, 1])
    images = data.ImageSet(x, y, ("a", "b"))
    changed = [
        replace(images, x=x ^ 1),
        replace(images, y=1 - y),
        replace(images, classes=("a", "c")),
    ][what]
    assert (
        images.digest() != changed.digest()
        and images.digest() == replace(images, x=x.clone()).digest()
    )
    assert (
        images.floats().min() >= 0
        and images.floats().max() <= 1
        and images.subset(slice(1, 3)).counts() == [1, 1]
    )

"What the attacks promise and the lesson does not stop to show"
import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from fairmix_nb.attacks import NORMS, fgsm, in_pixels, pgd


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def make(n=12, shape=(3, 4, 4), dtype=torch.float32):
    "A small net with BatchNorm in eval mode, images and labels"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(shape[0], 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(),
                            nn.Flatten(), nn.Linear(8 * shape[1] * shape[2], 5))
    g = gen()
    x, y = torch.rand(n, *shape, generator=g), torch.randint(0, 5, (n,), generator=g)
    return net.eval().to(dtype), x.to(dtype), y


def run(net, x, y, eps=.1, **kw):
    return pgd(net, x, y, eps, **{'generator': gen(), **kw})


def nearest(d, eps):
    "The nearest point of the l2 ball, by a general-purpose optimiser"
    ball = {'type': 'ineq', 'fun': lambda p: eps**2 - p @ p, 'jac': lambda p: -2 * p}
    return optimize.minimize(lambda p: ((p - d)**2).sum(), d * .1, jac=lambda p: 2 * (p - d),
                             constraints=ball, method='SLSQP', options={'ftol': 1e-14}).x


def test_projections():
    d = torch.randn(8, 5, generator=gen(), dtype=torch.float64)
    found = np.stack([nearest(row.numpy(), 1.5) for row in d])
    np.testing.assert_allclose(NORMS['l2'][1](d, 1.5), found, atol=1e-5)
    np.testing.assert_array_equal(NORMS['linf'][1](d, .4), np.clip(d.numpy(), -.4, .4))
    assert abs(d.numpy() * 1.5 / np.linalg.norm(d) - found).max() > .1   # the batch's length


def test_starts_are_uniform():
    many, g = torch.zeros(4000, 5, dtype=torch.float64), gen()
    inf, l2 = NORMS['linf'][2](many, .3, g), NORMS['l2'][2](many, .3, g)
    radius = l2.norm(dim=1) / .3
    assert stats.kstest(inf.flatten() / .6 + .5, 'uniform').pvalue > 1e-3
    assert stats.kstest(radius**5, 'uniform').pvalue > 1e-3
    assert stats.kstest(radius, 'uniform').pvalue < 1e-6   # forgets the volume
    assert stats.kstest((l2[:, 0] / l2.norm(dim=1) + 1) / 2, stats.beta(2, 2).cdf).pvalue > 1e-3


def test_l2_direction_of_tiny_gradients():
    g = torch.randn(4, 3, 2, 2, generator=gen())
    direction = NORMS['l2'][0]
    torch.testing.assert_close(direction(g * 1e-25), direction(g))
    assert (direction(torch.zeros_like(g)) == 0).all()


def test_pixels_and_normalised_inputs_agree():
    net, x, y = make()
    std = (.2023, .1994, .2010)
    sd = torch.tensor(std).view(1, 3, 1, 1)
    inside = fgsm(lambda x: net((x - .5) / sd), x, y, in_pixels(.3, std), box=None)
    outside = fgsm(net, (x - .5) / sd, y, .3, box=None)
    torch.testing.assert_close((inside - .5) / sd, outside)
    with pytest.raises(ValueError, match='one positive number per channel'):
        in_pixels(.3, (.2, 0, .2))


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('keep', ['best', 'last'])
def test_small_promises(norm, keep):
    net, x, y = make()
    kept, state = x.clone(), torch.get_rng_state()
    z = run(net, x, y, norm=norm, keep=keep)
    assert torch.equal(x, kept) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(z, run(net, x, y, norm=norm, keep=keep, check=False))
    assert torch.equal(run(net, x, y, 0., norm=norm, keep=keep), x)
    net.requires_grad_(False)
    assert torch.equal(z, run(net, x, y, norm=norm, keep=keep)) and not z.requires_grad
    each = torch.full((len(x), 1, 1, 1), .1)
    torch.testing.assert_close(z, run(net, x, y, each, norm=norm, keep=keep))
    last = run(net, x.to(memory_format=torch.channels_last), y, norm=norm, keep=keep)
    torch.testing.assert_close(last, z, atol=1e-4, rtol=0)   # the start ignores the memory layout
    wide, x, y = make(dtype=torch.float64)
    assert run(wide, x, y, norm=norm, keep=keep).dtype == torch.float64


def test_a_channel_of_radius_zero_stays():
    net, x, y = make()
    z = run(net, x, y, torch.tensor([.1, 0, .05]).view(1, 3, 1, 1))
    moved = (z - x).abs().amax((0, 2, 3))
    assert moved[1] == 0 and .09 < moved[0] < .1 + 1e-6 and .04 < moved[2] < .05 + 1e-6


@pytest.mark.parametrize('text, change', [
    ('finite and lie in', dict(eps=-.1)),
    ('finite and lie in', dict(eps=float('inf'), box=None)),
    ('finite and lie in', dict(eps=torch.full((12, 1, 1, 1), float('nan')))),
    ('broadcast to x', dict(eps=torch.ones(7, 1, 1, 1))),
    ('the only tensor for l2', dict(eps=torch.full((1, 3, 1, 1), .1), norm='l2')),
    ('must be floating point', dict(x=torch.zeros(12, 3, 4, 4, dtype=torch.uint8))),
    ('must lie in the box', dict(x=torch.full((12, 3, 4, 4), float('nan')))),
    ('min -0.5, max -0.5', dict(x=torch.full((12, 3, 4, 4), -.5))),
    ('n >= 1', dict(x=torch.zeros(0, 3, 4, 4), y=torch.zeros(0).long())),
    ('one label per sample', dict(y=torch.zeros(5).long())),
    ('classes from 0 upwards', dict(y=torch.full((12,), -100))),
    ('classes below 5', dict(y=torch.full((12,), 5))),
    ('classes below 5', dict(y=torch.full((12, 6), 1 / 6))),
    ('long or', dict(y=torch.zeros(12, dtype=torch.int32))),
    ('low < high', dict(box=(1., 0.))),
    ("did you mean 'l2'", dict(norm='L2')),
    ("did you mean 'last'", dict(keep='latest')),
    ('steps must be at least 1', dict(steps=0)),
    ('restarts must be at least 1', dict(restarts=0)),
    ('restarts > 1 needs', dict(restarts=2, random_start=False)),
    ('step_size must be positive', dict(step_size=0.)),
    ('needs a generator', dict(generator=None)),
    ('one value per sample', dict(loss=nn.functional.cross_entropy)),
    ('no gradient', dict(model=lambda x: torch.zeros(12, 5, requires_grad=True))),
])
def test_refused(text, change):
    net, x, y = make()
    args = {'model': net, 'x': x, 'y': y, 'eps': .1, 'generator': gen(), **change}
    with pytest.raises(ValueError, match=text):
        pgd(**args)


@pytest.mark.cuda
@pytest.mark.parametrize('norm', NORMS)
def test_cuda(norm):
    net, x, y = (v.cuda() for v in make())
    z = pgd(net, x, y, .1, norm=norm, generator=torch.Generator('cuda').manual_seed(0))
    assert z.device == x.device and 0 <= z.min() and z.max() <= 1
    size = (z - x).flatten(1).norm(p=float('inf') if norm == 'linf' else 2, dim=1)
    assert size.max() < .1 + 1e-6
    with pytest.raises(ValueError, match='generator must live on cuda'):
        pgd(net, x, y, .1, norm=norm, generator=gen())

"What the notebook `02_mixup` leaves out: cost in counted operations, workers, many batches, a GPU."

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset, default_collate

from fairmix_nb.mixup import (
    ClassTable,
    SameClassMixup,
    mix,
    same_class_partner,
    same_class_partners,
    sample_weights,
)


def gen(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


class Count(TorchDispatchMode):
    "Counts torch operations and the numbers they return."

    ops = numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        self.numbers += sum(
            o.numel()
            for o in (out if isinstance(out, tuple) else (out,))
            if isinstance(o, torch.Tensor)
        )
        return out


def work(f, *args):
    with Count() as count:
        f(*args, gen())
    return count.ops, count.numbers


def labels(n, n_cls=10):
    return torch.arange(n) % n_cls


def test_table_costs_o_b_whatever_the_set():
    small, large = ClassTable(labels(1_000), 10), ClassTable(labels(100_000), 10)
    idx = torch.arange(128)
    assert work(small.partner, idx) == work(large.partner, idx)
    ops, numbers = work(small.partner, idx)
    assert work(small.partner, torch.arange(256)) == (ops, 2 * numbers)


def test_batch_partners_cost_no_loop():
    (ops, one), (ops2, two) = (work(same_class_partner, labels(b), 10) for b in (1000, 2000))
    assert ops == ops2 and two <= 2 * one
    assert work(same_class_partner, labels(128, 100), 100)[0] == ops

    def per_class(y, n_cls, g):  # power: the usual loop over classes is found out
        return [torch.randperm(int((y == c).sum()), generator=g) for c in range(n_cls)]

    assert work(per_class, labels(128, 100), 100)[0] > 5 * work(per_class, labels(128), 10)[0]


def test_partner_is_uniform_over_many_batches():
    y, g = torch.tensor([1, 4, 0, 1, 4, 1, 1, 2, 4, 1]), gen(1)
    table, idx = ClassTable(y[(y == 1) | (y == 4)], 5), torch.arange(8)
    for draw, own in (
        (lambda: same_class_partner(y, 5, g), y),
        (lambda: table.partner(idx, g), table.y),
    ):
        counts = np.zeros((len(own), len(own)))
        for _ in range(3000):
            counts[np.arange(len(own)), draw().numpy()] += 1
        for i, c in enumerate(own):
            others = [j for j in range(len(own)) if own[j] == c and j != i] or [i]
            assert counts[i].sum() == counts[i, others].sum()
            assert len(others) == 1 or stats.chisquare(counts[i, others]).pvalue > 1e-5


@pytest.mark.parametrize("workers", [0, 2])
def test_transform_in_workers(workers):
    x, y = torch.rand(64, 2, generator=gen()), labels(64, 2)

    def epochs(generator=None):
        mixup = SameClassMixup(2, generator=generator)
        loader = DataLoader(
            TensorDataset(x, y),
            32,
            num_workers=workers,
            generator=gen(5),
            collate_fn=lambda b: mixup(*default_collate(b)),
        )
        if not workers:  # with workers, the loader's generator is enough
            torch.manual_seed(1)
        return [torch.cat([b[0] for b in loader]) for _ in range(2)]

    first, again = epochs(), epochs()
    assert not torch.equal(*first)
    assert all(map(torch.equal, first, again))
    if workers:  # a generator of one's own, copied to workers: distinct by worker and epoch
        first, again = epochs(gen()), epochs(gen())
        assert not torch.equal(*first) and all(map(torch.equal, first, again))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_never_waits():
    y, g = labels(256).cuda(), gen(0, "cuda")
    x, table, idx = torch.rand(256, 3, device="cuda"), ClassTable(y, 10), torch.arange(256).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        w = sample_weights("uniform", 256, 3, g)
        ps = same_class_partners(y, 10, 3, g)
        z, qs = mix(x, (x[p] for p in ps), w), table.partners(idx, 3, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for p in (*ps, *qs):
        assert (y[p] == y).all() and (p != idx).all()
    assert z.device.type == "cuda" and z.isfinite().all()

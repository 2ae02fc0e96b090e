"""A training step on a device that is not the CPU and holds no data: PyTorch's meta device.

A tensor left on the CPU or a number asked of the device (which would make a GPU wait) fails here.
"""

import contextlib
from dataclasses import replace
from unittest import mock

import pytest
import torch

from fairmix_nb.cures import CURES
from fairmix_nb.data import ImageSet
from fairmix_nb.methods import (
    METHODS,
    TRAIN_ATTACKS,
    LogitAdjusted,
    Pipeline,
    Run,
    TrainCfg,
    Weighted,
)
from fairmix_nb.models import build

CLASSES, N = 3, 12
LABELS = torch.arange(N) % CLASSES


class Source:
    "In a generator's place."

    device = torch.device("meta")


def no_generator(draw):
    "The same draw on the meta device, which has no generators."

    def drawn(*args, generator=None, device=None, **kw):
        return draw(*args, device="meta", **kw)

    return drawn


@contextlib.contextmanager
def meta_draws():
    names = ("rand", "randn", "randint", "randperm")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch, name, no_generator(getattr(torch, name))))
        yield


def meta_run(method, cfg):
    model = build("small_cnn", CLASSES, 1).to("meta").train()
    pixels = torch.zeros(N, 1, 8, 8, dtype=torch.uint8, device="meta")
    images = mock.Mock(spec=ImageSet, x=pixels, y=LABELS.to("meta"), n_cls=CLASSES)
    streams = dict.fromkeys(("order", "mix", "attack", "augment"), Source())
    counts = tuple(torch.bincount(LABELS).tolist())
    run = Run(model, cfg, images, images, streams, counts, net=model)
    run.state = method.start(run)
    return run


CASES = {**METHODS, **CURES, "weighted": Weighted(weights=(1, 2, 3)), "adjusted": LogitAdjusted()}
CASES |= {
    f"{'+'.join(steps)} {partner}": Pipeline(steps, partner=partner)
    for steps in (("attack", "mix"), ("mix", "attack"))
    for partner in ("batch", "any", "self")
}


@pytest.mark.parametrize("attack", TRAIN_ATTACKS)
@pytest.mark.parametrize("name", CASES)
def test_a_step_needs_no_other_device_and_no_number(name, attack):
    cfg = TrainCfg(eps=0.1, steps=2, attack=attack, batch=N, augment="crop_flip")
    method = CASES[name]
    with meta_draws():
        run = meta_run(method, cfg)
        idx = torch.arange(N, device="meta")
        x, y = run.batch(method.take(run, idx))
        loss = method.step(run, x, y).mean()
        loss.backward()
        method.after_step(run)
    assert loss.device.type == "meta" and run.gradients > 0
    assert all(v.device.type == "meta" for v in run.state.values())


def test_it_would_notice_both_faults():
    cfg = TrainCfg(eps=0.1, batch=N)

    class Asks(Pipeline):
        def step(self, run, x, y):
            loss = super().step(run, x, y)
            return loss * (1 if loss.max().item() > 0 else 2)

    class LeavesBehind(Pipeline):
        def step(self, run, x, y):
            return super().step(run, x, y) * torch.ones(N)

    for method in (Asks(), LeavesBehind()):
        with meta_draws(), pytest.raises(RuntimeError):
            run = meta_run(method, cfg)
            x, y = run.batch(torch.arange(N, device="meta"))
            method.step(run, x, y).mean().backward()


def test_the_radius_per_channel_is_made_where_the_images_are():
    cfg = replace(TrainCfg(eps=0.1), eps=(0.1,))
    assert cfg.threat.of(torch.zeros(2, 1, 8, 8, device="meta")).device.type == "meta"

#!/usr/bin/env python3
"""Does same-class mixup act as a tempered prior? Digits with ten times more of some classes.

    python tools/digits_imbalanced.py                      # writes nbs/results/digits_imbalanced.json
    python tools/digits_imbalanced.py --out /tmp/x.json --epochs 1 --folds 1     # a rehearsal

The training part of each fold is thinned so that the class sizes fall geometrically by `RATIO`,
once in the order of the labels and once in the opposite one: over the pair every class is as often
rare as common, so what a digit is worth by itself cancels. The test part stays balanced.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from cifar_runs import thinned
from torch import nn

from fairmix_nb.data import load, write_aside
from fairmix_nb.models import build
from fairmix_nb.risk import pack_flags
from fairmix_nb.train import TrainCfg, attack_errors, fit, provenance

ROOT, RATIO, EPS = Path(__file__).resolve().parent.parent, 10, 0.1
# g = 1 is no mixing; fixed weights give g = 1/2 (k = 2) and 1/4 (k = 4); lambda ~ U(0,1) 2/3
MIXES = {"2/3": dict(law="uniform"), "1/2": dict(law=0.5), "1/4": dict(law=0.25, k=4)}
TAUS = {"1/3": 1 / 3, "1/2": 1 / 2, "3/4": 3 / 4, "1": 1.0}


def methods():
    "Name -> family, changes to the configuration, strength of logit adjustment, weights or not."
    found = {}
    for family, base in dict(natural=(), at=("attack",)).items():
        found[family] = dict(family=family, cfg=dict(pipeline=base))
        for g, how in MIXES.items():
            mixed = dict(pipeline=(*base, "mix"), partner="set", **how)
            found[f"{family} mix g={g}"] = dict(family=family, cfg=mixed)
        for tau, value in TAUS.items():
            found[f"{family} adjust {tau}"] = dict(
                family=family, cfg=dict(pipeline=base), tau=value
            )
        found[f"{family} weights"] = dict(family=family, cfg=dict(pipeline=base), weights=True)
    return found


class Adjusted(nn.Module):
    "While training, logits + tau log prior (Menon 2021); in evaluation mode the logits alone."

    def __init__(self, net, prior, tau):
        super().__init__()
        self.net = net
        self.register_buffer("shift", tau * prior.log())

    def forward(self, x):
        return self.net(x) + self.shift if self.training else self.net(x)


def network(model, tau, prior, seed):
    "A linear classifier or the small network, its logits adjusted where tau > 0."
    if model == "linear":
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(net[1].weight, std=0.01, generator=generator)
        nn.init.zeros_(net[1].bias)
    else:
        net = build(model, 10, 1, seed)
    return Adjusted(net, prior, tau)


def one(model, name, how, data, falling, seed, epochs):
    "Train and attack once; a small record."
    n = torch.bincount(data.train.y).float()
    weights = tuple((n.mean() / n).tolist()) if how.get("weights") else None
    lr = 3e-2 if model == "linear" else 3e-3
    cfg = TrainCfg(
        eps=EPS,
        epochs=epochs,
        batch=64,
        lr=lr,
        seed=seed,
        class_weights=weights,
        schedule=("step", max(1, round(0.62 * epochs)), 0.1),
        **how["cfg"],
    )
    net = network(model, how.get("tau", 0.0), n / n.sum(), seed)
    done = fit(net, data, cfg, device="cpu", watched=1, progress=False)
    net = done.model.net.eval()
    images = data.test.subset(torch.argsort(data.test.y, stable=True))
    wrong = attack_errors(net, images, EPS, ("clean", "pgd-20"))
    with torch.no_grad():
        said = torch.bincount(net(images.floats()).argmax(1), minlength=10).tolist()
    per_class = lambda w: torch.bincount(images.y[w], minlength=10).tolist()
    attacks = {
        k: dict(n=images.counts(), wrong=per_class(w), flags=pack_flags(w.numpy()))
        for k, w in wrong.items()
    }
    return dict(
        model=model,
        method=name,
        family=how["family"],
        tau=how.get("tau", 0.0),
        seed=seed,
        falling=falling,
        train=n.int().tolist(),
        predicted=said,
        seconds=round(done.record["seconds"], 2),
        cfg=asdict(cfg),
        attacks=attacks,
        gradient_evaluations=done.record["gradient_evaluations"],
    )


def lean(runs):
    "The configuration all runs share, once; in each run what differs."
    first = runs[0]["cfg"]
    shared = {k: v for k, v in first.items() if all(r["cfg"][k] == v for r in runs)}
    for r in runs:
        r["cfg"] = {k: v for k, v in r["cfg"].items() if k not in shared}
    return shared


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=ROOT / "nbs" / "results" / "digits_imbalanced.json")
    p.add_argument("--epochs", type=int, default=40)
    p.add_argument("--folds", type=int, default=3)
    p.add_argument("--models", nargs="+", default=["linear", "small_cnn"])
    args = p.parse_args(words)
    torch.set_num_threads(1)
    origin, runs, start = provenance("cpu"), [], time.perf_counter()
    for seed in range(args.folds):
        whole = load("digits", seed, progress=False)
        for falling in (True, False):
            data = thinned(whole, RATIO, falling)
            for model in args.models:
                for name, how in methods().items():
                    runs.append(one(model, name, how, data, falling, seed, args.epochs))
            print(f"fold {seed}, {len(runs)} runs, {time.perf_counter() - start:.0f} s", flush=True)
    shared = lean(runs)
    record = dict(
        schema=1,
        kind="digits imbalanced",
        ratio=RATIO,
        eps=EPS,
        epochs=args.epochs,
        cfg=shared,
        classes=list(whole.test.classes),
        data=whole.describe(),
        provenance=origin,
        device="cpu",
        runs=runs,
        seconds=round(sum(r["seconds"] for r in runs), 1),
    )
    assert all(math.isfinite(r["seconds"]) for r in runs)
    write_aside(args.out, json.dumps(record))


if __name__ == "__main__":
    main()

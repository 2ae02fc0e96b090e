#!/usr/bin/env python3
"""Does same-class mixup act as a tempered prior? Digits with ten times more of some classes.

    python tools/digits_imbalanced.py                      # writes
    nbs/results/digits_imbalanced.json
    python tools/digits_imbalanced.py --out /tmp/x.json --epochs 1 --folds 1     # a rehearsal

The training part of each fold is thinned so that the class sizes fall geometrically by `RATIO`,
once in the order of the labels and once in the opposite one: over the pair every class is as often
rare as common, so what a digit is worth by itself cancels. The test part stays balanced.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from fairmix_nb.data import load, long_tailed, spread_subset
from fairmix_nb.methods import LogitAdjusted, Pipeline, TrainCfg, Weighted, describe
from fairmix_nb.models import build
from fairmix_nb.records import provenance, write_aside
from fairmix_nb.report import attack_errors, outcome_of
from fairmix_nb.train import fit

ROOT, RATIO, EPS = Path(__file__).resolve().parent.parent, 10, 0.1
# g = 1 is no mixing; fixed weights give g = 1/2 (k = 2) and 1/4 (k = 4); lambda ~ U(0,1) 2/3
MIXES = {"2/3": dict(law="uniform"), "1/2": dict(law=0.5), "1/4": dict(law=0.25, k=4)}
TAUS = {"1/3": 1 / 3, "1/2": 1 / 2, "3/4": 3 / 4, "1": 1.0}


def methods(counts):
    "Name -> family, strength of logit adjustment, method; `counts` are the class sizes."
    found, n = {}, torch.tensor(counts, dtype=torch.float)
    for family, base in dict(natural=(), at=("attack",)).items():
        found[family] = family, 0.0, Pipeline(base)
        for g, how in MIXES.items():
            found[f"{family} mix g={g}"] = family, 0.0, Pipeline((*base, "mix"), "set", **how)
        for name, tau in TAUS.items():
            found[f"{family} adjust {name}"] = family, tau, LogitAdjusted(base, tau=tau)
        weights = tuple((n.mean() / n).tolist())
        found[f"{family} weights"] = family, 0.0, Weighted(base, weights=weights)
    return found


def network(model, seed):
    "A linear classifier, or a network by name."
    if model != "linear":
        return build(model, 10, 1, seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(net[1].weight, std=0.01, generator=generator)
    nn.init.zeros_(net[1].bias)
    return net


def one(model, name, family, tau, method, data, falling, seed, epochs):
    "Train and attack once; a small record."
    drop = ("step", max(1, round(0.62 * epochs)), 0.1)
    lr = 3e-2 if model == "linear" else 3e-3
    cfg = TrainCfg(eps=EPS, epochs=epochs, batch=64, lr=lr, seed=seed, schedule=drop)
    kw = dict(device="cpu", watched=1, progress=False)
    done = fit(network(model, seed), data, cfg, method, **kw)
    images = spread_subset(data.test, len(data.test))  # in order of class
    wrong = attack_errors(done.model, images, cfg.threat, ("clean", "pgd-20"))
    found = outcome_of(wrong, images, cfg.threat).record
    with torch.no_grad():
        said = torch.bincount(done.model(images.floats()).argmax(1), minlength=10).tolist()
    return dict(
        model=model,
        method=name,
        family=family,
        tau=tau,
        seed=seed,
        falling=falling,
        train=data.train.counts(),
        predicted=said,
        seconds=round(done.record["seconds"], 2),
        cfg=asdict(cfg) | dict(method=describe(method)),
        attacks={k: dict(v, n=found["n"]) for k, v in found["attacks"].items()},
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
            data = long_tailed(whole, RATIO, falling)
            for model in args.models:
                for name, how in methods(data.train.counts()).items():
                    runs.append(one(model, name, *how, data, falling, seed, args.epochs))
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
    write_aside(args.out, json.dumps(record))


if __name__ == "__main__":
    main()

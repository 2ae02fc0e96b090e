#!/usr/bin/env python3
"""What keeps FGSM training from collapsing: the class, any mixing, noise? Digits, large radii.

    python tools/digits_collapse.py                        # writes nbs/results/digits_collapse.json
    python tools/digits_collapse.py --out /tmp/x.json --epochs 1 --folds 1       # a rehearsal

The network and recipe of the digits chapter; three folds, so that each image is tested once.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from digits_imbalanced import lean

from fairmix_nb.data import load, spread_subset
from fairmix_nb.methods import TrainCfg, alignment, describe, method_of
from fairmix_nb.models import build
from fairmix_nb.records import provenance, write_aside
from fairmix_nb.report import attack_errors, outcome_of
from fairmix_nb.train import fit

ROOT, EPS = Path(__file__).resolve().parent.parent, (0.2, 0.3)
# name -> method, attack in training
RUNS = dict(
    at=("at", "fgsm"),
    attack_mix=("attack_mix", "fgsm"),
    any_mix=("any_mix", "fgsm"),
    nfgsm=("at", "nfgsm"),
    galign=("gradalign", "fgsm"),
    pgd=("at", "pgd"),
)


def one(name, eps, seed, epochs):
    "Train, attack, and measure how well the gradients in the ball agree."
    data, (method, attack) = load("digits", seed, progress=False), RUNS[name]
    drop = ("step", max(1, round(0.62 * epochs)), 0.1)
    recipe = dict(eps=eps, epochs=epochs, batch=64, lr=3e-3, seed=seed, schedule=drop)
    cfg, net = TrainCfg(attack=attack, **recipe), build("small_cnn", 10, 1, seed)
    done = fit(net, data, cfg, method, device="cpu", watched=epochs, progress=False)
    images = spread_subset(data.test, len(data.test))  # in order of class
    wrong = attack_errors(done.model, images, cfg.threat, ("clean", "fgsm", "pgd-50"))
    found = outcome_of(wrong, images, cfg.threat).record
    generator = torch.Generator().manual_seed(seed)
    cosine = alignment(done.model, images.floats(), images.y, cfg.threat, generator)
    curves = {k: [round(c[k], 4) for c in done.curves] for k in ("clean", "fgsm", "pgd-5")}
    return dict(
        method=name,
        eps=eps,
        seed=seed,
        cfg=asdict(cfg) | dict(method=describe(method_of(method))),
        alignment=round(cosine.mean().item(), 4),
        curves=curves,
        attacks={k: dict(v, n=found["n"]) for k, v in found["attacks"].items()},
        seconds=round(done.record["seconds"], 2),
        gradient_evaluations=done.record["gradient_evaluations"],
    )


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=ROOT / "nbs" / "results" / "digits_collapse.json")
    p.add_argument("--epochs", type=int, default=30)
    p.add_argument("--folds", type=int, default=3)
    args = p.parse_args(words)
    torch.set_num_threads(1)
    origin, runs = provenance("cpu"), []
    for seed in range(args.folds):
        runs += [one(m, eps, seed, args.epochs) for eps in EPS for m in RUNS]
        print(f"fold {seed}: {len(runs)} runs", flush=True)
    record = dict(
        schema=1,
        kind="digits collapse",
        epochs=args.epochs,
        cfg=lean(runs),
        data=load("digits", 0, progress=False).describe(),
        provenance=origin,
        device="cpu",
        runs=runs,
        seconds=round(sum(r["seconds"] for r in runs), 1),
    )
    write_aside(args.out, json.dumps(record))


if __name__ == "__main__":
    main()

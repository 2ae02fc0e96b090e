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
from cifar_runs import alignment
from digits_imbalanced import lean

from fairmix_nb.data import load, write_aside
from fairmix_nb.models import build
from fairmix_nb.risk import pack_flags
from fairmix_nb.train import TrainCfg, attack_errors, fit, provenance

ROOT, EPS = Path(__file__).resolve().parent.parent, (0.2, 0.3)
MIX = ("attack", "mix")
METHODS = dict(
    at=dict(pipeline=("attack",)),
    attack_mix=dict(pipeline=MIX),
    any_mix=dict(pipeline=MIX, partner="any"),
    nfgsm=dict(pipeline=("attack",), attack="nfgsm"),
    galign=dict(pipeline=("attack",), grad_align=0.2),
    pgd=dict(pipeline=("attack",), attack="pgd", steps=7),
)


def one(method, eps, seed, epochs):
    "Train, attack, and measure how well the gradients in the ball agree."
    data = load("digits", seed, progress=False)
    cfg = TrainCfg(
        eps=eps,
        epochs=epochs,
        batch=64,
        lr=3e-3,
        seed=seed,
        schedule=("step", max(1, round(0.62 * epochs)), 0.1),
        **METHODS[method],
    )
    done = fit(
        build("small_cnn", 10, 1, seed), data, cfg, device="cpu", watched=epochs, progress=False
    )
    images = data.test.subset(torch.argsort(data.test.y, stable=True))
    wrong = attack_errors(done.model, images, eps, ("clean", "fgsm", "pgd-50"))
    generator = torch.Generator().manual_seed(seed)
    cosine = alignment(done.model, images.floats(), images.y, eps, (0.0, 1.0), generator)
    count = lambda w: torch.bincount(images.y[w], minlength=10).tolist()
    attacks = {
        k: dict(n=images.counts(), wrong=count(w), flags=pack_flags(w.numpy()))
        for k, w in wrong.items()
    }
    curves = {k: [round(c[k], 4) for c in done.curves] for k in ("clean", "fgsm", "pgd-5")}
    return dict(
        method=method,
        eps=eps,
        seed=seed,
        cfg=asdict(cfg),
        alignment=round(cosine, 4),
        curves=curves,
        attacks=attacks,
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
        runs += [one(m, eps, seed, args.epochs) for eps in EPS for m in METHODS]
        print(f"fold {seed}: {len(runs)} runs", flush=True)
    data = load("digits", 0, progress=False).describe()
    shared = lean(runs)
    record = dict(
        schema=1,
        kind="digits collapse",
        epochs=args.epochs,
        cfg=shared,
        data=data,
        provenance=origin,
        device="cpu",
        runs=runs,
        seconds=round(sum(r["seconds"] for r in runs), 1),
    )
    write_aside(args.out, json.dumps(record))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""How often is the audit's verdict right? Networks broken on purpose, and sound ones, examined.

    python tools/audit_flags.py              60 seeds, an hour on one core; goes on where it was
    python tools/audit_flags.py --seeds 2 --out /tmp/try.json

Every seed trains two networks on its own fold of the digits, one against FGSM (100 epochs at
radius .3: it overfits to the single step) and one against PGD (radius .1, .2 or .3 by turns: it is
sound), and breaks the sound one in four ways. Seeds from 1000 on were used to fix thresholds.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

from fairmix_nb.audit import audit
from fairmix_nb.data import load
from fairmix_nb.methods import TrainCfg
from fairmix_nb.models import Normalize, Quarters, conv_bn, kaiming
from fairmix_nb.records import provenance, write_aside
from fairmix_nb.report import reasons_of
from fairmix_nb.train import fit

ATTACKS = ("clean", "fgsm", "pgd-20", "apgd-ce")
RADII = (0.1, 0.2, 0.3)
MEAN, STD = (0.306,), (0.376,)  # of the digits' pixels
OWN = {
    "overfitted to FGSM": "overfitting to one step",
    "logits x 1000": "gradient masking",
    "rounded inputs": "gradient masking",
    "pixels instead of standardised inputs": "inputs in other units than the model was made for",
    "BatchNorm left in training mode": "logits that depend on the other images of a batch",
}


class Wrapped(nn.Module):
    "A model with something done to its inputs or its logits."

    def __init__(self, model, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def round_inputs(x):
    return (15 * x).round() / 15


def scale_logits(z):
    return 1000 * z


def network(seed, width=16):
    "Normalisation, three convolutions with BatchNorm, the mean of each quarter, a linear layer."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [(1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        convs = [m for a, b, stride in sizes for m in (*conv_bn(a, b, stride=stride), nn.ReLU())]
        return kaiming(
            nn.Sequential(
                Normalize(MEAN, STD), *convs, Quarters(), nn.Flatten(), nn.Linear(16 * width, 10)
            )
        )


def specimens(seed, data):
    "Name, network and radius of each network of a seed."
    common = dict(batch=64, lr=3e-3, seed=seed)

    def trained(cfg):
        return fit(network(seed), data, cfg, progress=False, watched=1).model.eval()

    yield "overfitted to FGSM", trained(TrainCfg(eps=0.3, epochs=100, **common)), 0.3
    eps = RADII[seed % 3]
    sound = trained(TrainCfg(attack="pgd", eps=eps, epochs=12, **common))
    yield f"sound, radius {eps}", sound, eps
    yield "logits x 1000", Wrapped(sound, after=scale_logits), eps
    yield "rounded inputs", Wrapped(sound, before=round_inputs), eps
    yield "pixels instead of standardised inputs", sound[1:], eps
    yield "BatchNorm left in training mode", sound.train(), eps


def examine(kind, model, eps, images):
    "One row of the record."
    found = audit(model, images, eps, ATTACKS, diagnose=300, progress=False)
    reasons = reasons_of(found.record["diagnosis"])
    right = not reasons if kind.startswith("sound") else OWN[kind] in reasons
    numbers = {
        c["check"]: None if c["number"] is None else round(c["number"], 4)
        for c in found.record["diagnosis"]
    }
    risks = {a: round(float(found.flags(a, raw=True).mean()), 4) for a in ATTACKS}
    return dict(flagged=bool(reasons), right=right, reasons=reasons, numbers=numbers, raw=risks)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=60, help="default: 60")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("nbs/results/audit_flags.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = (
        json.loads(args.out.read_text())
        if args.out.exists()
        else dict(
            schema=1, kind="audit_flags", provenance=provenance(), seconds=0.0, seeds=[], kinds={}
        )
    )
    for seed in range(args.first, args.first + args.seeds):
        if seed in record["seeds"]:
            continue
        start, data = time.perf_counter(), load("digits", seed=seed)
        images = data.test.subset(
            torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))[:300]
        )
        for kind, model, eps in specimens(seed, data):
            row = dict(seed=seed, eps=eps, **examine(kind, model, eps, images))
            record["kinds"].setdefault(kind.split(",")[0], []).append(row)
        record["seeds"].append(seed)
        record["seconds"] = round(record["seconds"] + time.perf_counter() - start, 1)
        write_aside(args.out, json.dumps(record))
        flagged = {k: f"{sum(r['right'] for r in v)}/{len(v)}" for k, v in record["kinds"].items()}
        print(f"seed {seed}, {record['seconds']:.0f} s: right {flagged}", flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Train, mend and judge the digits networks of nbs/19_mend.ipynb: those that the record lacks.

    python tools/digits_mend.py     # 2 methods x 15 seeds -> nbs/results/digits_mend.json

Offsets are chosen on 30 validation images a class, by margins; both networks are judged on the
test part by PGD-20 and APGD-T. `train` is what the same choice would have seen on 30 training
images a class instead; `radii` are risks at the test margins of other radii than that of the
choice.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from fairmix_nb.compare import preset
from fairmix_nb.data import load, spread_subset
from fairmix_nb.mend import margins, mend, mend_at, risks_at
from fairmix_nb.models import build
from fairmix_nb.records import SCHEMA, provenance, write_aside
from fairmix_nb.report import attack_errors, outcome_of
from fairmix_nb.train import fit

ROOT = Path(__file__).resolve().parent.parent
METHODS, ATTACKS, PER_CLASS = ("at", "attack_mix"), ("clean", "pgd-20", "apgd-t"), 30


def judged(model, images, threat):
    "Counts and flags under each attack, and all of them together."
    found = outcome_of(attack_errors(model, images, threat, ATTACKS), images, threat).record
    return {a: dict(v, n=found["n"]) for a, v in found["attacks"].items()}


def one_run(method, seed):
    data = load("digits", seed, val_per_class=PER_CLASS, progress=False)
    name, cfg = preset("digits")
    net = build(name, data.train.n_cls, data.train.x.shape[1], seed)
    start = time.perf_counter()
    net = fit(net, data, cfg, method, progress=False, watched=1).model
    trained, threat = time.perf_counter(), cfg.threat
    done = mend(net, data.val, threat, steps=10)
    mended = time.perf_counter()
    part = spread_subset(data.train, PER_CLASS * data.train.n_cls)
    seen = margins(net, part.floats(), part.y, threat, steps=10)
    misled = mend_at(seen, part.y.numpy()).offsets
    test, some, radii = data.test, spread_subset(data.test, 300), {}
    for times in (0, 0.5, 1):
        matrix = margins(net, some.floats(), some.y, threat.scaled(times), steps=10)
        choices = dict(before=np.zeros(10), after=done.offsets, misled=misled)
        risks = {
            k: risks_at(matrix, some.y.numpy(), b).round(4).tolist() for k, b in choices.items()
        }
        radii[str(times)] = risks
    half = margins(net, data.val.floats(), data.val.y, threat.scaled(0.5), steps=10)
    moved = mend_at(half, data.val.y.numpy()).offsets
    radii["1"]["chosen at half"] = risks_at(matrix, some.y.numpy(), moved).round(4).tolist()
    train_risks = {
        k: risks_at(seen, part.y.numpy(), b).round(4).tolist() for k, b in choices.items()
    }
    return dict(
        method=method,
        seed=seed,
        offsets=done.offsets.round(5).tolist(),
        val=dict(before=done.before.risks().tolist(), after=done.after.risks().tolist()),
        train=train_risks,
        radii=radii,
        before=judged(net, test, threat),
        after=judged(done.model, test, threat),
        test=test.digest(),
        seconds=dict(trained=round(trained - start, 1), mended=round(mended - trained, 1)),
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=ROOT / "nbs" / "results" / "digits_mend.json")
    p.add_argument("--seeds", type=int, default=15)
    args = p.parse_args()
    torch.set_num_threads(1)
    origin, data = provenance("cpu"), load("digits", progress=False)
    record = dict(schema=SCHEMA, kind="mend", classes=list(data.train.classes), runs=[])
    if args.out.exists():
        record = json.loads(args.out.read_text())
    done = {(r["method"], r["seed"]) for r in record["runs"]}
    cfg = preset("digits")[1]
    record.update(eps=cfg.eps, val_per_class=PER_CLASS, provenance=origin)
    for seed in range(args.seeds):
        for method in METHODS:
            if (method, seed) not in done:
                record["runs"].append(one_run(method, seed))
                write_aside(args.out, json.dumps(record))
                r = record["runs"][-1]
                worst = [max(r["radii"]["1"][k]) for k in ("before", "after")]
                print(
                    f"{method}, seed {seed}: worst class {worst[0]:.3f} -> {worst[1]:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
